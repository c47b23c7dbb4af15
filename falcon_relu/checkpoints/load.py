"""Loading checkpoints, native or Hugging Face: onto devices, or as a stream of tensors.

One tensor is in host memory at a time, beside the pages of its memory-mapped file.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
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
from falcon_relu.sharding import Leaf, param_shapes, param_shardings, place

_BLOCK = 1 << 18  # numbers checked at a time, so that they stay in the cache
_EXPONENTS: dict[np.dtype, Any] = {
    np.dtype(np.float32): np.uint32(0x7F800000),
    np.dtype(np.float16): np.uint16(0x7C00),
    np.dtype(ml_dtypes.bfloat16): np.uint16(0x7F80),
}


def load_config(source: str | Path, *, activation: Activation | None = None) -> FalconConfig:
    """The config of any checkpoint; no weights are fetched or read. Arguments and errors as `load_model`."""
    if not is_native(Path(source)):
        return _hf_config(locate(source), source, activation)
    return _agreed(read_config(Path(source)), source, activation)


def load_model(
    source: str | Path, *, activation: Activation | None = None, dtype: Any = jnp.float32, mesh: Mesh | None = None
) -> tuple[FalconConfig, Any]:
    """Config and parameters of any checkpoint. Every process of a job calls it; each places its own shards.

    Args:
      source: folder of native weights, folder in the Hugging Face layout, or hub id `owner/name[@revision]`.
      activation: the MLP activation, where a Hugging Face config does not state it.
      dtype: dtype of the parameters; as stored if None.
      mesh: devices to shard them over, see `param_shardings`; the default device if None.

    Raises:
      FalconError: no such checkpoint, or it is damaged or incomplete, or its tensors do not match its config.
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
        params[leaf].block_until_ready()  # else tensors waiting for their transfer accumulate in host memory
    return config, unflatten_dict(params)


def stream_model(
    source: str | Path, *, activation: Activation | None = None
) -> tuple[FalconConfig, Iterator[tuple[Leaf, int | None, np.ndarray]]]:
    """Config of any checkpoint and its parameters as (parameter, layer or None, array), read one at a time.

    Raises:
      FalconError: as `load_model`; some errors are raised during the iteration.
    """
    config, pieces, _ = _open(source, activation)
    return config, ((tensor.leaf, tensor.layer, array) for tensor, array in pieces)


def _open(
    source: str | Path, activation: Activation | None, with_dtypes: bool = False
) -> tuple[FalconConfig, Iterator[tuple[HfTensor, np.ndarray]], dict[Leaf, np.dtype]]:
    """The config, an iterator over the tensors and, if asked for, the stored dtype of each parameter."""
    if not is_native(Path(source)):
        config, headers = open_hf(source, activation)
        dtypes = stored_dtypes(config, headers) if with_dtypes else {}
        return config, stream_hf(config, headers, f"loading {source}"), dtypes
    config, read, dtypes = params_reader(Path(source))
    return _agreed(config, source, activation), _stream_native(config, read, f"loading {source}"), dtypes


def _agreed(config: FalconConfig, source: str | Path, activation: Activation | None) -> FalconConfig:
    """The config, after a check that the activation the user stated, if any, is the config's."""
    if activation not in (None, config.activation):
        raise FalconError(f"{source} is of activation {config.activation!r}, not {activation!r}")
    return config


def _hf_config(folder: Path, source: str | Path, activation: Activation | None) -> FalconConfig:
    path = folder / "config.json"
    if not os.path.lexists(path):
        raise FalconError(
            f"{folder} holds no model: neither native weights (falcon.json) nor a Hugging Face checkpoint ({path.name})"
        )
    return config_from_hf(read_json(path, limit=1 << 24), activation, f"{source}: {path.name}")


