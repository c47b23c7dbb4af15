"""What `./run` says on machines where it cannot go on."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """As much of a fresh clone as an installation looks at."""
    for name in ("run", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "infer" / "native", tmp_path / "infer" / "native")
    return tmp_path


def _run(clone: Path, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [clone / "run", command], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


def test_an_old_python_is_refused_with_what_to_do(clone):
    tools = clone / "tools"
    tools.mkdir()
    for name in ("python3.11", "python3.12", "python3.13", "python3"):
        (tools / name).write_text("#!/bin/sh\nexit 1\n")  # what the question for the version ends with there
        (tools / name).chmod(0o755)
    done = _run(clone, "test", PATH=f"{tools}:{os.environ['PATH']}")
    assert done.returncode == 1
    assert "Python 3.11 or newer is needed" in done.stderr


def test_without_a_network_it_says_what_is_missing(clone):
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull}
    done = _run(clone, "test", **nowhere)
    assert done.returncode == 1
    assert "needs a network" in done.stderr
    assert not (clone / ".venv" / "installed").exists()


def test_an_unknown_command_lists_the_known_ones(clone):
    done = _run(clone, "fly")
    assert done.returncode == 2
    assert "run demo" in done.stdout
