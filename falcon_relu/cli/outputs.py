"""The outputs of commands: one rule for all, checked before any work is done.

An existing output is never replaced unless `--overwrite` is given; then only a file, or a folder that such a command
made. A command that can be interrupted continues in its own folder. Two commands never write to one output at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from falcon_relu.errors import FalconError
from falcon_relu.files import check_output, lock


class Made(NamedTuple):
    """A file or folder that a command makes.

    Attributes:
      path: of the output.
      marker: the file that identifies a folder as made by such a command; None for a file.
      goes_on: whether the command continues in an existing folder.
      locked: whether to lock it during the command; False where the command has its own locks, as where several jobs
        write to one folder.
    """

    path: Path
    marker: str | None = None
    goes_on: bool = False
    locked: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """The arguments that all commands have."""

    json: Path | None = None
    """Also write the results to this file, as JSON."""
    overwrite: bool = False
    """Replace existing outputs: a file, or a folder that such a command made."""

    @property
    def several_processes(self) -> bool:
        """Whether several processes run the command together; the first of them then locks and reports."""
        return False

    def written(self) -> list[Made]:
        """What the command makes besides `json`."""
        return []


@contextlib.contextmanager
def reserved(output: Output) -> Iterator[None]:
    """Checks that all outputs of a command can be written, and locks them during the block if one process runs it.

    Raises:
      FalconError: as `check_output` and `lock`, or two outputs are the same.
    """
    made = _made(output)
    paths = [os.path.realpath(one.path) for one in made]
    if twice := [one.path for one, path in zip(made, paths, strict=True) if paths.count(path) > 1]:
        raise FalconError(f"{twice[0]} is named twice, for two things to write; choose another path for one of them")
    for one in made:
        replace = one.goes_on or output.overwrite
        check_output(one.path, folder=one.goes_on or one.marker is not None, replace=replace, marker=one.marker)
    with contextlib.nullcontext() if output.several_processes else locked(output):
        yield


@contextlib.contextmanager
def locked(output: Output) -> Iterator[None]:
    """Locks all outputs of a command during the block; of several processes that run it, only the first does this.

    Raises:
      FalconError: another command writes one of them.
    """
    with contextlib.ExitStack() as locks:
        for one in _made(output):
            if one.locked and (not one.path.exists() or one.path.is_dir() or one.path.is_file()):
                locks.enter_context(lock(one.path))
        yield


def _made(output: Output) -> list[Made]:
    return [*output.written(), *([Made(output.json)] if output.json is not None else [])]