def open_hf(source: str | Path, activation: Activation | None) -> tuple[FalconConfig, dict[str, Header]]:
    """Config and tensor headers of a checkpoint, with names and shapes checked; no tensor is read.

    A tied model may store its matrix as the embedding, as the head, or both; here it is found as the embedding.
    """
    config = _hf_config(locate(source), source, activation)
    try:
        headers = read_headers(fetch_weights(source))
        if config.tied_embeddings and HEAD in headers and EMBEDDING not in headers:
            headers[EMBEDDING] = headers.pop(HEAD)
        check_tensors(config, {name: header.shape for name, header in headers.items()})
    except FalconError as error:
        raise error if str(source) in str(error) else FalconError(f"{source}: {error}") from error
    return config, {name: header for name, header in headers.items() if not is_leftover(name)}


def stream_hf(
    config: FalconConfig, headers: dict[str, Header], description: str
) -> Iterator[tuple[HfTensor, np.ndarray]]:
    """Each tensor of a checkpoint in the native layout, in the order of the files.

    Raises:
      FalconError: a number is not finite, or the checkpoint of a tied model has a head that is not the embedding.
    """
    table = hf_tensors(config)
    twins = {EMBEDDING, HEAD} if HEAD in headers and HEAD not in table else set()
    digests = set()
    with progress(description, len(headers), "tensors") as advance:
        for name, array in read_tensors(headers):
            check_finite(name, array)
            if name in twins:
                digests.add(_digest_of_numbers(array))
            if name in table:
                yield table[name], table[name].to_ours(array)
            advance()
    if len(digests) > 1:
        raise FalconError(
            f"{HEAD} differs from {EMBEDDING}, but config.json ties them; set tie_word_embeddings to false there"
        )


def _digest_of_numbers(array: np.ndarray) -> bytes:
    """A digest of the values as float32: the same for equal numbers in different dtypes."""
    digest = hashlib.sha256()
    for rows in np.array_split(array, max(1, array.nbytes >> 24)):
        digest.update(np.ascontiguousarray(rows, np.float32).view(np.uint8).data)
    return digest.digest()


def parameter_name(leaf: Leaf, layer: int | None) -> str:
    """The name of a parameter, or of a layer of one, in errors: "layers.3.mlp_norm.scale"."""
    return ".".join(leaf if layer is None else (leaf[0], str(layer), *leaf[1:]))


def check_finite(name: str, array: np.ndarray) -> None:
    """Refuses a parameter that holds NaN or infinity.

    Raises:
      FalconError: it does; the message names the parameter.
    """
    mask = _EXPONENTS.get(array.dtype)
    if mask is None:
        finite = bool(np.isfinite(array).all())
    else:  # NaN and infinity have all exponent bits set; testing that is five times as fast as isfinite
        bits = np.ascontiguousarray(array).reshape(-1).view(mask.dtype)
        finite = all((bits[i : i + _BLOCK] & mask).max() != mask for i in range(0, bits.size, _BLOCK))
    if not finite:
        raise FalconError(f"{name} holds NaN or infinity: it comes from a run that diverged, or is damaged")


def _stream_native(
    config: FalconConfig, read: Callable[[Leaf, int | None], np.ndarray], description: str
) -> Iterator[tuple[HfTensor, np.ndarray]]:
    """Each tensor of native weights, in the order of the table."""
    table = hf_tensors(config)
    with progress(description, len(table), "tensors") as advance:
        for tensor in table.values():
            array = read(tensor.leaf, tensor.layer)
            check_finite(parameter_name(tensor.leaf, tensor.layer), array)
            yield tensor, array
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
    """A parameter, or a layer of one, on the parameter's devices; on the default device without a sharding."""
    if sharding is None:
        return jnp.asarray(array)
    own = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:])) if is_layer else sharding
    return place(array, own)


@functools.cache
def _fill(sharding: NamedSharding | None) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    """(parameter, one layer or all of it, first layer) -> the parameter with that set, in its old buffer."""

    def fill(whole: jax.Array, part: jax.Array, layer: jax.Array) -> jax.Array:
        rows = part.astype(whole.dtype).reshape(-1, *whole.shape[1:])
        return jax.lax.dynamic_update_slice_in_dim(whole, rows, layer, 0)

    return jax.jit(fill, donate_argnums=0, out_shardings=sharding)
