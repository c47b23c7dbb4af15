"""Decode weights on disk: a folder with a safetensors file for each layer, one for the rest, and a manifest.

The manifest holds the format's version, the model's config, the number formats, and a CRC-32 of every tensor and of
itself. Loading reads tensors in parallel into the huge pages from which decoding uses them. bf16 rows are stored as
uint16.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from safetensors.numpy import save_file

from falcon_relu.checkpoints.load import check_finite
from falcon_relu.checkpoints.schema import parse, read_sealed, write_sealed
from falcon_relu.config import FalconConfig
from falcon_relu.errors import FalconError
from falcon_relu.files import regular_file, write_aside
from falcon_relu.progress import progress
from infer.predictor.predictor import PredictorInput
from infer.weights.layout import DecodeWeights, Formats, skeleton
from infer.weights.memory import huge_empty, need_memory

_VERSION = 2
_MANIFEST = "decode.json"
_ADVICE = "pack the model again"
_HEADER_BYTES = 100_000_000  # limit of the safetensors format
_CHUNK = 64 << 20  # bytes that a thread reads before it adds them to the checksum
_READERS = 8
_DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {"F32": "f4", "F16": "f2", "U16": "u2", "U8": "u1", "I8": "i1", "I32": "i4"}.items()
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Manifest:
    """The fields of decode.json.

    Attributes:
      version: version of the format.
      config: the model's config.
      formats: number formats.
      ranks: R of each layer's predictor; empty without predictors.
      predictor_input: what the predictors read; None without predictors.
      crc32: checksum of every tensor's bytes, by the tensor's name.
    """

    version: Literal[2]
    config: FalconConfig
    formats: Formats
    ranks: tuple[int, ...]
    predictor_input: PredictorInput | None
    crc32: dict[str, int]

    def __post_init__(self) -> None:
        if len(self.ranks) not in (0, self.config.n_layers) or not all(1 <= R <= 1 << 20 for R in self.ranks):
            raise FalconError(f"ranks must be none or {self.config.n_layers} numbers from 1, got {self.ranks[:8]}")
        if bool(self.ranks) != (self.predictor_input is not None):
            raise FalconError(f"predictor_input {self.predictor_input!r} contradicts {len(self.ranks)} ranks")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Entry:
    """A tensor in the header of a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def is_decode_weights(path: Path) -> bool:
    """Whether `path` is a folder of decode weights."""
    return os.path.lexists(path / _MANIFEST)


def save_weights(weights: DecodeWeights, path: Path, *, replace: bool = False) -> None:
    """Writes decode weights; `path` exists only once they are complete.

    Raises:
      FalconError: `path` exists and may not be replaced.
    """
    leaves = dict(_named(weights))
    ranks = [layer.predictor.fc1.shape[0] for layer in weights.layers if layer.predictor is not None]
    manifest = {
        "version": _VERSION,
        "config": dataclasses.asdict(weights.config),
        "formats": dataclasses.asdict(weights.formats),
        "ranks": ranks,
        "predictor_input": weights.predictor_input,
    }
    checksums: dict[str, int] = {}
    files = sorted({_file(name) for name in leaves})
    with (
        write_aside(path, folder=True, replace=replace, marker=_MANIFEST, nbytes=weights.nbytes) as aside,
        progress(f"writing {path}", len(files), "files") as advance,
    ):
        aside.mkdir()
        for file in files:
            tensors = {name: np.asarray(leaf) for name, leaf in leaves.items() if _file(name) == file}
            save_file(tensors, aside / file)
            checksums |= {name: zlib.crc32(_bytes(tensor)) for name, tensor in tensors.items()}
            advance()
        write_sealed(aside / _MANIFEST, manifest | {"crc32": checksums})


def outline(path: Path) -> DecodeWeights:
    """Shapes and dtypes of stored decode weights, from their manifest.

    Raises:
      FalconError: `path` is not a folder of decode weights, or of another version.
    """
    return _manifest(path)[0]


