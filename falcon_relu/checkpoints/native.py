"""Native weights: a folder with `falcon.json` (config and checksums) and `params/` (an Orbax checkpoint).

Orbax is asked for one plain Zarr array a parameter, so that a layer of a stacked parameter can be written and read
alone, with TensorStore, whatever the size of the model. Any Orbax reader restores the whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils

from falcon_relu.checkpoints.chunks import DTYPES, METADATA, Chunks
from falcon_relu.checkpoints.digests import Digests, bytes_digest, digest, read_checked
from falcon_relu.checkpoints.schema import parse, read_sealed, write_sealed
from falcon_relu.config import FalconConfig
from falcon_relu.errors import FalconError
from falcon_relu.files import aside_path, real_path, write_aside
from falcon_relu.model import largest_divisor
from falcon_relu.sharding import Index, Leaf, param_axes, param_shapes

Read = Callable[..., np.ndarray]  # (leaf, layer or None, part or None), see `params_reader`

_FORMAT = 2
_MANIFEST = "falcon.json"
_PARAMS = "params"
_ADVICE = "convert or save the weights again, or copy them anew"
_CHUNK_BYTES = 16 * 2**20  # of a file, uncompressed, at most: what a device reads beyond its own part
_READERS = 8


@dataclasses.dataclass(frozen=True)
class _Manifest:
    """What falcon.json holds.

    Attributes:
      format: of the folder.
      config: the model's.
      arrays: of each parameter, such as "layers.mlp.up", the bytes and CRC-32 of every file.
    """

    format: Literal[2]
    config: FalconConfig
    arrays: dict[str, Digests]


def is_native(path: Path) -> bool:
    """Whether `path` is a folder of native weights."""
    return (path / _MANIFEST).exists()


def read_config(path: Path) -> FalconConfig:
    """The config of a folder of native weights.

    Raises:
      FalconError: `path` is no such folder, or of another format, or its manifest was changed.
    """
    return _read_manifest(Path(path)).config


def save_params(path: Path, config: FalconConfig, params: Any, *, replace: bool = False) -> None:
    """Writes a model's parameters, whole or not at all. Every process of a job must call it, on a shared disk.

    Args:
      path: folder to make.
      config: the model's config.
      params: parameter tree as in `falcon_relu.model`, in float32, bfloat16 or float16, on any sharding.
      replace: whether an existing folder may be replaced.

    Raises:
      FalconError: `path` exists and may not be replaced.
      ValueError: the parameters are not those of the config, or of another dtype.
    """
    path = real_path(path)
    leaves = flatten_dict(params)
    _check_leaves(leaves, config)
    first = jax.process_index() == 0
    nbytes = sum(x.size * x.dtype.itemsize for x in leaves.values())
    ours = (
        write_aside(path, folder=True, replace=replace, marker=_MANIFEST, nbytes=nbytes)
        if first
        else contextlib.nullcontext(aside_path(path))
    )
    with ours as aside:
        _save(aside, params)
        digests = _digests_of_all(aside / _PARAMS, param_shapes(config))
        if first:
            _write_manifest(aside, config, digests)
    multihost_utils.sync_global_devices(f"saved {path}")


@contextlib.contextmanager
def params_writer(
    path: Path, config: FalconConfig, dtypes: Mapping[Leaf, Any], *, replace: bool = False
) -> Iterator[Callable[[Leaf, int | None, np.ndarray], None]]:
    """Yields `write(leaf, layer, array)`, which puts one layer of a stacked parameter, or a whole other one, on disk.

    The folder appears at `path` once the block succeeds; the caller must have written everything by then.

    Raises:
      FalconError: `path` exists and may not be replaced.
    """
    path = real_path(path)
    shapes = param_shapes(config)
    nbytes = sum(math.prod(shape) * np.dtype(dtypes[leaf]).itemsize for leaf, shape in shapes.items())
    with write_aside(path, folder=True, replace=replace, marker=_MANIFEST, nbytes=nbytes) as aside:
        # Orbax lays out the tree with an empty stand-in for every array; the arrays themselves then follow.
        _save(aside, unflatten_dict({leaf: np.zeros(1, np.int8) for leaf in shapes}))
        axes = {leaf: _split_axis(leaf, spec) for leaf, spec in flatten_dict(param_axes(config)).items()}
        chunks = {
            leaf: _chunk(leaf, shape, axes[leaf], np.dtype(dtypes[leaf]).itemsize) for leaf, shape in shapes.items()
        }
        stores = {
            leaf: ts.open(
                _spec(aside, leaf)
                | {
                    "metadata": {"compressor": None, "chunks": chunks[leaf]},
                    "store_data_equal_to_fill_value": True,
                },
                shape=shape,
                dtype=np.dtype(dtypes[leaf]),
                create=True,
                delete_existing=True,
            ).result()
            for leaf, shape in shapes.items()
        }
        digests: dict[str, Digests] = {
            _name(leaf): {METADATA: digest(aside / _PARAMS / _name(leaf) / METADATA)} for leaf in shapes
        }

        def write(leaf: Leaf, layer: int | None, array: np.ndarray) -> None:
            store = stores[leaf] if layer is None else stores[leaf][layer]
            store.write(array, can_reference_source_data_indefinitely=True).result()
            axis, size = axes[leaf], chunks[leaf][axes[leaf]]
            split = axis - (layer is not None)  # of the array given
            for number, part in enumerate(np.split(array, range(size, array.shape[split], size), split)):
                index = [0] * len(shapes[leaf])
                index[0] = layer or 0
                index[axis] = number
                digests[_name(leaf)][".".join(map(str, index))] = bytes_digest(part)  # files are not compressed

        yield write
        _write_manifest(aside, config, digests)


def params_reader(path: Path) -> tuple[FalconConfig, Read, dict[Leaf, np.dtype]]:
    """Config, a function that reads parameters, and their dtypes.

    `read(leaf, layer, part)` gives one layer of a stacked parameter or a whole other one (layer None), or a part of
    that. It reads the files that hold some of it, each once if the parts of a layer are asked for one after the other,
    and holds them against their checksums.

    Raises:
      FalconError: the folder is not whole or not of the config's shapes; or, on reading, it is damaged.
    """
    path = real_path(path)
    manifest = _read_manifest(path)
    shapes = param_shapes(manifest.config)
    if wrong := sorted(manifest.arrays.keys() ^ {_name(leaf) for leaf in shapes}):
        raise FalconError(f"{path / _MANIFEST} and its config contradict each other about {wrong[0]}")
    arrays: dict[Leaf, _Array] = {}
    for leaf, shape in shapes.items():
        folder, digests = path / _PARAMS / _name(leaf), manifest.arrays[_name(leaf)]
        if METADATA not in digests:
            raise FalconError(f"{path / _MANIFEST} has no checksum of {_name(leaf)}/{METADATA}")
        metadata = read_checked(folder / METADATA, digests[METADATA], _ADVICE)
        chunks = Chunks.open(folder, shape)
        chunks.check_listed(digests)
        arrays[leaf] = _Array(chunks, digests, metadata)

    latest: list[_Array] = []

    def read(leaf: Leaf, layer: int | None, part: Index | None = None) -> np.ndarray:
        if latest and latest[-1] is not arrays[leaf]:
            latest.pop().release()
        latest[:] = [arrays[leaf]]
        part = part or tuple(slice(0, size) for size in shapes[leaf][layer is not None :])
        return arrays[leaf].read(part) if layer is None else arrays[leaf].read((slice(layer, layer + 1), *part))[0]

    return manifest.config, read, {leaf: array.chunks.dtype for leaf, array in arrays.items()}


class _Array:
    """A stored array. Its files are read into memory, checked there, and decoded by TensorStore from there."""

    def __init__(self, chunks: Chunks, digests: Digests, metadata: bytes):
        self.chunks, self._digests, self._metadata = chunks, digests, metadata
        self._store: Any = None
        self._files: Any = None
        self._held: set[str] = set()

    def read(self, part: Index) -> np.ndarray:
        """A part; the files that it needs stay in memory until another part does not need them."""
        if self._store is None:
            context, spec = ts.Context(), {"driver": "memory", "path": "array/"}
            self._files = ts.KvStore.open(spec, context=context).result()
            self._files.write(METADATA, self._metadata).result()
            options: Any = {"driver": "zarr", "kvstore": spec, "open": True, "fill_missing_data_reads": False}
            self._store = ts.open(options, context=context).result()
        names = set(self.chunks.names(part))
        for name in self._held - names:
            self._files.delete_range(ts.KvStore.KeyRange(name, name + "\0")).result()
        self._held &= names
        with ThreadPoolExecutor(_READERS) as pool:
            list(pool.map(self._fetch, sorted(names - self._held)))
        try:
            found: np.ndarray = self._store[part].read().result()
        except ValueError as error:
            raise FalconError(f"{self.chunks.folder} is damaged: {str(error).split(' [')[0]}") from error
        return found

    def release(self) -> None:
        """Frees what `read` holds."""
        self._store = self._files = None
        self._held.clear()

    def _fetch(self, name: str) -> None:
        self._files.write(name, read_checked(self.chunks.folder / name, self._digests[name], _ADVICE)).result()
        self._held.add(name)


def _read_manifest(path: Path) -> _Manifest:
    file = path / _MANIFEST
    try:
        about = file.stat()
    except OSError:
        return _parse_manifest(file, None)  # which says what is wrong
    return _parse_manifest(file, (about.st_ino, about.st_size, about.st_mtime_ns))


@functools.lru_cache(maxsize=4)
def _parse_manifest(file: Path, unchanged: tuple[int, int, int] | None) -> _Manifest:
    """The manifest; a start asks for the config, then for the weights, of student and teacher, and parses it once."""
    return parse(_Manifest, read_sealed(file, _ADVICE, version=("format", _FORMAT)), file)


def _write_manifest(folder: Path, config: FalconConfig, digests: Mapping[str, Digests]) -> None:
    """Writes what makes a folder native weights, so it comes last."""
    write_sealed(folder / _MANIFEST, {"format": _FORMAT, "config": dataclasses.asdict(config), "arrays": digests})


def _digests_of_all(params: Path, shapes: Mapping[Leaf, tuple[int, ...]]) -> dict[str, Digests]:
    """The digests of every file of a checkpoint, each read by one of the job's processes."""
    files = [
        params / _name(leaf) / name
        for leaf, shape in shapes.items()
        for name in (METADATA, *Chunks.open(params / _name(leaf), shape).names())
    ]
    rank, processes = jax.process_index(), jax.process_count()
    checksums = np.zeros(len(files), np.uint32)
    with ThreadPoolExecutor(_READERS) as pool:
        checksums[rank::processes] = [checksum for _, checksum in pool.map(digest, files[rank::processes])]
    if processes > 1:
        checksums = np.asarray(multihost_utils.process_allgather(checksums)).sum(0, dtype=np.uint32)
    digests: dict[str, Digests] = {}
    for file, checksum in zip(files, checksums, strict=True):
        digests.setdefault(file.parent.name, {})[file.name] = (file.stat().st_size, int(checksum))
    return digests


