"""Recordings: what entered a model's MLPs on real text and what each neuron contributed, on disk, a layer at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from falcon_relu.config import FalconConfig
from falcon_relu.errors import FalconError
from falcon_relu.files import read_json, write_aside, write_json
from falcon_relu.model import Falcon, KVCache, Params
from falcon_relu.progress import progress
from infer.predictor.predictor import PredictorInput

Batch = Mapping[str, Any]  # as of train.data.batches: the three below, int32 [B, T]; segment 0 is padding
BATCH_KEYS = ("tokens_BxT", "positions_BxT", "segment_ids_BxT")  # in the order in which the model takes them

INPUT_DTYPE = np.dtype(ml_dtypes.bfloat16)
CONTRIBUTION_DTYPE = np.dtype(ml_dtypes.float8_e5m2)

_VERSION = 1
_MANIFEST = "recording.json"
_PIECE_BYTES = 512 << 20  # of all layers' neurons that are in memory at a time


@dataclasses.dataclass(frozen=True)
class Recording:
    """A folder of recorded activations; D * 2 + F bytes for each token and layer.

    Attributes:
      folder: where it is.
      input: which input of the layers was recorded.
      tokens: N, tokens recorded, in the order of the batches.
      n_layers: L.
      d_model: D.
      d_ff: F.
    """

    folder: Path
    input: PredictorInput
    tokens: int
    n_layers: int
    d_model: int
    d_ff: int

    @property
    def held_out(self) -> range:
        """The tokens kept for measuring, which are the last tenth."""
        return range(self.tokens - self.tokens // 10, self.tokens)

    def check(self, config: FalconConfig) -> None:
        """Raises FalconError unless this is a recording of such a model."""
        sizes, needed = ((c.n_layers, c.d_model, c.d_ff) for c in (self, config))
        if sizes != needed:
            raise FalconError(f"{self.folder} is of a model with L, D, F = {sizes}; this one has {needed}")

    def layer(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs [N, D] in bfloat16 and contributions [N, F] in float8 of layer `i`, mapped from disk.

        A neuron's contribution is |h| * ||its row of W_down||: the length of what it adds to the residual stream. It is
        zero exactly where the neuron does not fire.
        """
        inputs = np.memmap(_inputs(self.folder, i), INPUT_DTYPE, "r", shape=(self.tokens, self.d_model))
        contributions = np.memmap(
            _contributions(self.folder, i), CONTRIBUTION_DTYPE, "r", shape=(self.tokens, self.d_ff)
        )
        return inputs, contributions


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
    """Runs the model over `batches` and writes what its layers saw, padding left out.

    Args:
      config: the model; its activation must leave zeros.
      params: its parameters.
      batches: text; as many are taken as needed.
      folder: the recording to make; appears when complete.
      tokens: how many tokens to record.
      input: which input of the layers.
      dtype: compute dtype.
      replace: whether an existing recording may be replaced.

    Raises:
      FalconError: the activation leaves no zeros, the folder exists and may not be replaced, or the batches end too
        early.
    """
    if config.activation == "gelu":
        raise FalconError("a GELU model has no silent neurons to predict; record a model whose activation is a ReLU")
    done, nbytes = 0, tokens * config.n_layers * (INPUT_DTYPE.itemsize * config.d_model + config.d_ff)
    with (
        write_aside(folder, folder=True, replace=replace, marker=_MANIFEST, nbytes=nbytes) as aside,
        progress("record", tokens, "tokens") as advance,
    ):
        aside.mkdir()
        for arrays in _observed(config, params, batches, input, dtype):
            kept = min(tokens - done, arrays[0].shape[1])
            for i, (x_NxD, c_NxF) in enumerate(zip(*arrays, strict=True)):
                _append(_inputs(aside, i), x_NxD[:kept])
                _append(_contributions(aside, i), c_NxF[:kept])
            done += kept
            advance(kept)
            if done == tokens:
                break
        else:
            raise FalconError(f"the text ended after {done} of {tokens} tokens; give more text or record fewer tokens")
        made = Recording(Path(folder), input, tokens, config.n_layers, config.d_model, config.d_ff)
        fields = {k: v for k, v in dataclasses.asdict(made).items() if k != "folder"}
        write_json(aside / _MANIFEST, {"version": _VERSION, **fields})
    return made


