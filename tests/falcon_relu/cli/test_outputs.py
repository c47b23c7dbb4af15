"""What commands write: checked before the work, one at a time, never what the user had; and what they print."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from falcon_relu.checkpoints.native import save_params
from falcon_relu.cli.main import main
from falcon_relu.config import family
from falcon_relu.files import lock, lock_part
from tests.conftest import random_params
from tests.falcon_relu.test_files import tree

CONFIG = family("tiny-40b").with_activation("relu")
CALIBRATE = ["predictor", "calibrate", "model", "r", "p", "t"]
PLAN = ["plan", "--config", "falcon_40b", "--devices", "4"]
TOKENIZER = ["--tokenizer", "f"]

# Each is refused: where its output lies, or for what it reads. `d` holds something, `f` is a file, `model` is whole.
REFUSED = [
    *(["convert", "hf", out] for out in ("d", "f", "f/x", "f/x/y", "loop", "nowhere", "new")),
    *(["convert", "hf", "new", "--json", out] for out in ("d", "f", "f/x", "loop", "nowhere", "new", "x" * 300)),
    *(["convert", "hf", out, "--overwrite"] for out in ("d", "f", "new")),
    *(["export", "model", out] for out in ("d", "f", "f/x", "nowhere")),
    ["export", "model", "d", "--overwrite"],
    *(["pack", "model", out] for out in ("d", "f", "f/x")),
    ["pack", "model", "d", "--overwrite"],
    ["pack", "d", "new"],
    *(["card", out, "--name", "x"] for out in ("d", "f", "f/x", "loop")),
    ["card", "d", "--name", "x", "--overwrite"],
    ["card", "new", "--name", "x", "--json", "new"],
    ["card", "new", "--name", "x", "--relu", "f"],
    ["card", "new", "--name", "x", "--data", "loop"],
    *([*command, "loop", "new"] for command in (["export"], ["convert"], ["pack"])),
    *(["generate", "model", "x", *TOKENIZER, "--json", out] for out in ("d", "f", "f/x")),
    *(["decode", "model", "x", *TOKENIZER, "--backend", "xla", "--json", out] for out in ("d", "f", "f/x", "new")),
    *(["eval", "model", *TOKENIZER, "--tasks", "x", "--out", out] for out in ("f", "f/x")),
    *(["demo", "--out", out] for out in ("f", "f/x", "loop")),
    *(["sparsity", "model", "d", "--out", out] for out in ("f", "f/x", "new")),
    *(["held-out", "model", "d", "--json", out] for out in ("d", "f", "new")),
    *(["quality", "model", "d", "--json", out] for out in ("d", "f", "new")),
    *(["bench", "--json", out] for out in ("d", "f")),
    *(["eval-data", "--out", out] for out in ("f", "f/x")),
    *(["prepare", "d", *TOKENIZER, "--out", out] for out in ("f", "f/x", "d", "new")),
    *(["teacher-cache", "--teacher", "model", "--tokens", tokens] for tokens in ("d", "f")),
    *(["train", "--config", "falcon_40b", "--out", out] for out in ("f", "f/x")),
    *([*PLAN, option, out] for option in ("--text", "--json") for out in ("d", "f", "f/x")),
    *(["predictor", "record", "model", "d", out] for out in ("d", "f", "new")),
    *(["predictor", "fit", "model", "d", out] for out in ("d", "f", "new")),
    ["predictor", "fit", "model", "d", "d", "--overwrite"],
    *([*CALIBRATE, out, "--kl", "1"] for out in ("d", "f", "new")),
    *(["predictor", "import", "model", "d", out] for out in ("d", "f", "new")),
    *(["predictor", "export", "model", "f", out] for out in ("d", "f", "new")),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    save_params(folder / "model", CONFIG, random_params(CONFIG))
    return folder / "model"


@pytest.fixture
def home(model, tmp_path, monkeypatch):
    """A folder of the user's."""
    monkeypatch.chdir(tmp_path)
    for folder in ("d/in", "new.partial", "d.partial", "hf"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "it").write_text("mine")
    (tmp_path / "f").write_text("mine")
    (tmp_path / "hf" / "config.json").write_text("{")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("nothing")
    (tmp_path / "model").symlink_to(model)
    return tmp_path


def test_nothing_that_the_user_had_is_gone_after_a_command_that_fails(home, model, capsys):
    before = tree(home) | tree(model)
    for arguments in REFUSED:
        status = main(arguments)
        said = capsys.readouterr().err
        assert status in (1, 2), arguments
        assert said.startswith("falcon-relu "), arguments
        assert said.strip().count("\n") == 0, said
        assert tree(home) | tree(model) == before, arguments


