"""Answers of an evaluation on disk, so that a killed one goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from falcon_relu.files import regular_file
from falcon_relu.progress import console


class Journal:
    """Answers by key, kept as JSON lines of key, answer and a checksum of both.

    A line that does not agree with its checksum is left out, and what it answered is asked again. One that a killed
    process left unfinished at the end is removed.

    Args:
      path: the file, made if it is not there; in memory alone if None.
      write: whether this process adds to the file. One process may at a time; see `falcon_relu.files.lock`.

    Raises:
      FalconError: the path leads to something that is no file.
    """

    def __init__(self, path: Path | None = None, *, write: bool = True):
        self._answers: dict[str, Any] = {}
        self._file = None
        if path is None:
            return
        unfinished = b""
        if path.exists() or path.is_symlink():
            *lines, unfinished = regular_file(path).read_bytes().split(b"\n")
            found = [pair for line in lines if (pair := _parse(line)) is not None]
            self._answers = dict(found)
            if damaged := len(lines) - len(found):
                note = (
                    f"{path}: {damaged} of {len(lines)} lines damaged and left out; what they answered is asked again"
                )
                console.print(note, style="yellow", soft_wrap=True)
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
            self._file.truncate(self._file.tell() - len(unfinished))

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Any:
        return self._answers[key]

    def add(self, answers: Mapping[str, Any]) -> None:
        """Keeps new answers, which JSON must give back as they are; they are on disk when this returns."""
        self._answers.update(answers)
        if self._file is not None:
            lines = (json.dumps([key, answer, _checksum(key, answer)]) + "\n" for key, answer in answers.items())
            self._file.write("".join(lines).encode())
            self._file.flush()
            os.fsync(self._file.fileno())


def _parse(line: bytes) -> tuple[str, Any] | None:
    try:
        key, answer, checksum = json.loads(line)
    except (ValueError, TypeError, RecursionError):
        return None
    return (key, answer) if checksum == _checksum(key, answer) else None


def _checksum(key: Any, answer: Any) -> str:
    return hashlib.blake2b(json.dumps([key, answer]).encode(), digest_size=4).hexdigest()
