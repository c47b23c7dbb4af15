"""Decode weights on disk: a folder of safetensors files, one a layer, and a manifest.

The manifest holds the format's version, the model's config, the number formats, and a CRC-32 of every tensor. Loading
reads all tensors in parallel, straight into the huge pages that decoding then reads. bf16 rows are stored as uint16.
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from falcon_relu.config import FalconConfig
from falcon_relu.errors import FalconError
from falcon_relu.files import read_json, write_aside, write_json
from falcon_relu.progress import progress
from infer.weights.layout import DecodeWeights, Formats, skeleton
from infer.weights.memory import huge_empty, need_memory

_VERSION = 1
_MANIFEST = "decode.json"
_CHUNK = 64 << 20  # bytes a thread reads, then checks while they are in the cache
_READERS = 8
_DTYPES = {"F32": np.float32, "F16": np.float16, "U16": np.uint16, "I8": np.int8, "I32": np.int32}


def is_decode_weights(path: Path) -> bool:
    """Whether `path` is a folder of decode weights."""
    return (path / _MANIFEST).is_file()


def save_weights(weights: DecodeWeights, path: Path, *, replace: bool = False) -> None:
    """Writes decode weights, whole or not at all.

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
        write_json(aside / _MANIFEST, manifest | {"crc32": checksums})


def outline(path: Path) -> DecodeWeights:
    """Shapes and dtypes of stored decode weights, from their manifest.

    Raises:
      FalconError: `path` is no such folder, or of another version.
    """
    return _manifest(path)[0]


def load_weights(path: Path) -> DecodeWeights:
    """Reads decode weights.

    Raises:
      FalconError: `path` is no such folder, of another version, not whole or damaged, or there is too little memory.
    """
    wanted, checksums = _manifest(path)
    leaves = dict(_named(wanted))
    need_memory(wanted.nbytes, f"the weights in {path}")
    places = _check(Path(path), leaves)
    arrays = {name: huge_empty(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
    with progress(f"loading {path}", len(arrays), "tensors") as advance, ThreadPoolExecutor(_READERS) as pool:

        def read(name: str) -> None:
            file, offset = places[name]
            if _read(file, offset, _bytes(arrays[name])) != checksums.get(name):
                raise FalconError(f"{file} is damaged at {name}; make the weights again")
            advance()

        for _ in pool.map(read, arrays):
            pass
    treedef = jax.tree.structure(wanted)
    return jax.tree.unflatten(treedef, [jax.device_put(array) for array in arrays.values()])


def _manifest(path: Path) -> tuple[DecodeWeights, dict[str, int]]:
    """Shapes of the weights and the checksum of every tensor."""
    manifest = read_json(Path(path) / _MANIFEST)
    try:
        version = manifest["version"]
        if version != _VERSION:
            raise FalconError(f"{path} is of version {version}; this program reads {_VERSION}: pack the model again")
        config = FalconConfig(**manifest["config"])
        wanted = skeleton(config, Formats(**manifest["formats"]), manifest["ranks"], manifest["predictor_input"])
        return wanted, dict(manifest["crc32"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise FalconError(f"{path}/{_MANIFEST} is no valid manifest: {error}") from None


def _named(weights: DecodeWeights) -> Iterator[tuple[str, Any]]:
    """Every array under its path, such as `layers.0.qkv.data`, in the order of the tree."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


def _file(name: str) -> str:
    first, second, *_ = name.split(".")
    return f"layer_{int(second):03d}.safetensors" if first == "layers" else "ends.safetensors"


def _bytes(array: np.ndarray) -> memoryview:
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))  # type: ignore[arg-type]


def _check(folder: Path, leaves: dict[str, Any]) -> dict[str, tuple[Path, int]]:
    """File and offset of every tensor, their names, shapes and dtypes held against those wanted."""
    places: dict[str, tuple[Path, int]] = {}
    for file in sorted({folder / _file(name) for name in leaves}):
        start, header = _header(file)
        wanted = {name: leaf for name, leaf in leaves.items() if _file(name) == file.name}
        if wrong := sorted(wanted.keys() ^ header.keys()):
            raise FalconError(f"{file} does not hold the tensors that its manifest asks for: {wrong[0]}")
        for name, leaf in wanted.items():
            try:
                dtype, shape = np.dtype(_DTYPES[header[name]["dtype"]]), tuple(header[name]["shape"])
                begin, end = header[name]["data_offsets"]
            except (KeyError, TypeError, ValueError):
                raise FalconError(f"{file} is damaged: its entry for {name} is not valid") from None
            size = leaf.size * dtype.itemsize
            if (shape, dtype) != (leaf.shape, leaf.dtype):
                raise FalconError(f"{name} in {file} is {dtype}{list(shape)} instead of {leaf.dtype}{list(leaf.shape)}")
            if end - begin != size or begin < 0 or start + end > file.stat().st_size:
                raise FalconError(f"{file} is damaged or cut short: {name} does not lie in it")
            places[name] = file, start + begin
    return places


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where a safetensors file's data begin, and its entries."""
    try:
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            if size > file.stat().st_size:
                raise ValueError("the header does not fit into the file")
            header = json.loads(stream.read(size))
        return 8 + size, {name: entry for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, AttributeError, struct.error) as error:
        raise FalconError(f"{file} is missing or damaged: {error}") from None


def _read(file: Path, offset: int, out: memoryview) -> int:
    """Fills `out` from the file and returns its CRC-32; less than all was read where the file ends early."""
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
