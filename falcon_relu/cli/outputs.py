"""What a command writes: one rule for all, kept before any work is done.

What exists is never replaced, unless `--overwrite` says so; then a file by a file, and a folder that such a command
made by a folder. Folders of work that can be interrupted are gone on with. No two commands write the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, NamedTuple

from falcon_relu.errors import FalconError
from falcon_relu.files import check_output, lock


class Made(NamedTuple):
    """A file or folder that a command makes.

    Attributes:
      path: where.
      marker: the file by which a folder that such a command made is known; None for a file.
      goes_on: whether it is a folder that is gone on with where it exists.
      locked: whether to keep others from it; False where the work itself does, as where several jobs share a folder.
    """

    path: Path
    marker: str | None = None
    goes_on: bool = False
    locked: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """What the arguments of every command have in common."""

    json: Path | None = None
    """Also write the figures to this file."""
    overwrite: bool = False
    """Replace what is there already: a file, or a folder that such a command made."""

    several_processes: ClassVar[bool] = False  # that run the command as one; the work itself keeps others away

    def written(self) -> list[Made]:
        """What the command makes besides `json`."""
        return []


@contextlib.contextmanager
def reserved(output: Output) -> Iterator[None]:
    """Makes sure that all outputs of a command can be written, and keeps other commands from them during the block.

    Raises:
      FalconError: as `check_output` and `lock`, or two outputs are the same.
    """
    made = [*output.written(), *([Made(output.json)] if output.json is not None else [])]
    paths = [os.path.realpath(one.path) for one in made]
    if twice := [one.path for one, path in zip(made, paths, strict=True) if paths.count(path) > 1]:
        raise FalconError(f"{twice[0]} is named twice, for two things to write; choose another path for one of them")
    for one in made:
        replace = one.goes_on or output.overwrite
        check_output(one.path, folder=one.goes_on or one.marker is not None, replace=replace, marker=one.marker)
    with contextlib.ExitStack() as locks:
        for one in () if output.several_processes else made:
            if one.locked and (not one.path.exists() or one.path.is_dir() or one.path.is_file()):
                locks.enter_context(lock(one.path))
        yield
