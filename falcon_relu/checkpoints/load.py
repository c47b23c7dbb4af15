"""Loading checkpoints, native or Hugging Face: onto devices, or as a stream of tensors.

One tensor is in host memory at a time, beside the pages of its memory-mapped file.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from falcon_relu.checkpoints.hf_config import config_from_hf
from falcon_relu.checkpoints.hf_files import Header, TensorReader, fetch_weights, locate, read_headers
from falcon_relu.checkpoints.hf_layout import EMBEDDING, HEAD, HfTensor, check_tensors, hf_tensors, is_leftover
from falcon_relu.checkpoints.native import is_native, params_reader, read_config
from falcon_relu.config import Activation, FalconConfig
from falcon_relu.errors import FalconError
from falcon_relu.files import read_json
from falcon_relu.progress import progress
from falcon_relu.sharding import Index, Leaf, param_shapes, param_shardings, place_parts

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
    """Config and parameters of any checkpoint. Every process of a job calls it; each reads and places its own shards.

    Args:
      source: folder of native weights, folder in the Hugging Face layout, or hub id `owner/name[@revision]`.
      activation: the MLP activation, where a Hugging Face config does not state it.
      dtype: dtype of the parameters; as stored if None.
      mesh: devices to shard them over, see `param_shardings`; the default device if None.

    Raises:
      FalconError: no such checkpoint, or it is damaged or incomplete, or its tensors do not match its config.
    """
    with open_model(source, activation=activation) as stored:
        config, shapes = stored.config, param_shapes(stored.config)
        dtypes = stored.dtypes() if dtype is None else dict.fromkeys(shapes, dtype)
        shardings: dict[Leaf, NamedSharding] = {} if mesh is None else flatten_dict(param_shardings(config, mesh))

        params = _zeros(shapes, dtypes, shardings)()
        for tensor in stored.tensors(f"loading {source}"):
            leaf, layer, sharding = tensor.leaf, tensor.layer, shardings.get(tensor.leaf)
            part = _place(tensor, functools.partial(stored.read, tensor), sharding)
            params[leaf] = _fill(sharding)(params[leaf], part, layer or 0)
            params[leaf].block_until_ready()  # else tensors waiting for their transfer accumulate in host memory
    return config, unflatten_dict(params)


def loading_programs(config: FalconConfig, dtype: Any, mesh: Mesh) -> Iterator[tuple[Any, tuple[Any, ...], Any]]:
    """What `load_model` executes on a mesh: (jitted function, shapes of its arguments, shapes of the other parameters).

    First the one that makes all parameters; then, of those that fill them, the one of the largest parameter that comes
    layer by layer, and the one of the largest that comes whole. They are taken to be stored in float32.
    """
    shapes = param_shapes(config)
    shardings: dict[Leaf, NamedSharding] = flatten_dict(param_shardings(config, mesh))
    yield _zeros(shapes, dict.fromkeys(shapes, dtype), shardings), (), ()
    whole = {leaf: jax.ShapeDtypeStruct(shapes[leaf], dtype, sharding=shardings[leaf]) for leaf in shapes}
    for layered in (True, False):
        kind = [leaf for leaf in shapes if (leaf[0] == "layers") == layered]
        leaf = max(kind, key=lambda leaf: math.prod(shardings[leaf].shard_shape(shapes[leaf])))
        own = _piece_sharding(shardings[leaf], layered)
        piece = jax.ShapeDtypeStruct(shapes[leaf][1:] if layered else shapes[leaf], jnp.float32, sharding=own)
        yield _fill(shardings[leaf]), (whole[leaf], piece, 0), [whole[name] for name in shapes if name != leaf]


def layered_params(stored: StoredModel) -> Any:
    """The tree "layers" of a model, whose leaves read one layer, as numpy, when they are indexed by its number."""
    by_layer: dict[Leaf, dict[int, HfTensor]] = {}
    for tensor in stored.table:
        if tensor.layer is not None:
            by_layer.setdefault(tensor.leaf, {})[tensor.layer] = tensor
    return unflatten_dict({leaf: _Layers(stored, tensors) for leaf, tensors in by_layer.items()})


@dataclasses.dataclass(frozen=True)
class _Layers:
    stored: StoredModel
    tensors: Mapping[int, HfTensor]

    def __getitem__(self, layer: int) -> np.ndarray:
        return self.stored.read(self.tensors[layer], None)


def stream_model(
    source: str | Path, *, activation: Activation | None = None
) -> tuple[FalconConfig, Iterator[tuple[Leaf, int | None, np.ndarray]]]:
    """Config of any checkpoint and its parameters as (parameter, layer or None, array), read one at a time.

    Raises:
      FalconError: as `load_model`; some errors are raised during the iteration.
    """
    stored = open_model(source, activation=activation)

    def pieces() -> Iterator[tuple[Leaf, int | None, np.ndarray]]:
        with stored:
            for tensor in stored.tensors(f"loading {source}"):
                yield tensor.leaf, tensor.layer, stored.read(tensor, None)

    return stored.config, pieces()


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """A checkpoint whose parameters are read tensor by tensor, or part by part; made by `open_model`.

    A context manager, which closes its files.

    Attributes:
      config: the model's.
      table: its tensors, in the order in which they are read fastest.
      read: (tensor, part) -> that part, or all of it for None, in the native layout; valid until the next one is read.
        Raises FalconError where the file is damaged or a number is not finite.
      dtypes: () -> the stored dtype of each parameter; raises FalconError where it differs from layer to layer.
      close: closes the files.
    """

    config: FalconConfig
    table: Sequence[HfTensor]
    read: Callable[[HfTensor, Index | None], np.ndarray]
    dtypes: Callable[[], dict[Leaf, np.dtype]]
    close: Callable[[], None] = lambda: None

    def __enter__(self) -> StoredModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tensors(self, description: str) -> Iterator[HfTensor]:
        """The tensors of `table`, with a line of progress."""
        with progress(description, len(self.table), "tensors") as advance:
            for tensor in self.table:
                yield tensor
                advance()


def open_model(source: str | Path, *, activation: Activation | None = None) -> StoredModel:
    """Any checkpoint, with names and shapes checked; no tensor is read yet. Arguments and errors as `load_model`."""
    if is_native(Path(source)):
        return _open_native(Path(source), activation)
    config, headers = _open_hf(source, activation)
    table, reader = hf_tensors(config), TensorReader(headers)
    twin = {EMBEDDING: HEAD} if HEAD in headers and HEAD not in table else {}

    def read(tensor: HfTensor, part: Index | None) -> np.ndarray:
        place = None if part is None else tensor.part_in_file(part)
        array = reader.read(tensor.name, place)
        check_finite(tensor.name, array)
        if tensor.name in twin and not _same_numbers(array, reader.read(twin[tensor.name], place)):
            raise FalconError(
                f"{HEAD} differs from {EMBEDDING}, but config.json ties them; set tie_word_embeddings to false there"
            )
        return tensor.to_ours(array) if part is None else tensor.part_to_ours(array, part)

    in_files = [table[name] for name in headers if name in table]
    return StoredModel(config, in_files, read, lambda: _stored_dtypes(config, headers), reader.close)


def _open_native(folder: Path, activation: Activation | None) -> StoredModel:
    config, read_params, dtypes = params_reader(folder)

    def read(tensor: HfTensor, part: Index | None) -> np.ndarray:
        array = read_params(tensor.leaf, tensor.layer, part)
        check_finite(parameter_name(tensor.leaf, tensor.layer), array)
        return array

    return StoredModel(_agreed(config, folder, activation), [*hf_tensors(config).values()], read, lambda: dtypes)


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


def _open_hf(source: str | Path, activation: Activation | None) -> tuple[FalconConfig, dict[str, Header]]:
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


def _same_numbers(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays hold equal numbers, in whatever dtypes."""
    return all(
        np.array_equal(a.astype(np.float32), b.astype(np.float32))
        for a, b in zip(*(np.array_split(x, max(1, x.nbytes >> 24)) for x in (one, other)), strict=True)
    )


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


