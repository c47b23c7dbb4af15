"""Files of the Hugging Face layout: from a folder or hub id to named tensors one at a time, and back to shards.

Nothing read here is trusted: no code of a checkpoint runs, and no path in it leads out of its folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from falcon_relu.errors import FalconError
from falcon_relu.files import read_json, write_json

_SAFETENSORS, _BIN = "model.safetensors", "pytorch_model.bin"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@.+)?")


@dataclasses.dataclass(frozen=True)
class Header:
    """What is known of a stored tensor without reading it: its file, shape and dtype."""

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype


def locate(source: str | Path) -> Path:
    """The folder of a checkpoint, weights not yet in it where it is on the hub.

    Args:
      source: a folder, or the hub id `owner/name` or `owner/name@revision`. The hub's cache is used when offline.

    Raises:
      FalconError: `source` is neither, or the hub does not give it.
    """
    return Path(source) if Path(source).is_dir() else _download(str(source))


def fetch_weights(source: str | Path) -> Path:
    """As `locate`, weights included: safetensors where there are any, else `.bin` files; nothing else.

    Raises:
      FalconError: as `locate`.
    """
    if Path(source).is_dir():
        return Path(source)
    if index := _index(_download(str(source))):
        return _download(str(source), *sorted(set(index.values())))
    folder = _download(str(source), _SAFETENSORS)
    return folder if (folder / _SAFETENSORS).exists() else _download(str(source), _BIN)


def _download(source: str, *files: str) -> Path:
    if not _HUB_ID.fullmatch(source):
        raise FalconError(f"{source} is neither a folder nor the id of a model on the hub (owner/name)")
    from huggingface_hub import snapshot_download

    name, _, revision = source.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=["*.json", *files]))
    except Exception as error:  # whatever the hub client raises: offline, no such model, no access, disk full
        reason = str(error).strip().splitlines()[0]
        raise FalconError(f"{source} is no folder here, and the hub does not give it: {reason}") from error


def read_headers(folder: Path) -> dict[str, Header]:
    """Every tensor of a checkpoint, file by file; opens each file but reads no tensor.

    Raises:
      FalconError: there are no weights, a file is missing or damaged, a tensor is doubled or of a dtype other than
        float32, float16 and bfloat16, or the index and the files contradict each other.
    """
    index = _index(folder)
    if index is None:
        files = [folder / name for name in (_SAFETENSORS, _BIN) if (folder / name).exists()][:1]
        if not files:
            raise FalconError(f"{folder} holds no {_SAFETENSORS}, no {_BIN} and no index of either")
    else:
        files = [folder / name for name in sorted(set(index.values()))]
    headers: dict[str, Header] = {}
    for file in files:
        with _open(file) as tensors:
            for name, (shape, dtype, _) in tensors.items():
                if name in headers:
                    raise FalconError(f"{name} is doubled: in {headers[name].file.name} and in {file.name}")
                headers[name] = Header(file, shape, dtype)
    if index is not None:
        placed = {name: header.file.name for name, header in headers.items()}
        if wrong := sorted(name for name in index.keys() | placed.keys() if index.get(name) != placed.get(name)):
            name = wrong[0]
            raise FalconError(
                f"the index has {name} in {index.get(name, 'no file')}, "
                f"but it is in {placed.get(name, 'no file')} ({len(wrong)} such)"
            )
    return headers


def read_tensors(headers: Mapping[str, Header]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors one at a time, file by file; only one file is open at a time, and each array is valid until the next.

    Raises:
      FalconError: a file is damaged.
    """
    for file in dict.fromkeys(header.file for header in headers.values()):
        with _open(file) as tensors:
            for name, (_, _, read) in tensors.items():
                if name in headers:
                    yield name, read()


def write_shards(
    folder: Path,
    sizes: Mapping[str, int],
    read: Callable[[str], np.ndarray],
    max_shard_bytes: int,
) -> None:
    """Writes safetensors shards and their index, one shard in memory at a time.

    Args:
      folder: where to.
      sizes: the tensors in order, and the bytes of each.
      read: gives a tensor by name.
      max_shard_bytes: size that no shard exceeds unless a single tensor does.
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


_Tensors = dict[str, tuple[tuple[int, ...], np.dtype, Callable[[], np.ndarray]]]  # shape, dtype, read


def _index(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file name, from the index of the preferred format; None where the weights are one file."""
    for weights in (_SAFETENSORS, _BIN):
        path = folder / f"{weights}.index.json"
        if path.exists():
            index = read_json(path)
            files = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(files, dict) or not files:
                raise FalconError(f"{path} has no weight_map")
            suffix = Path(weights).suffix
            for file in files.values():
                if not isinstance(file, str) or Path(file).name != file or not file.endswith(suffix):
                    raise FalconError(f"{path} names {file!r}, which is not a {suffix} file beside it")
            return files
        if (folder / weights).exists():
            return None
    return None


@contextlib.contextmanager
def _open(file: Path) -> Iterator[_Tensors]:
    if not file.is_file():
        raise FalconError(f"{file} does not exist; the checkpoint is not whole")
    with _open_safetensors(file) if file.suffix == ".safetensors" else _open_bin(file) as tensors:
        yield tensors


@contextlib.contextmanager
def _open_safetensors(file: Path) -> Iterator[_Tensors]:
    try:
        opened = safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise FalconError(f"{file} is damaged or cut short: {error}") from error
    with opened as stored:
        tensors: _Tensors = {}
        for name in stored.keys():  # noqa: SIM118 - not a dict
            part = stored.get_slice(name)
            dtype = _dtype(file, name, _DTYPES.get(part.get_dtype(), part.get_dtype()))
            tensors[name] = tuple(part.get_shape()), dtype, functools.partial(stored.get_tensor, name)
        yield tensors


@contextlib.contextmanager
def _open_bin(file: Path) -> Iterator[_Tensors]:
    """A .bin file is a pickle: torch's weights-only loader, which runs no code of it, maps the tensors from disk."""
    try:
        import torch
    except ImportError:
        raise FalconError(f"{file} needs torch to be read; install falcon-relu[parity], or get safetensors") from None
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many classes for a damaged or malicious file
        raise FalconError(f"{file} is not a plain torch weights file: {str(error).splitlines()[0]}") from error
    tensors: _Tensors = {}
    for name, tensor in stored.items() if isinstance(stored, dict) else ():
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
            raise FalconError(f"{file}: {name} is a {type(tensor).__name__}, not a dense tensor")
        dtype = _dtype(file, name, str(tensor.dtype).removeprefix("torch."))
        tensors[name] = tuple(tensor.shape), dtype, functools.partial(_as_numpy, tensor)
    yield tensors


def _as_numpy(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # numpy has no such type of its own
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _dtype(file: Path, name: str, dtype: str) -> np.dtype:
    if dtype not in _DTYPES.values():
        raise FalconError(f"{file}: {name} is of dtype {dtype}; only {', '.join(_DTYPES.values())} are read")
    return np.dtype(getattr(ml_dtypes, dtype, dtype))
