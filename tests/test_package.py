"""The package as users get it: built, installed in an empty environment, used outside the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from falcon_relu.checkpoints.native import save_params
from falcon_relu.config import family
from tests.conftest import random_params

ROOT = Path(__file__).parents[1]


def _run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def _build(kind: str, source: Path, out: Path, **environment: str) -> Path:
    _run(sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", out, source, cwd=out, **environment)
    (built,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    return _build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # from 3.11.4 on
    (source,) = folder.iterdir()
    return source


def test_sdist_holds_all_that_a_build_needs(unpacked):
    held = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    for package in ("falcon_relu", "train", "infer", "configs"):
        here = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py*") if path.suffix != ".pyc"}
        assert here <= held
    report = {f"falcon_relu/cli/demo/report.{kind}" for kind in ("css", "html.jinja")}
    assert report <= held
    native = {f"infer/native/{path.name}" for path in (ROOT / "infer" / "native").iterdir()}
    assert native <= held
    assert {"README.md", "LICENSE", "setup.py", "pyproject.toml"} <= held


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["", "/bin/false"], ids=["native", "no compiler"])
def test_wheel_decodes_outside_the_repository(unpacked, tmp_path, compiler):
    """From the sdist, through a wheel, into an empty environment."""
    (tmp_path / "dist").mkdir()
    without = {"CC": compiler, "CXX": compiler} if compiler else {}
    source = shutil.copytree(unpacked, tmp_path / "source")  # what one build leaves is nothing to another
    wheel = _build("wheel", source, tmp_path / "dist", **without)
    with zipfile.ZipFile(wheel) as archive:
        held = archive.namelist()
        assert any(name.endswith(".so") for name in held) == (not compiler)
        assert ("infer/_native_failed.txt" in held) == bool(compiler)
        assert "falcon_relu/cli/demo/report.html.jinja" in archive.namelist()

    _run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    bin_ = tmp_path / "venv" / "bin"
    _run(bin_ / "pip", "install", "--quiet", wheel, cwd=tmp_path)

    config = family("tiny-40b").with_activation("relu")
    save_params(tmp_path / "weights", config, random_params(config))
    code = "from falcon_relu import train_bpe; train_bpe(['some text, to learn letters from'] * 9, 300, 't.json')"
    _run(bin_ / "python", "-c", code, cwd=tmp_path)
    said = _run(
        bin_ / "falcon-relu", "decode", "weights", "some text", "--tokenizer", "t.json", "--max-new-tokens", "4",
        "--backend", "xla" if compiler else "native", cwd=tmp_path,
    )  # fmt: skip
    assert "some text" in said
    assert "falcon-relu 0." in _run(bin_ / "falcon-relu", "--version", cwd=tmp_path)
