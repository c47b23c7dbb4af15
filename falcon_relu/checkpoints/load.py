"""Any checkpoint onto devices, or read one tensor at a time.

All of it streams: one tensor of a checkpoint is in host memory at a time, beside what its open file maps.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from falcon_relu.checkpoints.hf_config import config_from_hf
from falcon_relu.checkpoints.hf_files import Header, fetch_weights, locate, read_headers, read_tensors
from falcon_relu.checkpoints.hf_layout import EMBEDDING, HEAD, HfTensor, check_tensors, hf_tensors, is_leftover
from falcon_relu.checkpoints.native import is_native, params_reader, read_config
from falcon_relu.config import Activation, FalconConfig
from falcon_relu.errors import FalconError
from falcon_relu.files import read_json
from falcon_relu.progress import progress
from falcon_relu.sharding import Leaf, param_shapes, param_shardings


def load_config(source: str | Path, *, activation: Activation | None = None) -> FalconConfig:
    """The config of any checkpoint; no weights are fetched or read. Arguments and errors as `load_model`."""
    if not is_native(Path(source)):
        return config_from_hf(_read_hf_config(locate(source)), activation)
    config = read_config(Path(source))
    if activation not in (None, config.activation):
        raise FalconError(f"{source} is of activation {config.activation!r}, not {activation!r}")
    return config


def load_model(
    source: str | Path, *, activation: Activation | None = None, dtype: Any = jnp.float32, mesh: Mesh | None = None
) -> tuple[FalconConfig, Any]:
    """Config and parameters of any checkpoint. Every process of a job calls it; each places its own shards.

    Args:
      source: folder of native weights, folder in the Hugging Face layout, or hub id `owner/name[@revision]`.
      activation: the user's word where a Hugging Face config does not state the MLP activation.
      dtype: dtype of the parameters; as stored if None.
      mesh: where to place them, by `param_shardings`; on the default device if None.

    Raises:
      FalconError: no such checkpoint, or it is damaged, not whole, or not of its config's names and shapes.
    """
    config, pieces, dtypes = _open(source, activation, with_dtypes=dtype is None)
    shapes = param_shapes(config)
    shardings: dict[Leaf, NamedSharding] = {} if mesh is None else flatten_dict(param_shardings(config, mesh))

    def zeros() -> dict[Leaf, jax.Array]:
        return {leaf: jnp.zeros(shape, dtype or dtypes[leaf]) for leaf, shape in shapes.items()}

    params = jax.jit(zeros, out_shardings=shardings or None)()
    for tensor, array in pieces:
        leaf, layer, sharding = tensor.leaf, tensor.layer, shardings.get(tensor.leaf)
        part = _place(array, sharding, is_layer=layer is not None)
        params[leaf] = _fill(sharding)(params[leaf], part, layer or 0)
        params[leaf].block_until_ready()  # else tensors not yet on their device pile up in host memory
    return config, unflatten_dict(params)


def stream_model(
    source: str | Path, *, activation: Activation | None = None
) -> tuple[FalconConfig, Iterator[tuple[Leaf, int | None, np.ndarray]]]:
    """Config of any checkpoint and its parameters as (parameter, layer or None, array), read one at a time.

    Raises:
      FalconError: as `load_model`, partly while the parameters are read.
    """
    config, pieces, _ = _open(source, activation)
    return config, ((tensor.leaf, tensor.layer, array) for tensor, array in pieces)


def _open(
    source: str | Path, activation: Activation | None, with_dtypes: bool = False
) -> tuple[FalconConfig, Iterator[tuple[HfTensor, np.ndarray]], dict[Leaf, np.dtype]]:
    """Config, tensors to read one at a time and, if asked for, the dtype that each parameter is stored in."""
    if not is_native(Path(source)):
        config, headers = open_hf(source, activation)
        dtypes = stored_dtypes(config, headers) if with_dtypes else {}
        return config, stream_hf(config, headers, f"loading {source}"), dtypes
    config = load_config(source, activation=activation)
    read, dtypes = params_reader(Path(source), config)
    return config, _stream_native(config, read, f"loading {source}"), dtypes


def _read_hf_config(folder: Path) -> Any:
    path = folder / "config.json"
    if not path.exists():
        raise FalconError(
            f"{folder} holds no model: no weights of ours (falcon.json), no Hugging Face checkpoint ({path.name})"
        )
    return read_json(path)


def open_hf(source: str | Path, activation: Activation | None) -> tuple[FalconConfig, dict[str, Header]]:
    """Config and tensors of a checkpoint, names and shapes checked; no tensor is read, no weights fetched in vain."""
    folder = locate(source)
    hf = _read_hf_config(folder)
    try:
        config = config_from_hf(hf, activation)
        headers = read_headers(fetch_weights(source))
        check_tensors(config, {name: header.shape for name, header in headers.items()})
    except FalconError as error:
        raise FalconError(f"{source}: {error}") from error
    return config, {name: header for name, header in headers.items() if not is_leftover(name)}


def stream_hf(
    config: FalconConfig, headers: dict[str, Header], description: str
) -> Iterator[tuple[HfTensor, np.ndarray]]:
    """Each tensor of a checkpoint in our shape, in the order of the files.

    Raises:
      FalconError: the checkpoint of a tied model has a head that is not the embedding.
    """
    table = hf_tensors(config)
    twins = {EMBEDDING, HEAD} if HEAD in headers and HEAD not in table else set()
    digests = set()
    with progress(description, len(headers), "tensors") as advance:
        for name, array in read_tensors(headers):
            if name in twins:
                digests.add(hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).digest())
            if name in table:
                yield table[name], table[name].to_ours(array)
            advance()
    if len(digests) > 1:
        raise FalconError(
            f"{HEAD} differs from {EMBEDDING}, but config.json ties them; set tie_word_embeddings to false there"
        )


def _stream_native(
    config: FalconConfig, read: Callable[[Leaf, int | None], np.ndarray], description: str
) -> Iterator[tuple[HfTensor, np.ndarray]]:
    """The same pieces from native weights."""
    table = hf_tensors(config)
    with progress(description, len(table), "tensors") as advance:
        for tensor in table.values():
            yield tensor, read(tensor.leaf, tensor.layer)
            advance()


def stored_dtypes(config: FalconConfig, headers: Mapping[str, Header]) -> dict[Leaf, np.dtype]:
    """The dtype of each parameter in a checkpoint.

    Raises:
      FalconError: it differs from layer to layer.
    """
    dtypes: dict[Leaf, np.dtype] = {}
    for name, tensor in hf_tensors(config).items():
        if dtypes.setdefault(tensor.leaf, headers[name].dtype) != headers[name].dtype:
            raise FalconError(f"{name} is not of the dtype that other layers have; choose a dtype")
    return dtypes


def _place(array: np.ndarray, sharding: NamedSharding | None, is_layer: bool) -> jax.Array:
    """A parameter, or a layer of one, on the parameter's devices; a process transfers only the shards that it holds."""
    if sharding is None:
        return jnp.asarray(array)
    own = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:])) if is_layer else sharding
    return jax.make_array_from_callback(array.shape, own, lambda index: array[index])


@functools.cache
def _fill(sharding: NamedSharding | None) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    """(parameter, one layer or all of it, first layer) -> the parameter with that set, in its old buffer."""

    def fill(whole: jax.Array, part: jax.Array, layer: jax.Array) -> jax.Array:
        rows = part.astype(whole.dtype).reshape(-1, *whole.shape[1:])
        return jax.lax.dynamic_update_slice_in_dim(whole, rows, layer, 0)

    return jax.jit(fill, donate_argnums=0, out_shardings=sharding)
