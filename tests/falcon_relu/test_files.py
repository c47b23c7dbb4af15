"""Files that are whole or not there, and what is never touched."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from falcon_relu.errors import FalconError
from falcon_relu.files import lock, read_text, regular_file, write_aside, write_json, write_text


def tree(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_what_the_user_had_stays(tmp_path, folder):
    (tmp_path / "d" / "in").mkdir(parents=True)
    (tmp_path / "d" / "in" / "it").write_text("mine")
    (tmp_path / "d.partial").mkdir()
    (tmp_path / "f").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("nothing")
    before = tree(tmp_path)
    wrong = ["loop", "nowhere", "f/x", "f/x/y", *(["f", "d"] if folder else ["d"])]
    for name in wrong:
        with pytest.raises(FalconError, match=name[0]), write_aside(tmp_path / name, folder=folder, replace=not folder):
            pytest.fail("the work began")
    with pytest.raises(ZeroDivisionError), write_aside(tmp_path / "new", folder=folder) as aside:  # noqa: PT012
        aside.mkdir() if folder else aside.touch()
        raise ZeroDivisionError
    assert tree(tmp_path) == before


def test_a_link_keeps_leading_to_what_is_written(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_devices_and_pipes_are_written_through(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True)
    write_json(tmp_path / "pipe", [1])
    assert reader.communicate(timeout=10)[0] == "[\n  1\n]\n"
    code = "from pathlib import Path; from falcon_relu.files import write_json; write_json(Path('/dev/stdout'), 7)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "7\n"
    with (tmp_path / "out").open("w") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "7\n"
    with pytest.raises(FalconError, match="device or pipe"):
        regular_file(tmp_path / "pipe")


def test_one_writer_at_a_time_and_the_next_when_it_is_dead(tmp_path):
    code = "import sys, time; from pathlib import Path; from falcon_relu.files import write_aside\n"
    code += "with write_aside(Path(sys.argv[1]), folder=True) as aside:\n"
    code += "    aside.mkdir(); (aside / 'half').touch(); print('in', flush=True); time.sleep(60)"
    target = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", code, target], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "in\n"
        with pytest.raises(FalconError, match="another process"), write_aside(target, folder=True):
            pytest.fail("two wrote at once")
        with pytest.raises(FalconError, match="another process"), lock(target):
            pytest.fail("two held the lock")
        first.kill()
    with write_aside(target, folder=True) as aside:
        assert not aside.exists()  # what the dead one left is gone
        aside.mkdir()
        (aside / "whole").touch()
    assert list(tree(tmp_path)) == ["out", "out/whole"]


def test_text_that_is_not_text_is_named(tmp_path):
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfa")
    assert read_text(tmp_path / "bom.txt") == "a"
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "large.txt").write_bytes(b"12345")
    for name, wrong in {"latin.txt": "not UTF-8", "large.txt": "5 bytes", "none.txt": "does not exist"}.items():
        with pytest.raises(FalconError, match=wrong):
            read_text(tmp_path / name, limit=4)