def load_weights(path: Path) -> DecodeWeights:
    """Reads decode weights.

    Raises:
      FalconError: `path` is not a folder of decode weights, of another version, incomplete or damaged, or there is too
        little memory.
    """
    wanted, checksums = _manifest(path)
    leaves = dict(_named(wanted))
    need_memory(wanted.nbytes, f"the weights in {path}")
    places = _check(Path(path), leaves)
    arrays = {name: huge_empty(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
    with progress(f"loading {path}", len(arrays), "tensors") as advance, ThreadPoolExecutor(_READERS) as pool:

        def read(name: str) -> None:
            file, offset = places[name]
            if _read(file, offset, _bytes(arrays[name])) != checksums[name]:
                raise FalconError(f"{file} is damaged: the checksum of {name} does not match; {_ADVICE}")
            if leaves[name].ndim < 2:  # a norm, bias, scale, threshold
                check_finite(f"{name} in {file}", arrays[name])
            advance()

        for _ in pool.map(read, arrays):
            pass
    treedef = jax.tree.structure(wanted)
    return jax.tree.unflatten(treedef, [jax.device_put(array) for array in arrays.values()])


def _manifest(path: Path) -> tuple[DecodeWeights, dict[str, int]]:
    """Shapes of the weights and the checksum of every tensor."""
    file = Path(path) / _MANIFEST
    manifest = parse(_Manifest, read_sealed(file, _ADVICE, version=("version", _VERSION)), file)
    wanted = skeleton(manifest.config, manifest.formats, manifest.ranks, manifest.predictor_input)
    if wrong := sorted(manifest.crc32.keys() ^ {name for name, _ in _named(wanted)}):
        raise FalconError(f"{file}: the checksums and the config contradict each other about {wrong[0][:80]!r}")
    return wanted, manifest.crc32


def _named(weights: DecodeWeights) -> Iterator[tuple[str, Any]]:
    """All arrays with their names, such as `layers.0.qkv.data`, in the order of the pytree."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


def _file(name: str) -> str:
    first, second, *_ = name.split(".")
    return f"layer_{int(second):03d}.safetensors" if first == "layers" else "ends.safetensors"


def _bytes(array: np.ndarray) -> memoryview:
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))  # type: ignore[arg-type]


def _check(folder: Path, leaves: dict[str, Any]) -> dict[str, tuple[Path, int]]:
    """File and byte offset of every tensor; names, shapes, dtypes and sizes in the files must be those of `leaves`."""
    places: dict[str, tuple[Path, int]] = {}
    files = {folder / _file(name) for name in leaves}
    if unknown := sorted(set(folder.glob("*.safetensors")) - files):
        raise FalconError(f"{unknown[0]} is not of the model that {_MANIFEST} describes; {_ADVICE}")
    for file in sorted(files):
        start, header = _header(file)
        wanted = {name: leaf for name, leaf in leaves.items() if _file(name) == file.name}
        if wrong := sorted(wanted.keys() ^ header.keys()):
            raise FalconError(f"{file} does not hold the tensors that its manifest asks for: {wrong[0][:80]!r}")
        for name, leaf in wanted.items():
            dtype, shape = _DTYPES.get(header[name].dtype), header[name].shape
            begin, end = header[name].data_offsets
            if (shape, dtype) != (leaf.shape, leaf.dtype):
                found = f"{header[name].dtype[:8]}{list(shape)}"
                raise FalconError(f"{name} in {file} is {found} instead of {leaf.dtype}{list(leaf.shape)}")
            if end - begin != leaf.size * leaf.dtype.itemsize or begin < 0 or start + end > file.stat().st_size:
                raise FalconError(f"{file} is damaged or cut short: {name} does not lie in it; {_ADVICE}")
            places[name] = file, start + begin
    return places


def _header(file: Path) -> tuple[int, dict[str, _Entry]]:
    """Byte offset of a safetensors file's data, and the tensors in its header."""
    if not os.path.lexists(file):
        raise FalconError(f"{file} is missing; {_ADVICE}")
    size = regular_file(file).stat().st_size
    with file.open("rb") as stream:
        first = stream.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > min(size - 8, _HEADER_BYTES):
            raise FalconError(f"{file} is damaged or cut short: its header does not fit; {_ADVICE}")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
        except (ValueError, AttributeError, TypeError, RecursionError):
            raise FalconError(f"{file} is damaged: its header is not valid; {_ADVICE}") from None
    return 8 + length, parse(dict[str, _Entry], header, f"header of {file}")


def _read(file: Path, offset: int, out: memoryview) -> int:
    """Reads `out` from the file; returns the CRC-32 of the bytes read, fewer than asked for if the file ends early."""
    checksum = 0
    with file.open("rb", buffering=0) as stream:
        os.lseek(stream.fileno(), offset, os.SEEK_SET)
        for start in range(0, len(out), _CHUNK):
            part = out[start : start + _CHUNK]
            done = 0
            while done < len(part) and (n := stream.readinto(part[done:])):
                done += n
            checksum = zlib.crc32(part[:done], checksum)
    return checksum
