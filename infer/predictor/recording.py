"""Recordings: what goes into a model's matrices on real text, as files on disk.

Of all tokens: the input of each layer that predictors read, and each neuron's contribution. Of the first tokens also
the inputs of the other matrices, for rounding them (`infer.weights.rounding`).
"""

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
from flax import struct

from falcon_relu.checkpoints.digests import Digest, check_digest
from falcon_relu.checkpoints.schema import parse, read_sealed, write_sealed
from falcon_relu.config import FalconConfig
from falcon_relu.errors import FalconError, check_number
from falcon_relu.files import regular_file, write_aside
from falcon_relu.model import BATCH_KEYS, Falcon, KVCache, Params
from falcon_relu.progress import progress
from falcon_relu.sharding import on_host
from infer.predictor.predictor import PredictorInput

# As train.data.batches gives them: the arrays of BATCH_KEYS, int32 [B, T]; segment 0: padding.
Batch = Mapping[str, Any]

INPUT_DTYPE = np.dtype(ml_dtypes.bfloat16)
CONTRIBUTION_DTYPE = np.dtype(ml_dtypes.float8_e5m2)

_VERSION = 3
_MANIFEST = "recording.json"
_ADVICE = "record it again"
_PIECE_BYTES = 512 << 20  # memory of a device for the activations of all layers at once
_MATRIX_TOKENS = 8192  # whose inputs of matrices are recorded

# Matrices whose inputs are recorded, by name as in `infer.weights.layout`; "head" once, the others in every layer.
MATRICES = ("qkv", "out", "up")
HEAD = "head"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recording:
    """A folder of recorded activations.

    D * 2 + F bytes for each token and layer, and of the first 8,192 tokens the inputs of matrices, about D * 6.

    Attributes:
      folder: where its files are.
      input: which input of the layers was recorded.
      tokens: N, number of tokens recorded, in the order of the batches.
      n_layers: L.
      d_model: D.
      d_ff: F.
      heads: number of columns of the output projection, N * H.
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
    heads: int
    files: Mapping[str, Digest]

    def __post_init__(self) -> None:
        check_number("tokens of a recording", self.tokens, low=10, high=1 << 40)
        for name, most in (("n_layers", 1 << 12), ("d_model", 1 << 20), ("d_ff", 1 << 24), ("heads", 1 << 20)):
            check_number(f"{name} of a recording", getattr(self, name), low=1, high=most)
        sizes = {_matrix_inputs(HEAD): self.matrix_tokens * self.d_model * INPUT_DTYPE.itemsize}
        for i in range(self.n_layers):
            for matrix in MATRICES:
                nbytes = self.matrix_tokens * self._columns(matrix) * INPUT_DTYPE.itemsize
                sizes[_matrix_inputs(matrix, i)] = nbytes
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
        sizes = self.n_layers, self.d_model, self.d_ff, self.heads
        needed = config.n_layers, config.d_model, config.d_ff, config.n_heads * config.head_dim
        if sizes != needed:
            raise FalconError(f"{self.folder} is of a model with L, D, F, N * H = {sizes}; this one has {needed}")

    def layer(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs [N, D] in bfloat16 and contributions [N, F] in float8_e5m2 of layer `i`, memory-mapped.

        A neuron's contribution is |h| * ||its row of W_down||, the norm of the vector that it adds to the residual
        stream. It is zero exactly where the neuron does not fire.

        Raises:
          FalconError: a file is missing or damaged.
        """
        return (
            self._open(_inputs(i), INPUT_DTYPE, self.tokens, self.d_model),
            self._open(_contributions(i), CONTRIBUTION_DTYPE, self.tokens, self.d_ff),
        )

    def matrix_inputs(self, matrix: str, i: int | None = None) -> np.ndarray:
        """What a matrix of `MATRICES` of layer `i`, or the head, is multiplied with: [n, columns] in bfloat16.

        Raises:
          FalconError: the file is missing or damaged.
        """
        return self._open(_matrix_inputs(matrix, i), INPUT_DTYPE, self.matrix_tokens, self._columns(matrix))

    @property
    def matrix_tokens(self) -> int:
        """Number of tokens of which the inputs of matrices were recorded, the first ones."""
        return min(self.tokens, _MATRIX_TOKENS)

    def _columns(self, matrix: str) -> int:
        return self.heads if matrix == "out" else self.d_model

    def _open(self, name: str, dtype: np.dtype, *shape: int) -> np.ndarray:
        path = regular_file(self.folder / name)
        _check_once(path, self.files[name], path.stat().st_mtime_ns)
        return np.memmap(path, dtype, "r", shape=shape)


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
    heads = config.n_heads * config.head_dim
    of_matrices = min(tokens, _MATRIX_TOKENS) * INPUT_DTYPE.itemsize * (2 * config.d_model + heads)
    done, nbytes = 0, tokens * (INPUT_DTYPE.itemsize * config.d_model + config.d_ff) + of_matrices
    first = jax.process_index() == 0
    with (
        write_aside(folder, folder=True, replace=replace, marker=_MANIFEST, nbytes=config.n_layers * nbytes)
        if first
        else contextlib.nullcontext() as aside,
        progress("record", tokens, "tokens") as advance,
    ):
        if aside is not None:
            aside.mkdir()
        for seen in _observed(config, params, batches, input, dtype):
            kept, of_matrix = (min(most - done, seen.input_LxNxD.shape[1]) for most in (tokens, _MATRIX_TOKENS))
            for i, (x_NxD, c_NxF) in enumerate(zip(seen.input_LxNxD, seen.contribution_LxNxF, strict=True)):
                append(aside, _inputs(i), x_NxD[:kept])
                append(aside, _contributions(i), c_NxF[:kept])
            if of_matrix > 0:
                rows = slice(min(kept, of_matrix))
                append(aside, _matrix_inputs(HEAD), seen.head_NxD[rows])
                for matrix, x_LxNxC in seen.matrices.items():
                    for i, x_NxC in enumerate(x_LxNxC):
                        append(aside, _matrix_inputs(matrix, i), x_NxC[rows])
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
            "heads": heads,
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


