"""Recordings: the inputs of a model's MLPs on real text and each neuron's contribution, two files a layer on disk."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from falcon_relu.checkpoints.digests import Digest, check_digest
from falcon_relu.checkpoints.schema import parse, read_sealed, write_sealed
from falcon_relu.config import FalconConfig
from falcon_relu.errors import FalconError, check_number
from falcon_relu.files import regular_file, write_aside
from falcon_relu.model import BATCH_KEYS, Falcon, KVCache, Params
from falcon_relu.progress import progress
from falcon_relu.sharding import on_host
from infer.predictor.predictor import PredictorInput

Batch = Mapping[
    str, Any
]  # as train.data.batches gives them: the arrays of BATCH_KEYS, int32 [B, T]; segment 0: padding

INPUT_DTYPE = np.dtype(ml_dtypes.bfloat16)
CONTRIBUTION_DTYPE = np.dtype(ml_dtypes.float8_e5m2)

_VERSION = 2
_MANIFEST = "recording.json"
_ADVICE = "record it again"
_PIECE_BYTES = 512 << 20  # memory of a device for the activations of all layers at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recording:
    """A folder of recorded activations; D * 2 + F bytes for each token and layer.

    Attributes:
      folder: where its files are.
      input: which input of the layers was recorded.
      tokens: N, number of tokens recorded, in the order of the batches.
      n_layers: L.
      d_model: D.
      d_ff: F.
      files: size in bytes and CRC-32 of every file by name, checked when it is first read.

    Raises:
      FalconError: the numbers are out of range, or the files are not those of so many layers.
    """

    folder: Path
    input: PredictorInput
    tokens: int
    n_layers: int
    d_model: int
    d_ff: int
    files: Mapping[str, Digest]

    def __post_init__(self) -> None:
        check_number("tokens of a recording", self.tokens, low=10, high=1 << 40)
        for name, most in (("n_layers", 1 << 12), ("d_model", 1 << 20), ("d_ff", 1 << 24)):
            check_number(f"{name} of a recording", getattr(self, name), low=1, high=most)
        sizes = {}
        for i in range(self.n_layers):
            sizes[_inputs(i)] = self.tokens * self.d_model * INPUT_DTYPE.itemsize
            sizes[_contributions(i)] = self.tokens * self.d_ff * CONTRIBUTION_DTYPE.itemsize
        if sizes != {name: size for name, (size, _) in self.files.items()}:
            raise FalconError(f"{self.folder}: the files listed are not those of {self.n_layers} layers of such widths")

    @property
    def held_out(self) -> range:
        """The tokens not used to fit but to measure: the last tenth."""
        return range(self.tokens - self.tokens // 10, self.tokens)

    def check(self, config: FalconConfig) -> None:
        """Raises FalconError unless this is a recording of such a model."""
        sizes, needed = ((c.n_layers, c.d_model, c.d_ff) for c in (self, config))
        if sizes != needed:
            raise FalconError(f"{self.folder} is of a model with L, D, F = {sizes}; this one has {needed}")

    def layer(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs [N, D] in bfloat16 and contributions [N, F] in float8_e5m2 of layer `i`, memory-mapped.

        A neuron's contribution is |h| * ||its row of W_down||, the norm of the vector that it adds to the residual
        stream. It is zero exactly where the neuron does not fire.

        Raises:
          FalconError: a file is missing or damaged.
        """
        inputs, contributions = _inputs(i), _contributions(i)
        for name in (inputs, contributions):
            path = regular_file(self.folder / name)
            _check_once(path, self.files[name], path.stat().st_mtime_ns)
        return (
            np.memmap(self.folder / inputs, INPUT_DTYPE, "r", shape=(self.tokens, self.d_model)),
            np.memmap(self.folder / contributions, CONTRIBUTION_DTYPE, "r", shape=(self.tokens, self.d_ff)),
        )


@functools.cache
def _check_once(path: Path, wanted: Digest, changed_ns: int) -> None:
    """Checks a file's checksum, once while the file does not change: a layer is read several times."""
    check_digest(path, wanted, _ADVICE)