def open_recording(folder: Path) -> Recording:
    """Opens what `record_activations` wrote.

    Raises:
      FalconError: it is missing, of another version, or its files do not have the sizes that it states.
    """
    fields = read_json(Path(folder) / _MANIFEST)
    try:
        version, input = fields.pop("version"), fields["input"]
        recording = Recording(folder=Path(folder), **fields)
        if version != _VERSION or input not in get_args(PredictorInput):
            raise ValueError(f"version {version!r}, input {input!r}")
        for i in range(recording.n_layers):
            recording.layer(i)
    except (TypeError, KeyError, ValueError, AttributeError, OSError) as error:
        raise FalconError(f"{folder} is not a whole recording: {error}; record it again") from None
    return recording


def _observed(
    config: FalconConfig, params: Params, batches: Iterable[Batch], input: PredictorInput, dtype: Any
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Inputs [L, N, D] and contributions [L, N, F] for the real tokens of each batch, some positions at a time.

    What all layers' neurons do at all positions does not fit into memory at 40B; a cache carries the context from one
    piece of a batch to the next.
    """
    observe = jax.jit(functools.partial(_observe, Falcon(config, dtype), input), donate_argnums=2)
    lengths_LxF = jax.jit(_row_lengths)(params["layers"]["mlp"]["down"])
    for batch in batches:
        arrays_BxT = [np.asarray(batch[k]) for k in BATCH_KEYS]
        B, T = arrays_BxT[0].shape
        C = max(min(T, _PIECE_BYTES // (4 * config.n_layers * B * config.d_ff)), 1)
        cache = KVCache.empty(config, B, -(-T // C) * C, dtype)
        for start in range(0, T, C):
            piece = [_padded(a_BxT[:, start : start + C], C) for a_BxT in arrays_BxT]
            seen, cache = observe(params, lengths_LxF, cache, *piece)
            yield tuple(np.asarray(a)[:, piece[-1] != 0] for a in seen)  # type: ignore[misc]


def _padded(a_BxN: np.ndarray, C: int) -> np.ndarray:
    """Filled up with zeros, which are padding, to C positions."""
    return np.pad(a_BxN, ((0, 0), (0, C - a_BxN.shape[1])))


def _observe(
    model: Falcon, input: PredictorInput, params: Params, lengths_LxF: jax.Array, cache: KVCache, *piece: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], KVCache]:
    (_, cache), variables = model.apply({"params": params}, *piece, cache, method="hidden", mutable=["activations"])
    seen = variables["activations"]["layers"]
    h_LxBxCxF = jnp.abs(seen["mlp"]["neurons"].astype(jnp.float32))
    finite = jnp.finfo(CONTRIBUTION_DTYPE)
    c_LxBxCxF = jnp.clip(h_LxBxCxF * lengths_LxF[:, None, None], float(finite.smallest_subnormal), float(finite.max))
    c_LxBxCxF = jnp.where(h_LxBxCxF > 0, c_LxBxCxF, 0).astype(CONTRIBUTION_DTYPE)
    return (seen[input].astype(INPUT_DTYPE), c_LxBxCxF), cache


def _row_lengths(w_LxFxD: jax.Array) -> jax.Array:
    return jnp.linalg.norm(w_LxFxD.astype(jnp.float32), axis=-1)


def _inputs(folder: Path, i: int) -> Path:
    return folder / f"{i:03}.inputs"


def _contributions(folder: Path, i: int) -> Path:
    return folder / f"{i:03}.contributions"


def _append(path: Path, array: np.ndarray) -> None:
    with path.open("ab") as file:
        file.write(np.ascontiguousarray(array).view(np.uint8).data)