@struct.dataclass
class Seen:
    """Activations of a piece of text; where there is [B, C] at first, padding is left out later: [N].

    Attributes:
      input_LxNxD: what predictors read, as recorded.
      contribution_LxNxF: the neurons' contributions, as recorded.
      matrices: inputs of each of `MATRICES`, [L, B, C, columns].
      head_NxD: inputs of the head, [B, C, D].
    """

    input_LxNxD: Any
    contribution_LxNxF: Any
    matrices: dict[str, Any]
    head_NxD: Any

    def without_padding(self, used_BxC: np.ndarray) -> Seen:
        """The tokens in use."""
        layers = jax.tree.map(lambda a: a[:, used_BxC], self.replace(head_NxD=None))  # type: ignore[attr-defined]
        return layers.replace(head_NxD=self.head_NxD[used_BxC])


def _observed(
    config: FalconConfig, params: Params, batches: Iterable[Batch], input: PredictorInput, dtype: Any
) -> Iterator[Seen]:
    """Activations of the tokens that are not padding, a chunk of positions at a time.

    At 40B, the activations of all layers at all positions do not fit into memory; a KV cache carries the context from
    one chunk of a batch to the next.
    """
    model = Falcon(config, dtype)
    lengths_LxF = jax.jit(_row_lengths)(params["layers"]["mlp"]["down"])
    mesh = jax.sharding.get_abstract_mesh()
    for batch in batches:
        arrays_BxT = [np.asarray(batch[k]) for k in BATCH_KEYS]
        B, T = arrays_BxT[0].shape
        C = piece_length(config, B, T, 1 if mesh.empty else mesh.size)
        cache = empty_cache(config, B, -(-T // C) * C, dtype)
        for start in range(0, T, C):
            piece = [_padded(a_BxT[:, start : start + C], C) for a_BxT in arrays_BxT]
            seen, cache = observe_piece(model, input, params, lengths_LxF, cache, *piece)
            yield on_host(seen).without_padding(piece[-1] != 0)


def piece_length(config: FalconConfig, B: int, T: int, devices: int) -> int:
    """Positions of a batch [B, T] that are recorded at a time."""
    return max(min(T, devices * _PIECE_BYTES // (4 * config.n_layers * B * (config.d_ff + 2 * config.d_model))), 1)


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
) -> tuple[Seen, KVCache]:
    """The program behind `record_activations`: the activations, and the cache."""
    (hidden_BxCxD, cache), variables = model.apply(
        {"params": params}, *piece, cache, method="hidden", mutable=["activations"]
    )
    seen = variables["activations"]["layers"]
    h_LxBxCxF = jnp.abs(seen["mlp"]["neurons"].astype(jnp.float32))
    finite = jnp.finfo(CONTRIBUTION_DTYPE)
    c_LxBxCxF = jnp.clip(h_LxBxCxF * lengths_LxF[:, None, None], float(finite.smallest_subnormal), float(finite.max))
    c_LxBxCxF = jnp.where(h_LxBxCxF > 0, c_LxBxCxF, 0).astype(CONTRIBUTION_DTYPE)
    matrices = {"qkv": seen["attention_input"], "out": seen["attention"]["heads"], "up": seen["mlp_input"]}
    matrices = {matrix: matrices[matrix].astype(INPUT_DTYPE) for matrix in MATRICES}
    return Seen(
        input_LxNxD=seen[input].astype(INPUT_DTYPE),
        contribution_LxNxF=c_LxBxCxF,
        matrices=matrices,
        head_NxD=hidden_BxCxD.astype(INPUT_DTYPE),
    ), cache.sharded()


def _row_lengths(w_LxFxD: jax.Array) -> jax.Array:
    return jax.lax.map(lambda w_FxD: jnp.linalg.norm(w_FxD.astype(jnp.float32), axis=-1), w_LxFxD)


def _inputs(i: int) -> str:
    return f"{i:03}.inputs"


def _contributions(i: int) -> str:
    return f"{i:03}.contributions"


def _matrix_inputs(matrix: str, i: int | None = None) -> str:
    return f"{matrix}.inputs" if i is None else f"{i:03}.{matrix}.inputs"