def record_activations(
    config: FalconConfig,
    params: Params,
    batches: Iterable[Batch],
    folder: Path,
    *,
    tokens: int,
    input: PredictorInput,
    dtype: Any = jnp.float32,
    replace: bool = False,
) -> Recording:
    """Runs the model over `batches` and writes inputs and contributions of its layers, without padding.

    Runs on the current mesh if there is one (`use_mesh`). Every process of a job calls it with the same batches; the
    first one writes.

    Args:
      config: the model; its activation must leave zeros.
      params: its parameters.
      batches: text; only as many are read as needed.
      folder: the recording to write; exists only once it is complete.
      tokens: number of tokens to record.
      input: which input of the layers to record.
      dtype: compute dtype.
      replace: whether an existing recording may be replaced.

    Raises:
      FalconError: fewer than 10 tokens are asked for, the activation leaves no zeros, the folder exists and may not be
        replaced, or the batches end too early.
    """
    if config.activation == "gelu":
        raise FalconError("a GELU model has no silent neurons to predict; record a model whose activation is a ReLU")
    checksums: collections.Counter[str] = collections.Counter()
    sizes: collections.Counter[str] = collections.Counter()

    def append(folder: Path | None, name: str, array: np.ndarray) -> None:
        data = np.ascontiguousarray(array).view(np.uint8).data
        if folder is not None:
            with (folder / name).open("ab") as file:
                file.write(data)
        checksums[name] = zlib.crc32(data, checksums[name])
        sizes[name] += data.nbytes

    check_number("tokens to record", tokens, low=10)  # a tenth is held out
    done, nbytes = 0, tokens * config.n_layers * (INPUT_DTYPE.itemsize * config.d_model + config.d_ff)
    first = jax.process_index() == 0
    with (
        write_aside(folder, folder=True, replace=replace, marker=_MANIFEST, nbytes=nbytes)
        if first
        else contextlib.nullcontext() as aside,
        progress("record", tokens, "tokens") as advance,
    ):
        if aside is not None:
            aside.mkdir()
        for arrays in _observed(config, params, batches, input, dtype):
            kept = min(tokens - done, arrays[0].shape[1])
            for i, (x_NxD, c_NxF) in enumerate(zip(*arrays, strict=True)):
                append(aside, _inputs(i), x_NxD[:kept])
                append(aside, _contributions(i), c_NxF[:kept])
            done += kept
            advance(kept)
            if done == tokens:
                break
        else:
            raise FalconError(f"the text ended after {done} of {tokens} tokens; give more text or record fewer tokens")
        fields = {
            "input": input,
            "tokens": tokens,
            "n_layers": config.n_layers,
            "d_model": config.d_model,
            "d_ff": config.d_ff,
            "files": {name: (size, checksums[name]) for name, size in sizes.items()},
        }
        if aside is not None:
            write_sealed(aside / _MANIFEST, {"version": _VERSION, **fields})
    return Recording(folder=Path(folder), **fields)  # type: ignore[arg-type]


def open_recording(folder: Path) -> Recording:
    """Opens what `record_activations` wrote.

    Raises:
      FalconError: it is missing, of another version, or its files do not have the sizes that it states.
    """
    folder = Path(folder)
    path = folder / _MANIFEST
    fields = read_sealed(path, _ADVICE, version=("version", _VERSION))
    del fields["version"]
    recording = parse(Recording, fields | {"folder": str(folder)}, path)
    for name, (size, _) in recording.files.items():
        if (found := regular_file(folder / name).stat().st_size) != size:
            raise FalconError(f"{folder / name} is not whole: it has {found:,} of {size:,} bytes; {_ADVICE}")
    return recording


def _observed(
    config: FalconConfig, params: Params, batches: Iterable[Batch], input: PredictorInput, dtype: Any
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Inputs [L, N, D] and contributions [L, N, F] of the tokens that are not padding, a chunk of positions at a time.

    At 40B, the activations of all layers at all positions do not fit into memory; a KV cache carries the context from
    one chunk of a batch to the next.
    """
    model = Falcon(config, dtype)
    lengths_LxF = jax.jit(_row_lengths)(params["layers"]["mlp"]["down"])
    mesh = jax.sharding.get_abstract_mesh()
    piece_bytes = _PIECE_BYTES * (1 if mesh.empty else mesh.size)
    for batch in batches:
        arrays_BxT = [np.asarray(batch[k]) for k in BATCH_KEYS]
        B, T = arrays_BxT[0].shape
        C = max(min(T, piece_bytes // (4 * config.n_layers * B * config.d_ff)), 1)
        cache = empty_cache(config, B, -(-T // C) * C, dtype)
        for start in range(0, T, C):
            piece = [_padded(a_BxT[:, start : start + C], C) for a_BxT in arrays_BxT]
            seen, cache = observe_piece(model, input, params, lengths_LxF, cache, *piece)
            yield tuple(a[:, piece[-1] != 0] for a in on_host(seen))


def _padded(a_BxN: np.ndarray, C: int) -> np.ndarray:
    """[B, C]: padded with zeros, which mark padding in all arrays of a batch."""
    return np.pad(a_BxN, ((0, 0), (0, C - a_BxN.shape[1])))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty_cache(config: FalconConfig, B: int, S: int, dtype: Any) -> KVCache:
    """A cache for a batch, sharded over the current mesh."""
    return KVCache.empty(config, B, S, dtype).sharded()


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def observe_piece(
    model: Falcon, input: PredictorInput, params: Params, lengths_LxF: jax.Array, cache: KVCache, *piece: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], KVCache]:
    """The program behind `record_activations`: inputs [L, B, C, D], contributions [L, B, C, F], and the cache."""
    (_, cache), variables = model.apply({"params": params}, *piece, cache, method="hidden", mutable=["activations"])
    seen = variables["activations"]["layers"]
    h_LxBxCxF = jnp.abs(seen["mlp"]["neurons"].astype(jnp.float32))
    finite = jnp.finfo(CONTRIBUTION_DTYPE)
    c_LxBxCxF = jnp.clip(h_LxBxCxF * lengths_LxF[:, None, None], float(finite.smallest_subnormal), float(finite.max))
    c_LxBxCxF = jnp.where(h_LxBxCxF > 0, c_LxBxCxF, 0).astype(CONTRIBUTION_DTYPE)
    return (seen[input].astype(INPUT_DTYPE), c_LxBxCxF), cache.sharded()


def _row_lengths(w_LxFxD: jax.Array) -> jax.Array:
    return jax.lax.map(lambda w_FxD: jnp.linalg.norm(w_FxD.astype(jnp.float32), axis=-1), w_LxFxD)


def _inputs(i: int) -> str:
    return f"{i:03}.inputs"


def _contributions(i: int) -> str:
    return f"{i:03}.contributions"
