"""Folders of runs that were edited, damaged or half-written are refused in one line, or gone on with.

Nothing that the user had may be gone afterwards, and no result may differ from that of the undamaged folder.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

import train.loop
from falcon_relu.cli import main
from falcon_relu.errors import FalconError
from falcon_relu.files import write_json
from tests.train.processes import write_config
from tests.train.runs import config_of, make_data
from train.folder.log import RunLog, read_log
from train.job import Job

Damage = Callable[[Path], None]
REFUSED, GOES_ON = "refused", "goes on"


def write(name: str, content: bytes | str) -> Damage:
    def damage(out: Path) -> None:
        (out / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def add(name: str, content: bytes) -> Damage:
    """Puts bytes behind the first line of a file."""

    def damage(out: Path) -> None:
        first, rest = (out / name).read_bytes().split(b"\n", 1)
        (out / name).write_bytes(first + b"\n" + content + rest)

    return damage


def half(name: str) -> Damage:
    def damage(out: Path) -> None:
        content = (out / name).read_bytes()
        (out / name).write_bytes(content[: len(content) // 2])

    return damage


def edit(name: str, **changes: object) -> Damage:
    def damage(out: Path) -> None:
        (out / name).write_text(json.dumps(json.loads((out / name).read_text()) | changes))

    return damage


def without(name: str, key: str) -> Damage:
    def damage(out: Path) -> None:
        value = json.loads((out / name).read_text())
        del value[key]
        (out / name).write_text(json.dumps(value))

    return damage


def instead(name: str, make: Callable[[Path], None]) -> Damage:
    def damage(out: Path) -> None:
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        make(path)

    return damage


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def digit(name: str, after: str) -> Damage:
    """Changes the first digit behind a text."""

    def damage(out: Path) -> None:
        text = (out / name).read_text()
        place = next(i for i in range(text.index(after) + len(after), len(text)) if text[i].isdigit())
        (out / name).write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])

    return damage


def empty_checkpoints(out: Path) -> None:
    for path in (out / "checkpoints").iterdir():
        instead(f"checkpoints/{path.name}", FOLDER)(out)


def without_checkpoints(out: Path) -> None:
    write("metrics.json", '{"loss": 1.0}')(out)
    instead("checkpoints", lambda path: None)(out)


LATIN = '{"step": 1, "loss": "é"}\n'.encode("latin-1")
FACTS = "checkpoints/3/facts/metadata"
NO_JSON = ("[]", "3", '"text"', "null", "", "{", "\0" * 64, LATIN, "[" * 100_000, "NaN")
PIPE, FOLDER, NOTHING, LOOP = os.mkfifo, Path.mkdir, link_to("gone"), link_to("config.json")

TABLE: list[tuple[str, str, Damage]] = [
    *(("config.json", REFUSED, write("config.json", content)) for content in (*NO_JSON, "{}")),
    *(
        ("config.json|other settings", REFUSED, edit("config.json", **changes))
        for changes in (
            {"steps": "4"},
            {"steps": 4.5},
            {"steps": 10**30},
            {"seed": 1},
            {"compute_dtype": "int4"},
            {"data": None},
            {"data": {"sources": {}}},
            {"optimizer": {"learning_rate": 1e-9}},
            {"nonsense": 1},
            {"out": 3},
            {"mesh": [1, 2]},
        )
    ),
    *(("config.json", REFUSED, instead("config.json", make)) for make in (PIPE, FOLDER, NOTHING, LOOP)),
    *(("architecture.json", REFUSED, write("architecture.json", content)) for content in (*NO_JSON, "{}")),
    *(
        ("architecture.json", REFUSED, edit("architecture.json", **changes))
        for changes in (
            {"n_layers": 10**9},
            {"d_ff": 128},
            {"norm_eps": 1e-6},
            {"norm_eps": "1e-5"},
            {"rope_theta": 0},
            {"activation": "relu"},
            {"activation": "silu"},
            {"vocab_size": -1},
            {"nonsense": True},
        )
    ),
    *(("architecture.json", REFUSED, instead("architecture.json", make)) for make in (PIPE, FOLDER, NOTHING)),
    ("architecture.json", REFUSED, instead("architecture.json", lambda path: None)),
    *(("metrics.json", REFUSED, write("metrics.json", content)) for content in (*NO_JSON, "{}", '{"loss": "low"}')),
    *(("metrics.json", REFUSED, instead("metrics.json", make)) for make in (PIPE, FOLDER, NOTHING)),
    ("", GOES_ON, write("metrics.json", '{"loss": 1.0}')),  # finished, but the weights are gone
    ("neither its weights nor a checkpoint", REFUSED, without_checkpoints),
    *(
        ("log.jsonl:2", GOES_ON, add("log.jsonl", content))
        for content in (b"[1]\n", b"7\n", b'{"step": 2\n', LATIN[1:])
    ),
    *(
        ("log.jsonl:2", GOES_ON, add("log.jsonl", content))
        for content in (b'{"step": "2"}\n', b'{"step": -1}\n', b"\0\xff\n", b'{"loss": 1}\n', b"null\n")
    ),
    ("log.jsonl:", GOES_ON, half("log.jsonl")),
    *(("log.jsonl", REFUSED, instead("log.jsonl", make)) for make in (PIPE, FOLDER, NOTHING)),
    ("", GOES_ON, write("starts.jsonl", b'{"step": 0, "ti')),
    ("", GOES_ON, write("starts.jsonl", LATIN)),
    ("starts.jsonl", REFUSED, instead("starts.jsonl", FOLDER)),
    *(("checkpoints", REFUSED, instead("checkpoints", make)) for make in (Path.touch, PIPE, NOTHING)),
    *((name, REFUSED, instead(name, Path.touch)) for name in ("weights", "tensorboard")),
    ("checkpoints/3 is damaged", GOES_ON, digit(FACTS, '"position"')),
    ("checkpoints/3 is damaged", GOES_ON, digit(FACTS, '"checksum"')),
    ("checkpoints/3 is damaged", GOES_ON, digit(FACTS, '"d_model"')),
    ("checkpoints/3 is damaged", GOES_ON, digit(FACTS, '"learning_rate"')),
    ("checkpoints/3 is damaged", GOES_ON, digit(FACTS, '"source 0"')),
    ("checkpoints/3 is damaged", GOES_ON, without(FACTS, "checksum")),
    ("checkpoints/3 is damaged", GOES_ON, half(FACTS)),
    *(("checkpoints/3 is damaged", GOES_ON, write(FACTS, content)) for content in ("[]", "3", "{}", "")),
    ("checkpoints/3 is damaged", GOES_ON, instead("checkpoints/3/state", FOLDER)),
    ("checkpoints/3 is damaged", GOES_ON, instead("checkpoints/3", FOLDER)),
    ("", GOES_ON, instead("checkpoints/notes", FOLDER)),
    ("", GOES_ON, instead("checkpoints/17", Path.touch)),
    ("none of the checkpoints", REFUSED, empty_checkpoints),
]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run that was stopped after 3 of 4 steps, and the log of one that was not.

    A step that only counts stands for the real one: what is read is the same, and nothing is compiled.
    """
    folder = tmp_path_factory.mktemp("begun")
    config = config_of(folder / "run", make_data(folder), steps=4, checkpoint_every=1, keep_checkpoints=3)

    def counting(self: Job):
        def step(state, batch, teacher):
            state = dataclasses.replace(state, step=state.step + 1)
            loss = batch["tokens_BxT"].sum().astype("float32")  # tells which rows came
            zero = state.bad_steps
            return state, {"loss": loss, "cross_entropy": loss, "zeros": loss, "bad_steps": zero, "skipped": zero}

        return jax.jit(step, donate_argnums=0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "train_step", counting)
        patch.setattr(train.loop._Loop, "validate", lambda self, state, step: self._log.last)
        whole = dataclasses.replace(config, out=folder / "whole")
        train.loop.run(whole)
        train.loop.run(config)
        for name in ("metrics.json", "weights", "checkpoints/4"):
            instead(name, lambda path: None)(config.out)
        lines = (config.out / "log.jsonl").read_text().splitlines(keepends=True)
        (config.out / "log.jsonl").write_text("".join(lines[:3]))
        yield config, losses(whole.out)


