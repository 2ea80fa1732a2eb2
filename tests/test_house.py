"""The rule of the house: imports go one way, from the commands down to the flow."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (
    ("run", "evaluate", "sample", "export", "report", "doctor"),
    ("driver", "checks", "reporting"),
    ("train",),
    ("exporting", "sampling", "scoring", "tracking", "checkpoints", "on_ray"),
    ("config", "data"),
    ("storage",),
    ("terminal", "testing", "flow"),
)
"""Rooms of `eiwtrain`, from the top floor down: a room imports from its own floor and those below it."""

FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def names_imported(file: Path) -> Iterator[str]:
    """Yield the full name of each thing that a file imports, for types alone or not."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def imports(file: Path) -> Iterator[tuple[str, str]]:
    """Yield (package, room) of each import of a file."""
    for name in names_imported(file):
        package, _, rest = name.partition(".")
        yield package, rest.partition(".")[0]


@pytest.mark.parametrize("file", sorted((ROOT / "eiwtrain").rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_go_down(file):
    room = file.relative_to(ROOT / "eiwtrain").parts[0].removesuffix(".py")
    for package, other in imports(file):
        assert package not in ("benchmarks", "cluster", "tests"), file
        if package == "eiwtrain" and other in FLOOR and room in FLOOR:
            assert FLOOR[room] <= FLOOR[other], f"{room} imports {other}"


def test_no_module_imports_one_that_imports_it():
    files = [file for package in ("eiwtrain", "data_prep", "benchmarks") for file in (ROOT / package).rglob("*.py")]
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    arrows = {}
    for module, file in modules.items():
        names = {*names_imported(file)}
        arrows[module] = (names | {name.rpartition(".")[0] for name in names}) & modules.keys() - {module}
    assert len(list(TopologicalSorter(arrows).static_order())) == len(modules)


def test_every_file_of_the_package_is_a_command_or_in_a_room():
    assert {path.name.removesuffix(".py") for path in (ROOT / "eiwtrain").glob("[a-z]*")} == set(FLOOR)


def test_the_flow_imports_torch_and_safetensors_alone():
    found = {package for file in (ROOT / "eiwtrain" / "flow").rglob("*.py") for package, _ in imports(file)}
    assert found - set(sys.stdlib_module_names) == {"torch", "safetensors"}


def test_ray_is_imported_in_one_room_alone():
    files = [*(ROOT / "eiwtrain").rglob("*.py"), *(ROOT / "data_prep").rglob("*.py")]
    rooms = {file.parent for file in files if "ray" in {package for package, _ in imports(file)}}
    assert rooms == {ROOT / "eiwtrain" / "on_ray"}


def test_tests_import_helpers_from_helper_modules():
    found = [
        str(file.relative_to(ROOT))
        for file in (ROOT / "tests").rglob("*.py")
        if any(package.startswith("test_") for package, _ in imports(file))
    ]
    assert found == []
