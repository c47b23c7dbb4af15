"""The public names: each is there, is what the type checkers are told it is, and is documented."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import falcon_relu as fr

SOURCE = ast.parse(Path(fr.__file__).read_text())
REFERENCE = Path(fr.__file__).parents[1] / "docs" / "reference.md"


def test_type_checkers_see_the_names_that_python_finds():
    block = next(node for node in SOURCE.body if isinstance(node, ast.If))
    told = {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert told == fr._LATER


def test_every_public_name_is_there_documented_and_in_the_reference():
    page = REFERENCE.read_text()
    for name in fr.__all__:
        value = getattr(fr, name)
        if callable(value):
            assert inspect.getdoc(value), name
        assert f"falcon_relu.{name}\n" in page, f"{name} is missing on docs/reference.md"
    assert set(fr._LATER) <= set(fr.__all__) <= set(dir(fr))


def test_importing_the_model_does_not_import_training_and_decoding():
    code = "import sys, falcon_relu; print({'train', 'infer', 'grain', 'optax'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
