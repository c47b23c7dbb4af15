"""A journal keeps what is whole, whatever else became of its file, and never gives an answer that was not written."""

from __future__ import annotations

import json
import os
import random

import pytest

from falcon_relu.errors import FalconError
from falcon_relu.evaluation.journal import Journal

ANSWERS = {f"{i:032x}": "said\n\u2028 so" if i % 5 == 0 else [-i / 7, i % 2 == 0] for i in range(50)}


@pytest.fixture
def path(tmp_path):
    journal = Journal(tmp_path / "answers.jsonl")
    for key, answer in ANSWERS.items():
        journal.add({key: answer})
    return tmp_path / "answers.jsonl"


def kept(path) -> dict:
    journal = Journal(path)
    return {key: journal[key] for key in ANSWERS if key in journal}


def test_answers_come_back(path):
    assert kept(path) == ANSWERS


@pytest.mark.parametrize("seed", range(60))
def test_a_damaged_line_costs_its_own_answer(path, seed):
    """Bytes changed, put in or taken out of the file: the other answers stay, and none is another than was written."""
    rng, raw = random.Random(seed), bytearray(path.read_bytes())
    starts = [0] + [i + 1 for i, byte in enumerate(raw) if byte == 10]
    line = rng.randrange(50)
    start, end = starts[line], starts[line + 1] - 1
    at = rng.randrange(start, end)
    match seed % 5:
        case 0:
            raw[at] = (raw[at] + rng.randrange(1, 256)) % 256
        case 1:
            raw[at:at] = bytes(rng.randrange(256) for _ in range(9))
        case 2:
            del raw[at:end]
        case 3:
            raw[start:end] = rng.choice(
                [b"", b"[]", b"null", b"{}", b"3", b'["a", 1]', b"[" * 90_000, b'["k", 1, "c"]']
            )
        case 4:  # a digit of an answer
            del raw[start:end]
            key, answer, check = json.loads(path.read_bytes().split(b"\n")[line])
            changed = answer + "!" if isinstance(answer, str) else [answer[0] + 1, answer[1]]
            raw[start:start] = json.dumps([key, changed, check]).encode()
    path.write_bytes(raw)
    found = kept(path)
    assert len(ANSWERS) - 2 <= len(found)  # a new line break, or one gone, touches two lines at most
    assert all(ANSWERS[key] == answer for key, answer in found.items())
    Journal(path).add({"new": "answer"})
    assert Journal(path)["new"] == "answer"
    assert kept(path) == found


def test_an_unfinished_line_is_removed_and_the_next_is_whole(path):
    with path.open("ab") as file:
        file.write(b'["half a li')
    Journal(path).add({"next": "one"})
    assert Journal(path)["next"] == "one"
    assert kept(path) == ANSWERS


def test_what_is_said_to_be_on_disk_is(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append(os.fstat(file).st_size))
    Journal(tmp_path / "j").add({"a": "b"})
    assert flushed == [(tmp_path / "j").stat().st_size] != [0]


def test_only_a_file_is_a_journal(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe", "loop", ""):
        with pytest.raises(FalconError):
            Journal(tmp_path / name)
