"""Models in and out: any checkpoint onto devices, Hugging Face -> native weights, native weights -> Hugging Face.

All of it streams: one tensor of a checkpoint is in host memory at a time, beside what its open file maps.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from falcon_relu.config import Activation, FalconConfig
from falcon_relu.errors import FalconError
from falcon_relu.files import read_json, write_aside, write_json
from falcon_relu.hf_config import config_from_hf, config_to_hf
from falcon_relu.hf_files import Header, fetch_weights, locate, read_headers, read_tensors, write_shards
from falcon_relu.hf_layout import EMBEDDING, HEAD, HfTensor, check_tensors, hf_tensors, is_leftover
from falcon_relu.native import is_native, params_reader, params_writer, read_config
from falcon_relu.progress import progress
from falcon_relu.sharding import Leaf, param_shapes, param_shardings
from falcon_relu.tokenizer import END_OF_TEXT

Float = Literal["float32", "bfloat16", "float16"]


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
        config, headers = _open_hf(source, activation)
        dtypes = _stored_dtypes(config, headers) if with_dtypes else {}
        return config, _stream_hf(config, headers, f"loading {source}"), dtypes
    config = load_config(source, activation=activation)
    read, dtypes = params_reader(Path(source), config)
    return config, _stream_native(config, read, f"loading {source}"), dtypes


def import_hf(
    source: str | Path, out: Path, *, activation: Activation | None = None, dtype: Float | None = None
) -> FalconConfig:
    """Writes a Hugging Face checkpoint as native weights at `out`, whole or not at all.

    Args:
      source: folder in the Hugging Face layout, or hub id `owner/name[@revision]`.
      out: folder to make.
      activation: the user's word where the config does not state the MLP activation.
      dtype: of the weights written; as stored if None.

    Raises:
      FalconError: as `load_model`; or `out` exists, or a value does not fit `dtype`.
    """
    config, headers = _open_hf(source, activation)
    dtypes = dict.fromkeys(param_shapes(config), np.dtype(dtype)) if dtype else _stored_dtypes(config, headers)
    with params_writer(out, config, dtypes) as write:
        for tensor, array in _stream_hf(config, headers, f"converting {source}"):
            write(tensor.leaf, tensor.layer, cast(array, dtypes[tensor.leaf], tensor.name))
    return config


def export_hf(
    source: Path,
    out: Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    tokenizer: Path | None = None,
) -> FalconConfig:
    """Writes native weights as a folder that transformers loads, whole or not at all.

    Args:
      source: folder of native weights.
      out: folder to make.
      dtype: of the weights written; as stored if None.
      max_shard_bytes: size that no safetensors shard exceeds unless a single tensor does; one shard is held in memory.
      tokenizer: a `tokenizer.json` to put beside the weights.

    Raises:
      FalconError: `source` is not whole, transformers has no such model, `out` exists, or a value does not fit `dtype`.
    """
    config = read_config(source)
    read, stored = params_reader(source, config)
    table = hf_tensors(config)
    dtypes = {name: np.dtype(dtype or stored[tensor.leaf]) for name, tensor in table.items()}
    hf_config = config_to_hf(config, dtypes[EMBEDDING].name)
    if tokenizer is not None and not tokenizer.is_file():
        raise FalconError(f"{tokenizer} does not exist")
    sizes = {name: int(np.prod(tensor.shape)) * dtypes[name].itemsize for name, tensor in table.items()}
    with (
        write_aside(out, nbytes=sum(sizes.values())) as aside,
        progress(f"exporting {source}", len(table), "tensors") as advance,
    ):

        def read_hf(name: str) -> np.ndarray:
            tensor = table[name]
            array = cast(tensor.to_hf(read(tensor.leaf, tensor.layer)), dtypes[name], name)
            advance()
            return array

        aside.mkdir()
        write_shards(aside, sizes, read_hf, max_shard_bytes)
        ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
        write_json(aside / "generation_config.json", ids)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, aside / "tokenizer.json")
            tokenizer_config = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": config.max_positions,
                "eos_token": END_OF_TEXT,
            }
            write_json(aside / "tokenizer_config.json", tokenizer_config)
        write_json(aside / "config.json", hf_config)
    return config


def cast(array: np.ndarray, dtype: Any, name: str) -> np.ndarray:
    """`array` in another float dtype.

    Raises:
      FalconError: a finite value overflows it, as large values do in float16.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if np.dtype(dtype) == np.float16 and (np.isinf(result) & ~np.isinf(array)).any():
        raise FalconError(f"{name} has values beyond the range of float16; choose bfloat16 or float32")
    return result


def _read_hf_config(folder: Path) -> Any:
    path = folder / "config.json"
    if not path.exists():
        raise FalconError(
            f"{folder} holds no model: no weights of ours (falcon.json), no Hugging Face checkpoint ({path.name})"
        )
    return read_json(path)


def _open_hf(source: str | Path, activation: Activation | None) -> tuple[FalconConfig, dict[str, Header]]:
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


def _stream_hf(
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
