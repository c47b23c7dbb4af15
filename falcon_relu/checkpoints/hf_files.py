"""Hugging Face checkpoints: reading named tensors one at a time from a folder or hub id, and writing shards.

Checkpoints are not trusted: no code in them runs, and no path in them is followed out of their folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from falcon_relu.checkpoints.hf_layout import HEAD
from falcon_relu.checkpoints.schema import read_as
from falcon_relu.checkpoints.torch_files import as_numpy, first_line, load_torch
from falcon_relu.errors import FalconError
from falcon_relu.files import regular_file, write_json
from falcon_relu.progress import console
from falcon_relu.sharding import Index

_SAFETENSORS, _BIN = "model.safetensors", "pytorch_model.bin"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@.+)?")


@dataclasses.dataclass(frozen=True)
class Header:
    """A stored tensor as its file describes it, before it is read."""

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    stored_name: str  # its name in the file


def locate(source: str | Path) -> Path:
    """The folder of a checkpoint; of one on the hub, only the JSON files are downloaded.

    Args:
      source: a folder, or the hub id `owner/name` or `owner/name@revision`. The hub's cache is used when offline.

    Raises:
      FalconError: `source` is neither, or cannot be downloaded.
    """
    return Path(source) if Path(source).is_dir() else _download(str(source))


def fetch_weights(source: str | Path) -> Path:
    """As `locate`, and downloads the weights: model.safetensors, else its shards, else the same of `.bin`.

    Raises:
      FalconError: as `locate`.
    """
    if Path(source).is_dir():
        return Path(source)
    folder = Path()
    for weights in (_SAFETENSORS, _BIN):
        folder = _download(str(source), weights)
        if os.path.lexists(folder / weights):
            break
        if (index := _index(folder, weights)) is not None:
            return _download(str(source), *sorted(set(index.values())))
    return folder


def _download(source: str, *files: str) -> Path:
    if os.path.lexists(source):
        raise FalconError(f"{source} is not a folder; give the folder that holds the checkpoint")
    if not _HUB_ID.fullmatch(source):
        raise FalconError(f"{source} is neither a folder nor the id of a model on the hub (owner/name)")
    from huggingface_hub import snapshot_download

    name, _, revision = source.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=["*.json", *files]))
    except Exception as error:  # the hub client raises many types: offline, no such model, no access, disk full
        raise FalconError(
            f"{source} is not a folder, and cannot be downloaded from the hub: {first_line(error)}"
        ) from error


def read_headers(folder: Path) -> dict[str, Header]:
    """The headers of all tensors of a checkpoint, file by file; no tensor is read.

    The files are those that transformers reads: model.safetensors, else the shards of its index, else the same of .bin.
    A head that the index lists but no shard has is left out: transformers writes such an index for tied models.

    Raises:
      FalconError: there are no weights, a file is missing or damaged, a tensor is stored twice or of a dtype other than
        float32, float16 and bfloat16, or the index and the files contradict each other.
    """
    weights = next((w for w in (_SAFETENSORS, _BIN) if any(map(os.path.lexists, _places(folder, w)))), None)
    if weights is None:
        raise FalconError(f"{folder} holds no {_SAFETENSORS}, no {_BIN} and no index of either")
    index = None
    if os.path.lexists(folder / weights):
        files = [folder / weights]
        _report_unused_shards(folder, weights)
    else:
        index = _index(folder, weights) or {}
        files = [folder / name for name in sorted(set(index.values()))]
    headers: dict[str, Header] = {}
    for file in files:
        with _open(file) as tensors:
            for name, (shape, dtype, _) in tensors.items():
                if name in headers:
                    raise FalconError(f"{name} is stored twice: in {headers[name].file.name} and in {file.name}")
                headers[name] = Header(file, shape, dtype, name)
    if index is not None:
        placed = {name: header.file.name for name, header in headers.items()}
        if HEAD not in placed:
            index.pop(HEAD, None)
        if wrong := sorted(name for name in index.keys() | placed.keys() if index.get(name) != placed.get(name)):
            name = wrong[0]
            raise FalconError(
                f"the index has {name[:80]} in {index.get(name, 'no file')}, "
                f"but it is in {placed.get(name, 'no file')} ({len(wrong)} such)"
            )
    return headers


class TensorReader:
    """Reads tensors, or parts of them, with one file open at a time: fastest in the order of the headers."""

    def __init__(self, headers: Mapping[str, Header]):
        self._headers = headers
        self._file: Path | None = None
        self._tensors: _Tensors = {}
        self._open = contextlib.ExitStack()

    def close(self) -> None:
        """Closes the file."""
        self._file = None
        self._open.close()

    def read(self, name: str, part: Index | None = None) -> np.ndarray:
        """A tensor, or a part of it, of which nothing else is read; valid until the next one is read.

        Raises:
          FalconError: the file is damaged.
        """
        header = self._headers[name]
        if header.file != self._file:
            self.close()
            self._tensors = self._open.enter_context(_open(header.file))
            self._file = header.file
        return self._tensors[header.stored_name][2](part)


def write_shards(
    folder: Path,
    sizes: Mapping[str, int],
    read: Callable[[str], np.ndarray],
    max_shard_bytes: int,
) -> None:
    """Writes safetensors shards and their index, one shard in memory at a time.

    Args:
      folder: the folder to write to.
      sizes: the tensors' sizes in bytes, by name, in the order in which they are written.
      read: returns the tensor of a name.
      max_shard_bytes: maximum size of a shard, which only a shard of a single tensor exceeds.
    """
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > max_shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    stem, suffix = _SAFETENSORS.split(".")
    index: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = _SAFETENSORS if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}"
        # transformers asks for the format note
        save_file({name: np.ascontiguousarray(read(name)) for name in names}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(sizes.values())
        write_json(folder / f"{_SAFETENSORS}.index.json", {"metadata": {"total_size": total}, "weight_map": index})


# By name: shape, dtype, and what reads the tensor or a part of it.
_Tensors = dict[str, tuple[tuple[int, ...], np.dtype, Callable[[Index | None], np.ndarray]]]


def _places(folder: Path, weights: str) -> tuple[Path, Path]:
    """The path of weights in a single file, and that of the index of several files."""
    return folder / weights, folder / f"{weights}.index.json"


@dataclasses.dataclass(frozen=True)
class _Index:
    """model.safetensors.index.json or pytorch_model.bin.index.json: tensor name -> file name."""

    weight_map: dict[str, str]


def _index(folder: Path, weights: str) -> dict[str, str] | None:
    """Tensor name -> file name, from the index of `weights`; None where there is none.

    Raises:
      FalconError: it is not valid, or names a file outside its folder.
    """
    path = _places(folder, weights)[1]
    if not os.path.lexists(path):
        return None
    files = read_as(_Index, path, unknown_keys=True).weight_map
    if not files:
        raise FalconError(f"{path} has an empty weight_map")
    suffix = Path(weights).suffix
    for file in files.values():
        if Path(file).name != file or not file.endswith(suffix):
            raise FalconError(f"{path} names {file[:80]!r}, which is not a {suffix} file beside it")
    return files


def _report_unused_shards(folder: Path, weights: str) -> None:
    """Prints which weights are used where a folder has both a single file and an index of other files."""
    single, path = _places(folder, weights)
    if os.path.lexists(path) and set((_index(folder, weights) or {}).values()) - {single.name}:
        text = f"{single} is used, as transformers does; the shards that {path.name} lists beside it are not"
        console.print(text, soft_wrap=True)


@contextlib.contextmanager
def _open(file: Path) -> Iterator[_Tensors]:
    if not os.path.lexists(file):
        raise FalconError(f"{file} does not exist; the checkpoint is not whole")
    regular_file(file)
    with _open_safetensors(file) if file.suffix == ".safetensors" else _open_bin(file) as tensors:
        yield tensors


@contextlib.contextmanager
def _open_safetensors(file: Path) -> Iterator[_Tensors]:
    try:
        opened = safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise FalconError(f"{file} is damaged or cut short: {first_line(error)}") from error
    with opened as stored:
        tensors: _Tensors = {}
        for name in stored.keys():  # noqa: SIM118 - not a dict
            part = stored.get_slice(name)
            dtype = _dtype(file, name, _DTYPES.get(part.get_dtype(), part.get_dtype()))
            tensors[name] = tuple(part.get_shape()), dtype, functools.partial(_read_safetensors, stored, name)
        yield tensors


@contextlib.contextmanager
def _open_bin(file: Path) -> Iterator[_Tensors]:
    tensors: _Tensors = {}
    for name, tensor in load_torch(file).items():
        dtype = _dtype(file, name, str(tensor.dtype).removeprefix("torch."))
        tensors[name] = tuple(tensor.shape), dtype, functools.partial(_read_bin, tensor)
    yield tensors


def _read_safetensors(stored: Any, name: str, part: Index | None) -> np.ndarray:
    array: np.ndarray = stored.get_tensor(name) if part is None else stored.get_slice(name)[part]
    return array


def _read_bin(tensor: Any, part: Index | None) -> np.ndarray:
    return as_numpy(tensor if part is None else tensor[part].contiguous())


def _dtype(file: Path, name: str, dtype: str) -> np.dtype:
    if dtype not in _DTYPES.values():
        raise FalconError(f"{file}: {name[:80]!r} is of dtype {dtype}; only {', '.join(_DTYPES.values())} are read")
    return np.dtype(getattr(ml_dtypes, dtype, dtype))