def _save(folder: Path, params: Any) -> None:
    stacked = ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,))  # a layer is never half of a chunk
    save_args = {leaf: stacked if leaf[0] == "layers" else ocp.SaveArgs() for leaf in flatten_dict(params)}
    args = ocp.args.StandardSave(params, save_args=unflatten_dict(save_args))
    log = logging.getLogger("absl")
    log.addFilter(_is_news)
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler(use_ocdbt=False)) as checkpointer:
            checkpointer.save(folder / _PARAMS, args=args)
    finally:
        log.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Not Orbax's warning that there is no OCDBT, which we have asked for."""
    return "Skipping merge of OCDBT" not in record.msg


def _split_axis(leaf: Leaf, axes: Sequence[str | None]) -> int:
    """The axis along which `params_writer` divides a layer into files: the one that is sharded over most devices."""
    names = list(axes)
    return next((names.index(name) for name in ("mlp", "embed") if name in names), int(leaf[0] == "layers"))


def _chunk(leaf: Leaf, shape: tuple[int, ...], axis: int, itemsize: int) -> list[int]:
    """The shape of what `params_writer` puts into a file: a part of one layer, or of a parameter without layers."""
    chunk = [1, *shape[1:]] if leaf[0] == "layers" else list(shape)
    others = math.prod(chunk) // chunk[axis]
    chunk[axis] = largest_divisor(shape[axis], max(_CHUNK_BYTES // (others * itemsize), 1))
    return chunk


def _name(leaf: Leaf) -> str:
    return ".".join(leaf)


def _spec(folder: Path, leaf: Leaf) -> dict[str, Any]:
    return {"driver": "zarr", "kvstore": {"driver": "file", "path": str(folder / _PARAMS / _name(leaf))}}


def _check_leaves(leaves: Mapping[Leaf, Any], config: FalconConfig) -> None:
    wanted = param_shapes(config)
    for leaf in sorted(wanted.keys() | leaves.keys()):
        found = leaves.get(leaf)
        if found is None or tuple(found.shape) != wanted.get(leaf):
            shape = None if found is None else found.shape
            raise ValueError(f"params: {_name(leaf)} is {shape}, but the config wants {wanted.get(leaf)}")
        if found.dtype not in DTYPES.values():
            raise ValueError(f"params: {_name(leaf)} is {found.dtype}; only float32, bfloat16 and float16 are stored")
