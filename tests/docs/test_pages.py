"""The pages: they build without a warning, their commands parse, their Python runs."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from falcon_relu.cli.main import COMMANDS, parse
from tests.falcon_relu.evaluation.questions import write_questions

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def _blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in _BLOCK.findall(page.read_text()) if kind == language]


def _commands(page: Path) -> list[list[str]]:
    """Arguments of every falcon-relu command that a page shows."""
    lines = [line for text in _blocks(page, "sh") for line in text.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[line.index("falcon-relu") + 1 :] for line in words if "falcon-relu" in line]


def test_site_builds_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", ROOT / "docs", tmp_path / "html"],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr


def test_figures_are_what_the_code_draws_now(tmp_path):
    runpy.run_path(str(ROOT / "docs" / "draw.py"))["all_figures"](tmp_path)
    written = re.compile(r"<text[^>]*>([^<]*)")
    for figure in tmp_path.iterdir():
        stored = (ROOT / "docs" / "figures" / figure.name).read_text()
        assert written.findall(figure.read_text()) == written.findall(stored), f"run python docs/draw.py: {figure.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_between_files_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", [page for page in PAGES if _commands(page)], ids=lambda page: page.stem)
def test_commands_on_the_pages_are_commands(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name, *arguments in filter(None, _commands(page)):
        if name != "--version":
            assert name in COMMANDS, f"{page.name}: falcon-relu {name}"
            assert _status(name, arguments) == 0, f"{page.name}: falcon-relu {name} {shlex.join(arguments)}"


def _status(name: str, arguments: list[str]) -> object:
    try:
        parse(name, arguments)
    except SystemExit as exit_:
        return exit_.code
    return 0


@pytest.mark.parametrize("page", [page for page in PAGES if _blocks(page, "python")], ids=lambda page: page.stem)
def test_python_on_the_pages_runs(page, finished_demo, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(finished_demo)
    write_questions(tmp_path / "data" / "eval")
    code = "\n".join(_blocks(page, "python"))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