@contextlib.contextmanager
def held(lock):
    """A lock that another thread holds, as another process would."""
    inside, done = threading.Event(), threading.Event()

    def hold():
        with lock:
            inside.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    yield
    done.set()
    thread.join()


def test_what_another_command_writes_is_refused_before_the_work(home, capsys):
    for arguments in (
        ["convert", "hf", "new"],
        ["export", "model", "new"],
        ["pack", "model", "new"],
        ["card", "new", "--name", "x"],
        ["eval", "model", *TOKENIZER, "--tasks", "x", "--out", "new"],
        ["demo", "--out", "new"],
        ["eval-data", "--out", "new"],
        ["predictor", "record", "model", "d", "new"],
        ["predictor", "export", "model", "f", "new"],
        ["decode", "model", "x", *TOKENIZER, "--json", "new"],
    ):
        with held(lock(home / "new")):
            assert main(arguments) == 1
        assert "new is being written by another process" in " ".join(capsys.readouterr().err.split()), arguments
    assert not list(home.glob(".*"))


def test_overwrite_replaces_a_file_and_what_such_a_command_made(home, capsys):
    assert main(["export", "model", "new"]) == 0
    (home / "new" / "config.json").write_text("old")
    assert main(["export", "model", "new"]) == 1
    assert (home / "new" / "config.json").read_text() == "old"
    assert main(["export", "model", "new", "--overwrite", "--json", "f"]) == 0
    assert json.loads((home / "new" / "config.json").read_text())["activation"] == "relu"
    assert json.loads((home / "f").read_text())["files"] == 1
    assert not list(home.glob(".*"))


def test_names_are_printed_as_they_are_and_devices_are_written_through(home, capsys):
    for name in ("card[final].md", "[/b].md", ":smile:.md"):
        assert main(["card", name, "--name", "[bold]x", "--json", "/dev/null"]) == 0
        assert f"card     {name}\n" in capsys.readouterr().out
        assert (home / name).is_file()
    assert not Path("/dev/null").is_file()


TERMINALS = {
    "closed output": ('"$@" >&-', 0, ""),
    "closed input": ('"$@" <&-', 0, "card     ?.md"),
    "no reader": ('("$@"; echo $? >status) | true; exit $(cat status)', 141, ""),
    "full disk": ('"$@" >/dev/full', 1, "falcon-relu card: No space left on device"),
}


@pytest.mark.parametrize("name", TERMINALS)
def test_odd_terminals_end_quietly_with_the_work_done(name, home):
    shell, status, says = TERMINALS[name]
    command = [sys.executable, "-m", "falcon_relu", "card", "鷹.md", "--name", "x", "--json", "figures.json"]
    environment = os.environ | {"PYTHONIOENCODING": "latin-1", "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(["sh", "-c", shell, "sh", *command], capture_output=True, env=environment, check=False)
    said = (done.stdout + done.stderr).decode("latin-1")
    assert done.returncode == status, said
    assert "Traceback" not in said
    assert says in said
    assert (home / "鷹.md").is_file()
    assert json.loads((home / "figures.json").read_text())["card"] == "鷹.md"


def test_an_argument_that_is_not_text_is_refused_in_one_line(home, capsys):
    for arguments in (["decode", "model", "caf\udce9", *TOKENIZER], ["convert", "caf\udce9", "new"]):
        assert main(arguments) == 2
        assert capsys.readouterr().err.strip().endswith(r"is not UTF-8 text, from character 4 on: 'caf\udce9'")


def test_parts_are_for_one_process_each(tmp_path):
    with held(lock_part(tmp_path / "out", 0, 2)):
        with lock_part(tmp_path / "out", 1, 2):
            pass
        for part in ((0, 2), (0, 1)):
            with pytest.raises(Exception, match="another process"), lock_part(tmp_path / "out", *part):
                pytest.fail("two did the same part")
    with lock_part(tmp_path / "out", 0, 1):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("limit", "amount", "says"), [("AS", 1 << 30, "1.1 GB here"), ("NOFILE", 12, "only 12 files")])
def test_limits_under_which_libraries_abort_are_said_before_the_work(limit, amount, says, home, monkeypatch, capsys):
    found = {getattr(resource, f"RLIMIT_{limit}"): (amount, amount)}
    endless = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda which: found.get(which, endless))
    monkeypatch.setattr(resource, "setrlimit", lambda which, pair: None)
    assert main(["convert", "hf", "new"]) == 1
    assert says in capsys.readouterr().err
