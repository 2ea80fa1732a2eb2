"""Everything that the docs name exists: pages, headings, config fields, commands with their options, files, extras. The
Python of the page on the flow runs. Not for how well a page reads."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from eiwtrain import flow
from eiwtrain.config import Config, leaf_fields
from eiwtrain.data.order import SampleOrder
from eiwtrain.flow.presets import PRESETS

HERE = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [*HERE.glob("docs/**/*.md"), HERE / "README.md", HERE / "CONTRIBUTING.md", HERE / "benchmarks" / "RESULTS.md"]
)
CONFIGS = sorted(HERE.glob("configs/*.yaml"))

FIELDS = {name for name, _, _ in leaf_fields(Config)}
PARTS = FIELDS | {name.rsplit(".", 1)[0] for name in FIELDS}  # and sections
SECTIONS = "|".join(sorted({name.split(".")[0] for name in FIELDS}))
OVERRIDE = re.compile(rf"(?<![\w.\"'/-])((?:{SECTIONS})(?:\.\w+)+)=")
IN_BACKTICKS = re.compile(rf"`((?:{SECTIONS})(?:\.\w+)+)(?:`|:? )")
FILE_NAMES = (".json", ".safetensors", ".py", ".yaml")  # `model.safetensors` is no field

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[(?:[^\][]|\[[^\]]*\])*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?)#* *$", re.MULTILINE)
MODULE = re.compile(r"python3? -m ([\w.]+)([^\n|#;`&]*)")
FOLDERS = r"configs|eiwtrain|cluster|tests|benchmarks|data_prep|docs|\.ci"
FILE = re.compile(rf"(?<![\w./~-])((?:{FOLDERS})/[\w.*/-]*\w)")
EXTRA = re.compile(r"(?:\beiwtrain|'\.)\[([\w,]+)\]")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(HERE)))
every_text = pytest.mark.parametrize("page", [*PAGES, *CONFIGS], ids=lambda p: str(p.relative_to(HERE)))


def prose(page: Path) -> str:
    """Return the page without its blocks of code."""
    return FENCE.sub("", page.read_text())


def whole_lines(text: str) -> str:
    """Return the text with lines joined where a backslash continues them."""
    return re.sub(r"\\\n\s*", " ", text)


def anchors(page: Path) -> set[str]:
    """Return the anchors of the page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in HEADING.findall(prose(page)):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        number = sum(1 for a in found if re.fullmatch(re.escape(slug) + r"(-\d+)?", a))
        found.add(f"{slug}-{number}" if number else slug)
    return found


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (module, options) of every `python -m module ... --option`."""
    for module, rest in MODULE.findall(whole_lines(text)):
        try:
            words = shlex.split(rest)
        except ValueError:  # a quote that closes after what was taken for the command's end
            words = rest.split()
        yield module.rstrip("."), [word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)]


@functools.cache
def options_of(module: str) -> str:
    """Return text that names the options of a command: its help, or of a package all its code."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    origin = Path(spec.origin)
    if origin.name == "__init__.py":  # whose commands have commands of their own
        return "".join(file.read_text() for file in origin.parent.rglob("*.py"))
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        importlib.import_module(module).main(["--help"])
    return text.getvalue()


def is_command(module: str) -> bool:
    """Return whether `python -m module` finds something to run."""
    try:
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{module}.__main__")
    except ModuleNotFoundError:
        return False
    return spec is not None


def in_order(found: set[str]) -> str:
    return ", ".join(sorted(found))


@every_page
def test_links_lead_to_files_and_headings(page: Path) -> None:
    missing = set()
    for target in LINK.findall(prose(page)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        file = page if not path else (page.parent / path)
        if not file.exists() or (anchor and anchor not in anchors(file)):
            missing.add(target)
    assert not missing, f"{page.name} has broken links: {in_order(missing)}"


@pytest.mark.parametrize(("entry", "pages"), [("README.md", "docs/*.md"), ("docs/clusters.md", "docs/clusters/*.md")])
def test_an_entry_links_to_each_of_its_pages(entry: str, pages: str) -> None:
    page = HERE / entry
    linked = {(page.parent / target.partition("#")[0]).resolve() for target in LINK.findall(prose(page))}
    missing = {str(p.relative_to(HERE)) for p in HERE.glob(pages) if p not in linked}
    assert not missing, f"{entry} has no link to {in_order(missing)}"


@every_text
def test_config_fields_exist(page: Path) -> None:
    text = page.read_text()
    named = set(OVERRIDE.findall(text)) | {n for n in IN_BACKTICKS.findall(text) if not n.endswith(FILE_NAMES)}
    assert not named - PARTS, f"{page.name} names fields that the config does not have: {in_order(named - PARTS)}"


@every_text
def test_commands_and_their_options_exist(page: Path) -> None:
    found = list(commands(page.read_text()))
    missing = {f"python -m {module}" for module, _ in found if not is_command(module)}
    for module, options in found:
        if module.split(".")[0] in ("eiwtrain", "data_prep", "cluster") and is_command(module):
            named = set(re.findall(r"--[a-z][\w-]*", options_of(module)))
            missing |= {f"{option} of python -m {module}" for option in options if option not in named}
    assert not missing, f"{page.name} names commands that are not there: {in_order(missing)}"


@every_text
def test_files_exist(page: Path) -> None:
    named = set(FILE.findall(page.read_text()))
    missing = {name for name in named if not any(HERE.glob(name))}
    assert not missing, f"{page.name} names files that do not exist: {in_order(missing)}"


@every_page
def test_extras_exist(page: Path) -> None:
    table = (HERE / "pyproject.toml").read_text().partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    extras = set(re.findall(r"^([\w-]+) = \[", table, re.MULTILINE))
    named = {extra for names in EXTRA.findall(page.read_text()) for extra in names.split(",")}
    assert extras, "pyproject.toml was not read as it is written"
    assert not named - extras, f"{page.name} names extras that the package does not have: {in_order(named - extras)}"


def test_the_drawn_order_of_samples_is_the_order() -> None:
    page = (HERE / "docs" / "data.md").read_text()
    order = SampleOrder([4, 4, 4, 4], "f", 0, lanes=2, block=4)
    assert 'SampleOrder([4, 4, 4, 4], "f", 0, lanes=2, block=4)' in page
    for positions in (
        np.arange(8),
        np.arange(8, 16),
        order.batch_positions(0, 8),
        *(order.rank_positions(0, 8, rank, ranks) for ranks in (2, 3) for rank in range(ranks)),
    ):
        assert " ".join(map(str, order.at(positions)[1])) in page


@pytest.mark.parametrize("preset", PRESETS)
def test_the_flow_page_has_the_presets_with_their_parameters(preset: str) -> None:
    row = next(
        line for line in (HERE / "docs" / "flow.md").read_text().splitlines() if line.startswith(f"| `{preset}` ")
    )
    with FakeTensorMode():  # no time and no memory for weights
        model = flow.EIWFlow.from_config({"preset": preset, "image_shape": [3, 32, 32]})
    assert row.split("|")[-2].strip() == f"{sum(p.numel() for p in model.parameters()):,}"


def test_python_of_the_flow_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = HERE / "docs" / "flow.md"
    text = page.read_text()
    blocks = [match for match in FENCE.finditer(text) if match[1] == "python"]
    assert blocks
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in blocks:
        above = "\n" * text.count("\n", 0, block.start(2))  # so that a traceback names the page's own line
        exec(compile(above + block[2], page, "exec"), names)
