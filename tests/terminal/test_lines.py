import re
from pathlib import Path

import pytest

import eiwtrain
from eiwtrain.terminal.lines import one_line, printable


@pytest.mark.parametrize(
    ("text", "limit", "line"),
    [(ValueError(" no such\n\tfile "), 200, "no such file"), ("a" * 300, 200, "a" * 200), ("a" * 300, None, "a" * 300)],
)
def test_the_text_of_an_error_is_one_line(text, limit, line):
    assert one_line(text, limit) == line


def test_no_other_file_joins_words_into_a_line_by_itself():
    root = Path(eiwtrain.__file__).parents[1]
    files = [f for package in ("eiwtrain", "data_prep", "cluster") for f in (root / package).rglob("*.py")]
    joins = re.compile(r"""["'] ["']\.join\(.*\.split\(\)\)""")
    assert [f.name for f in files if joins.search(f.read_text())] == ["lines.py"]


def test_names_of_others_do_not_command_a_terminal() -> None:
    assert printable("  ok\x1b[2J\nnext\r\x9b") == "  ok\ufffd[2J\ufffdnext\ufffd\ufffd"
    assert printable("höhe-写真 \\ x") == "höhe-写真 \\ x"
