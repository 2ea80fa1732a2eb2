"""The word list of the project's English: common words of the field, and docstrings that can be read alone."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("eiwtrain", "data_prep", "cluster", "benchmarks", "tests", "docs")
FILES = sorted(
    file
    for file in [*ROOT.glob("*.md"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*"))]
    if file.suffix in (".py", ".md") and file != Path(__file__).resolve()
)

INSTEAD = {
    r"(?:go|goes|going|went|gone) on": "resume, continue",
    r"told|tells? (?:of|its|the)": "report, print",
    r"mend(?:s|ed|ing)?": "fix",
    r"besides": "also, in addition",
    r"wants? (?:an?|the|one|to|it)": "needs",
    r"(?<!there )(?:is|are) none": "there is no, returns None",
    r"to be had|can(?:not)? be had": "available",
    r"for ever": "forever",
    r"(?:comes?|coming) of": "comes from",
    r"made again": "run again, written again",
    r"so many (?:seconds|hours|steps|bytes)": "give the name of the number",
    r"whoever": "anyone who, the caller",
}
"""Words to avoid, as regular expressions, and the common ones."""

AVOIDED = re.compile(rf"\b(?:{'|'.join(INSTEAD)})\b")
IN_MID_AIR = re.compile(r"\s*(?:Of|That|By|With|From|Those)\b")


def words(file: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of what a file says: a page's lines, a module's comments and strings."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        yield from enumerate(text.splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT or tokenize.tok_name[token.type] in ("STRING", "FSTRING_MIDDLE"):
            yield from enumerate(token.string.splitlines(), token.start[0])


def docstrings(file: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of a module's docstrings, and of the strings below its names."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                yield statement.lineno, str(statement.value.value)


def test_texts_use_common_words() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{line}: {m[0]!r}"
        for file in FILES
        for line, text in words(file)
        for m in AVOIDED.finditer(text)
    ]
    assert not found, f"the common words: {INSTEAD}"


def test_docstrings_can_be_read_alone() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{line}: {text[:60]!r}"
        for file in FILES
        if file.suffix == ".py"
        for line, text in docstrings(file)
        if IN_MID_AIR.match(text)
    ]
    assert not found, "start with a verb, as in 'Return ...', or with a noun"


def test_the_list_finds_what_it_is_to_find(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text('def f(x):\n    """Of the newest one."""\n    return x is None  # it goes on\n')
    assert [m[0] for _, text in words(bad) for m in AVOIDED.finditer(text)] == ["goes on"]
    assert [bool(IN_MID_AIR.match(text)) for _, text in docstrings(bad)] == [True]