def _stored_dtypes(config: FalconConfig, headers: Mapping[str, Header]) -> dict[Leaf, np.dtype]:
    """The dtype of each parameter in a checkpoint.

    Raises:
      FalconError: it differs from layer to layer.
    """
    dtypes: dict[Leaf, np.dtype] = {}
    for name, tensor in hf_tensors(config).items():
        if dtypes.setdefault(tensor.leaf, headers[name].dtype) != headers[name].dtype:
            raise FalconError(f"{name} is not of the dtype that other layers have; choose a dtype")
    return dtypes


def _place(tensor: HfTensor, read: Callable[[Index | None], np.ndarray], sharding: NamedSharding | None) -> jax.Array:
    """A parameter, or a layer of one, on the parameter's devices; on the default device without a sharding."""
    if sharding is None:
        return jnp.asarray(read(None))
    return place_parts(tensor.our_shape, _piece_sharding(sharding, tensor.layer is not None), read)


def _piece_sharding(sharding: NamedSharding, is_layer: bool) -> NamedSharding:
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:])) if is_layer else sharding


def _zeros(
    shapes: Mapping[Leaf, tuple[int, ...]], dtypes: Mapping[Leaf, Any], shardings: Mapping[Leaf, NamedSharding]
) -> Callable[[], dict[Leaf, jax.Array]]:
    """() -> parameters of these shapes and dtypes, all zero."""

    def zeros() -> dict[Leaf, jax.Array]:
        return {leaf: jnp.zeros(shape, dtypes[leaf]) for leaf, shape in shapes.items()}

    return jax.jit(zeros, out_shardings=dict(shardings) or None)


@functools.cache
def _fill(sharding: NamedSharding | None) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    """(parameter, one layer or all of it, first layer) -> the parameter with that set, in its old buffer."""

    def fill(whole: jax.Array, part: jax.Array, layer: jax.Array) -> jax.Array:
        rows = part.astype(whole.dtype).reshape(-1, *whole.shape[1:])
        return jax.lax.dynamic_update_slice_in_dim(whole, rows, layer, 0)

    return jax.jit(fill, donate_argnums=0, out_shardings=sharding)
