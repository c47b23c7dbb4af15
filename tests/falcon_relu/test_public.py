"""The public names: each is there, is what the type checkers are told it is, and is documented."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import falcon_relu as fr

PACKAGES = (fr, fr.train, fr.infer, fr.evaluation)
REFERENCE = (Path(fr.__file__).parents[1] / "docs" / "reference.md").read_text()


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_name_that_type_checkers_see_is_there_and_in_the_reference(package):
    stub = ast.parse(Path(package.__file__).with_suffix(".pyi").read_text())
    listed = [alias for node in stub.body for alias in node.names]
    assert all(alias.asname == alias.name for alias in listed)  # `x as x` is what makes a name of a stub public
    assert sorted(alias.name for alias in listed) == sorted(package.__all__) == sorted(dir(package))
    for name in package.__all__:
        value = getattr(package, name)
        if isinstance(value, ModuleType):
            assert f"fr.{name}" in REFERENCE, f"fr.{name} is missing on docs/reference.md"
            continue
        assert f"{package.__name__}.{name}\n" in REFERENCE, f"{name} is missing on docs/reference.md"
        assert not callable(value) or inspect.getdoc(value), name


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_no_name_is_a_modules_of_its_package(package):
    """Importing a submodule sets it as an attribute of its package, in the place of what has its name."""
    folder = Path(package.__file__).parent
    for name in package.__all__:
        is_module = (folder / f"{name}.py").exists() or (folder / name / "__init__.py").exists()
        assert is_module <= isinstance(getattr(package, name), ModuleType), f"{package.__name__}.{name}"


def test_importing_the_public_face_imports_no_training_and_decoding():
    code = "import sys, falcon_relu as fr; fr.Falcon; print({'train', 'infer', 'grain', 'optax'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_a_missing_lm_eval_is_told_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "falcon_relu.evaluation.suite", raising=False)
    monkeypatch.delitem(vars(fr.evaluation), "SUITES", raising=False)
    with pytest.raises(fr.FalconError, match=r'pip install "falcon-relu\[eval\]"'):
        _ = fr.evaluation.SUITES
