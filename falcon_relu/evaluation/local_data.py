"""A folder of benchmark questions, read as data alone: nothing in it is run, rendered or followed out of the folder.

Datasets lie below it under their names on the hub, in the hub's layout. `task.json` in one of them may say which of its
splits take the place of others; prompts and scoring are always those of lm-eval's own tasks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from pydantic import StringConstraints

from falcon_relu.checkpoints.schema import parse, read_as
from falcon_relu.errors import FalconError
from falcon_relu.files import read_text, real_path, regular_file

TASK_FILE = "task.json"
_CARD, _BARE_CARD = "README.md", ".huggingface.yaml"  # where the datasets library looks for the layout
_CARD_LIMIT = 16 << 20  # bytes

_Split = Annotated[str, StringConstraints(pattern=r"^\w+$", max_length=100)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Splits:
    """Splits that a task reads in place of its own; None for one that is not there."""

    training_split: _Split | None = None
    validation_split: _Split | None = None
    test_split: _Split | None = None
    fewshot_split: _Split | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskFile:
    """What `task.json` may say.

    Attributes:
      settings: fields of `Splits` that differ from those of lm-eval's task.
      note: what is different about the questions, for the table of results.
    """

    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    note: Annotated[str, StringConstraints(max_length=1000)] = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Part:
    split: str
    path: str | list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Config:
    """An entry of a dataset card's `configs`, as far as it says which files are read."""

    data_files: str | list[str | _Part] | dict[str, str | list[str]] | None = None
    data_dir: str | None = None

    def paths(self) -> Iterator[str]:
        """All paths and patterns in it."""
        found = self.data_files
        for entry in [found] if isinstance(found, str) else found.values() if isinstance(found, dict) else found or []:
            inner = entry.path if isinstance(entry, _Part) else entry
            yield from [inner] if isinstance(inner, str) else inner
        yield from [] if self.data_dir is None else [self.data_dir]


def local_task(data: Path, dataset: str) -> dict[str, Any] | None:
    """What an lm-eval task of `dataset` needs to read it from the folder `data`; None where it is not there.

    Raises:
      FalconError: the dataset's folder leads out of itself, or holds settings that a data folder may not have.
    """
    import datasets  # slow to import, and of the extra `eval`

    folder = data / dataset
    if not folder.is_dir():
        return None
    digest = _digest(folder)
    for config in _configs(folder):
        for pattern in config.paths():
            kinds = (PurePosixPath(pattern), PureWindowsPath(pattern))
            leaves = any(p.is_absolute() or p.drive or ".." in p.parts for p in kinds)
            if leaves or pattern.startswith("~") or "::" in pattern or "://" in pattern:
                raise FalconError(f"{folder / _CARD} names files outside of its folder: {pattern!r:.200}")
    # The library's own cache goes by the card alone: it would give the questions that a folder of this name once held.
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "falcon-relu" / digest
    settings = _task_file(folder).settings
    return {"dataset_path": str(real_path(folder)), "dataset_kwargs": {"cache_dir": str(cache)}} | settings


def local_note(data: Path, dataset: str) -> str:
    """What is different about a dataset in `data` from the hub's; empty if nothing.

    Raises:
      FalconError: as `local_task`.
    """
    return " ".join(_task_file(data / dataset).note.split())


def _task_file(folder: Path) -> TaskFile:
    path = folder / TASK_FILE
    if not os.path.lexists(path):
        return TaskFile()
    found = read_as(TaskFile, path)
    parse(Splits, found.settings, f"{path}, settings")
    return found


def _digest(folder: Path) -> str:
    """Of all files in a dataset, made sure to be regular ones inside of its folder."""
    root, digest = real_path(folder), hashlib.blake2b(digest_size=16)
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and not os.path.realpath(path).startswith(f"{root}{os.sep}"):
            raise FalconError(f"{path} leads out of the folder of its dataset; copy what it leads to (cp -rL)")
        if not path.is_dir():
            digest.update(
                f"{path.relative_to(folder)}\0{regular_file(path).stat().st_size}\0".encode(errors="surrogateescape")
            )
            with path.open("rb") as file:
                while piece := file.read(1 << 20):
                    digest.update(piece)
    return digest.hexdigest()


def _configs(folder: Path) -> Iterator[_Config]:
    for name in (_CARD, _BARE_CARD):
        path = folder / name
        if not os.path.lexists(path):
            continue
        text = read_text(path, limit=_CARD_LIMIT)
        if name == _CARD:
            block = REGEX_YAML_BLOCK.search(text)
            text = block.group(2) if block else ""
        try:
            found = yaml.load(text, Loader=_Plain) or {}
            configs = json.loads(json.dumps(found.get("configs") or [], default=str))
        except (yaml.YAMLError, AttributeError, TypeError, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise FalconError(f"{path} has a damaged description of its files (YAML): {reason:.200}") from None
        yield from parse(list[_Config], configs, f"{path}, configs", unknown_keys=True)


class _Plain(yaml.SafeLoader):
    """YAML of plain values: an alias could stand for gigabytes in a few bytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read here")
        return super().compose_node(parent, index)
