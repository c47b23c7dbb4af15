"""The structure that docs/architecture.md describes: imports run one way, and a room fits on a screen."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("falcon_relu", "train", "infer", "configs")
MAY_IMPORT = {
    "falcon_relu": set(),
    "train": {"falcon_relu"},
    "infer": {"falcon_relu", "train.data"},  # predictors are fitted on the data of training
    "configs": {"falcon_relu", "train", "infer"},
}
FACES = {ROOT / package / "__init__.py" for package in PACKAGES}  # they list public names, and import nothing at once


def _modules(package: str) -> Iterator[Path]:
    for path in sorted((ROOT / package).rglob("*.py")):
        if path not in FACES and path.name != "__main__.py":
            yield path


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def _inside(name: str, house: str) -> bool:
    return name == house or name.startswith(f"{house}.")


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package):
    """falcon_relu.cli -> configs -> train, infer -> falcon_relu."""
    for path in _modules(package):
        if "cli" in path.parts:
            continue  # the commands know everything
        for name in _imports(path):
            if not any(_inside(name, house) for house in (*PACKAGES, "tests")) or _inside(name, package):
                commands = _inside(name, "falcon_relu.cli")
            else:
                # the demo's configs are values of the demo's own type
                recipe = package == "configs" and _inside(name, "falcon_relu.cli.demo.recipe")
                commands = _inside(name, "falcon_relu.cli") and not recipe
                assert any(_inside(name, house) for house in MAY_IMPORT[package]), f"{path} imports {name}"
            assert not commands, f"{path} imports {name}"


def test_the_data_of_training_knows_nothing_of_training():
    for path in (ROOT / "train" / "data").glob("*.py"):
        for name in _imports(path):
            assert not _inside(name, "train") or _inside(name, "train.data"), f"{path} imports {name}"


def test_rooms_of_infer_are_tied_by_few_imports():
    def room(name: str) -> str | None:
        parts = name.split(".")
        return parts[1] if parts[0] == "infer" and len(parts) > 1 else None

    arrows = set()
    for path in _modules("infer"):
        here = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
        arrows |= {(here, there) for name in _imports(path) if (there := room(name)) not in (None, here)}
    assert not {(b, a) for a, b in arrows} & arrows, "two rooms import each other"
    assert len(arrows) <= 20, sorted(arrows)


def test_rooms_and_files_are_small():
    native = ROOT / "infer" / "native"
    for folder in {path.parent for package in PACKAGES for path in _modules(package)} - {ROOT / "falcon_relu" / "cli"}:
        modules = [path for path in folder.glob("*.py") if not path.name.startswith("__")]
        assert len(modules) <= (12 if folder != ROOT / "configs" else 24), f"{folder} has {len(modules)} modules"
    for path in [*(p for package in PACKAGES for p in _modules(package)), *native.iterdir()]:
        lines = len(path.read_text().splitlines())
        assert lines <= 400, f"{path} has {lines} lines"
