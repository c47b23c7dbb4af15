"""Native weights: a folder with `falcon.json` (the config) and `params/` (an Orbax checkpoint).

Orbax is asked for one plain Zarr array a parameter, so that a layer of a stacked parameter can be written and read
alone, with TensorStore, whatever the size of the model. Any Orbax reader restores the whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils

from falcon_relu.config import FalconConfig
from falcon_relu.errors import FalconError
from falcon_relu.files import aside_path, read_json, write_aside, write_json
from falcon_relu.sharding import Leaf, param_shapes

_FORMAT = 1
_CONFIG = "falcon.json"
_PARAMS = "params"
_CHUNK_BYTES = 256 * 2**20  # what reading one layer of a stacked parameter reads at most beyond that layer


def is_native(path: Path) -> bool:
    """Whether `path` is a folder of native weights."""
    return (path / _CONFIG).is_file()


def read_config(path: Path) -> FalconConfig:
    """The config of a folder of native weights.

    Raises:
      FalconError: `path` is no such folder, or of a newer format, or its config is not valid.
    """
    stored = read_json(Path(path) / _CONFIG)
    if not isinstance(stored, dict) or stored.get("format") != _FORMAT:
        raise FalconError(f"{path}/{_CONFIG} is not of format {_FORMAT}, the one that this version reads")
    try:
        return FalconConfig(**stored["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise FalconError(f"{path}/{_CONFIG} holds no valid config: {error}") from None


def save_params(path: Path, config: FalconConfig, params: Any, *, replace: bool = False) -> None:
    """Writes a model's parameters, whole or not at all. Every process of a job must call it, on a shared disk.

    Args:
      path: folder to make.
      config: the model's config.
      params: parameter tree as in `falcon_relu.model`, of any float dtype, on any sharding.
      replace: whether an existing folder may be replaced.

    Raises:
      FalconError: `path` exists and may not be replaced.
      ValueError: the parameters are not those of the config.
    """
    path = Path(path).resolve()
    _check_shapes({leaf: x.shape for leaf, x in flatten_dict(params).items()}, config, ValueError, "params")
    first = jax.process_index() == 0
    nbytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    ours = (
        write_aside(path, folder=True, replace=replace, nbytes=nbytes)
        if first
        else contextlib.nullcontext(aside_path(path))
    )
    with ours as aside:
        _save(aside, params)
        if first:
            _write_config(aside, config)
    multihost_utils.sync_global_devices(f"saved {path}")


@contextlib.contextmanager
def params_writer(
    path: Path, config: FalconConfig, dtypes: Mapping[Leaf, Any]
) -> Iterator[Callable[[Leaf, int | None, np.ndarray], None]]:
    """Yields `write(leaf, layer, array)`, which puts one layer of a stacked parameter, or a whole other one, on disk.

    The folder appears at `path` once the block succeeds; the caller must have written everything by then.

    Raises:
      FalconError: `path` exists.
    """
    path = Path(path).resolve()
    shapes = param_shapes(config)
    nbytes = sum(math.prod(shape) * np.dtype(dtypes[leaf]).itemsize for leaf, shape in shapes.items())
    with write_aside(path, folder=True, nbytes=nbytes) as aside:
        # Orbax lays out the tree with an empty stand-in for every array; the arrays themselves then follow.
        _save(aside, unflatten_dict({leaf: np.zeros(1, np.int8) for leaf in shapes}))
        stores = {
            leaf: ts.open(
                _spec(aside, leaf)
                | {
                    "metadata": {"compressor": None, "chunks": [1, *shape[1:]] if leaf[0] == "layers" else shape},
                    "store_data_equal_to_fill_value": True,
                },
                shape=shape,
                dtype=np.dtype(dtypes[leaf]),
                create=True,
                delete_existing=True,
            ).result()
            for leaf, shape in shapes.items()
        }

        def write(leaf: Leaf, layer: int | None, array: np.ndarray) -> None:
            store = stores[leaf] if layer is None else stores[leaf][layer]
            store.write(array, can_reference_source_data_indefinitely=True).result()

        yield write
        _write_config(aside, config)


def params_reader(
    path: Path, config: FalconConfig
) -> tuple[Callable[[Leaf, int | None], np.ndarray], dict[Leaf, np.dtype]]:
    """`read(leaf, layer)`, one layer of a stacked parameter or a whole other one straight from disk, and the dtypes.

    Raises:
      FalconError: the folder is not whole or not of the config's shapes; or, on reading, it is damaged.
    """
    path = Path(path).resolve()
    spec = {"open": True, "fill_missing_data_reads": False}  # a lost chunk is an error, not zeros
    try:
        stores = {leaf: ts.open(_spec(path, leaf) | spec).result() for leaf in param_shapes(config)}
    except ValueError as error:
        raise FalconError(f"{path} is not whole: {str(error).split(' [')[0]}") from error
    _check_shapes({leaf: store.shape for leaf, store in stores.items()}, config, FalconError, str(path))

    def read(leaf: Leaf, layer: int | None) -> np.ndarray:
        try:
            return (stores[leaf] if layer is None else stores[leaf][layer]).read().result()
        except ValueError as error:
            raise FalconError(f"{path} is damaged at {'.'.join(leaf)}: {str(error).split(' [')[0]}") from error

    return read, {leaf: store.dtype.numpy_dtype for leaf, store in stores.items()}


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


def _write_config(folder: Path, config: FalconConfig) -> None:
    """Writes what makes a folder native weights, so it comes last."""
    write_json(folder / _CONFIG, {"format": _FORMAT, "config": dataclasses.asdict(config)})


def _spec(folder: Path, leaf: Leaf) -> dict[str, Any]:
    return {"driver": "zarr", "kvstore": {"driver": "file", "path": str(folder / _PARAMS / ".".join(leaf))}}


def _check_shapes(shapes: Mapping[Leaf, Any], config: FalconConfig, error: type[Exception], where: str) -> None:
    wanted = param_shapes(config)
    for leaf in sorted(wanted.keys() | shapes.keys()):
        if tuple(shapes.get(leaf, ())) != wanted.get(leaf):
            raise error(f"{where}: {'.'.join(leaf)} is {shapes.get(leaf)}, but the config wants {wanted.get(leaf)}")
