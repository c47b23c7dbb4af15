"""Files and folders that are either whole or not there."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from falcon_relu.errors import FalconError

_PARTIAL = ".partial"


@contextlib.contextmanager
def write_aside(target: Path, *, replace: bool = False, nbytes: int = 0) -> Iterator[Path]:
    """Yields a sibling path to write a file or folder to; renames it to `target` once the block succeeds.

    When the block raises, what was written is removed and `target` stays as it was. What a killed process left
    beside `target` is removed by the next call.

    Args:
      target: the finished file or folder.
      replace: whether an existing `target` may be replaced.
      nbytes: that the caller is about to write; large things fail before they begin.

    Raises:
      FalconError: `target` exists and may not be replaced, or the disk is too full.
    """
    target = Path(target)
    if target.exists() and not replace:
        raise FalconError(f"{target} exists already; choose another path or remove it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_path(target)
    remove(aside)
    free = shutil.disk_usage(target.parent).free
    if nbytes > free:
        raise FalconError(
            f"{target} takes {nbytes / 1e9:.3g} GB and {free / 1e9:.3g} GB are free there: "
            "make room, or choose another disk"
        )
    try:
        yield aside
        if target.is_dir():
            remove(target)  # a folder cannot be renamed over one that holds something
        aside.replace(target)
    except BaseException:
        remove(aside)
        raise


def aside_path(target: Path) -> Path:
    """Where `write_aside(target)` lets its caller write."""
    return target.with_name(target.name + _PARTIAL)


def write_json(target: Path, value: Any) -> None:
    """Writes `value` as indented JSON, replacing `target` in one step."""
    with write_aside(target, replace=True) as aside:
        aside.write_text(json.dumps(value, indent=2) + "\n")


def write_texts(target: Path, texts: Iterable[str]) -> None:
    """Writes one JSON object a line, {"text": ...}, as `falcon-relu prepare` reads it; `target` changes in one step."""
    with write_aside(target, replace=True) as aside, aside.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
      FalconError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise FalconError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FalconError(f"{path} is not valid JSON: {error}") from None


def remove(path: Path) -> None:
    """Removes a file or folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink()