def losses(out: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines]


def tree(out: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_folders_that_are_not_as_they_were_left(begun, tmp_path, caplog):
    config, expected = begun
    assert len(TABLE) >= 60
    problems = []
    for number, (named, outcome, damage) in enumerate(TABLE):
        out = tmp_path / str(number)
        shutil.copytree(config.out, out)
        write_json(out / "config.json", dataclasses.replace(config, out=out).as_json())
        damage(out)
        before = tree(out)
        caplog.clear()
        try:
            train.loop.run(dataclasses.replace(config, out=out))
            said, found = GOES_ON, losses(out)
            # the same rows as if nothing had happened; only what was damaged may be missing from the log
            good = found == [line for line in expected if line in found] and found[-1] == expected[-1]
            good &= named in caplog.text
        except FalconError as error:
            said = f"{REFUSED}: {error}"
            good = re.search(named, str(error)) is not None and "\n" not in str(error) and tree(out) == before
        except Exception as error:
            said, good = f"{type(error).__name__}: {error}", False
        if not said.startswith(outcome) or not good:
            problems.append(f"case {number} ({named}): {said}"[:300])
        shutil.rmtree(out)
    assert not problems, "\n".join(problems)


HOLDS = """
import sys, time
from pathlib import Path
from falcon_relu.files import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_beside_the_first_is_refused_and_goes_on_when_that_is_dead(begun, tmp_path, capsys):
    config, expected = begun
    out = tmp_path / "run"
    shutil.copytree(config.out, out)
    module = write_config(dataclasses.replace(config, out=out))
    before = tree(out)
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(out)], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        assert main(["train", "--config", str(module)]) == 1
        assert "is being written by another process" in " ".join(capsys.readouterr().err.split())
        assert tree(out) == before
        first.kill()
    assert main(["train", "--config", str(module)]) == 0
    assert losses(out) == expected


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (Path.touch, "is a file"),
        (link_to("gone"), "is a link to nothing"),
        (os.mkfifo, "is a file"),
        (lambda path: path.parent.rmdir() or path.parent.touch(), "is not a folder"),
    ],
)
def test_a_run_cannot_begin_where_no_folder_can_be(begun, tmp_path, make, says):
    config, _ = begun
    out = tmp_path / "parent" / "run"
    out.parent.mkdir()
    make(out)
    with pytest.raises(FalconError, match=says):
        train.loop.run(dataclasses.replace(config, out=out))


def test_an_event_file_that_cannot_grow_is_an_error_and_not_a_wait_for_ever(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with RunLog(tmp_path, 0) as log, pytest.raises(FalconError, match=r"could not write .*tensorboard.*disk full"):
            [log.steps(step, {"zeros": [0.5] * 100}) for step in range(1, 1000)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_log(tmp_path / "log.jsonl")
