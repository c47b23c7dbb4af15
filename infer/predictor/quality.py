"""Quality against neurons read: the Flax model with all neurons set to zero that a predictor does not select."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from falcon_relu.config import FalconConfig
from falcon_relu.errors import FalconError
from falcon_relu.layers import Select
from falcon_relu.model import BATCH_KEYS, Falcon, Params, largest_divisor, next_tokens, split_chunks
from falcon_relu.sharding import batch_shards, on_host
from infer.choice import choose
from infer.predictor.calibration import calibrate_predictor, measure
from infer.predictor.predictor import EVERY, LayerPredictor, Predictor, PredictorInput, score, stack
from infer.predictor.recording import Batch, Recording

_LOGIT_ROWS = 2048  # positions of a device whose logits are computed at a time


@struct.dataclass
class Selector:
    """A predictor as data for the compiled model, all layers stacked.

    Attributes:
      maps: both maps, [L, R, D] and [L, F, R].
      threshold_L: lowest logit of a neuron that is kept, float32.
      budget_L: most neurons that are kept, int32.
    """

    maps: LayerPredictor
    threshold_L: jax.Array
    budget_L: jax.Array


def selector(predictor: Predictor) -> Selector:
    """The stacked form of a predictor."""
    return Selector(
        stack(predictor.layers),
        jnp.asarray(predictor.thresholds, jnp.float32),
        jnp.asarray(predictor.budgets, jnp.int32),
    )


def masked_forward(
    config: FalconConfig,
    params: Params,
    chosen: Selector,
    input: PredictorInput,
    tokens_BxT: jax.Array,
    positions_BxT: jax.Array | None = None,
    segment_ids_BxT: jax.Array | None = None,
    *,
    dtype: Any = jnp.float32,
) -> tuple[jax.Array, jax.Array]:
    """Final hidden states [B, T, D] with only the selected neurons, and how many were selected, [L, B, T].

    A neuron that is selected but does not fire stays zero. Traceable; thresholds and budgets are data.
    """
    model = Falcon(config, dtype, select=_reading(input))
    variables = {"params": params, "selector": {"layers": {"layer": chosen}}}
    hidden_BxTxD, updates = model.apply(
        variables, tokens_BxT, positions_BxT, segment_ids_BxT, method="hidden", mutable=["statistics"]
    )
    return hidden_BxTxD, updates["statistics"]["layers"]["mlp"]["kept"]


def compare_sparse(
    config: FalconConfig, params: Params, predictor: Predictor, batches: Iterable[Batch], *, dtype: Any = jnp.float32
) -> dict[str, Any]:
    """Compares the dense with the sparse model on text, on the current mesh if there is one (`use_mesh`).

    Returns:
      Results by name.

      - kl: KL(dense || sparse), nats a token.
      - agreement: fraction of the tokens with the same most likely next token.
      - dense_loss, sparse_loss: cross-entropy, nats a predicted token.
      - read, fired: fraction of the MLPs' neurons that were selected; that fire in the dense model.
      - read_per_layer, fired_per_layer: the same for each layer.
    """
    chosen = selector(predictor)
    totals: dict[str, np.ndarray] = {}
    for batch in batches:
        arrays = (batch[k] for k in BATCH_KEYS)
        sums = on_host(comparison_sums(config, predictor.input, dtype, params, chosen, *arrays))
        totals = {name: totals.get(name, 0) + value.astype(np.float64) for name, value in sums.items()}
    if not totals:
        raise FalconError("there is no batch of text to compare on")
    tokens, targets = float(totals["tokens"]), float(totals["targets"])
    read, fired = (totals[name].sum(1) / (tokens * config.d_ff) for name in ("read_LxB", "fired_LxB"))
    return {
        "kl": float(totals["kl"]) / tokens,
        "agreement": float(totals["agree"]) / tokens,
        "dense_loss": float(totals["dense_loss"]) / targets,
        "sparse_loss": float(totals["sparse_loss"]) / targets,
        "read": float(read.mean()),
        "fired": float(fired.mean()),
        "read_per_layer": read.tolist(),
        "fired_per_layer": fired.tolist(),
    }


def sensitivity(
    config: FalconConfig, params: Params, predictor: Predictor, batches: Sequence[Batch], *, dtype: Any = jnp.float32
) -> list[float]:
    """KL(dense || sparse) with one layer sparse, divided by the fraction of that layer's energy that is lost.

    Args:
      config: the model.
      params: its parameters.
      predictor: calibrated once, so that every layer loses a little.
      batches: text, a few thousand tokens; the model runs over it once for every layer.
      dtype: compute dtype.

    Returns:
      L numbers, nats, the weights that `calibrate_predictor` takes.
    """
    others = predictor.replace(thresholds=(EVERY,) * config.n_layers, budgets=(config.d_ff,) * config.n_layers)

    def alone(i: int) -> Predictor:
        thresholds = [*others.thresholds]
        thresholds[i] = predictor.thresholds[i]
        return others.replace(thresholds=tuple(thresholds))

    return [
        compare_sparse(config, params, alone(i), batches, dtype=dtype)["kl"] / max(1 - measured["energy"], 1e-6)
        for i, measured in enumerate(predictor.measured)
    ]


def reading_curve(
    config: FalconConfig,
    params: Params,
    predictor: Predictor,
    recording: Recording,
    batches: Sequence[Batch],
    reads: Sequence[float],
    *,
    sensitivity: Sequence[float] | None = None,
    dtype: Any = jnp.float32,
) -> Iterator[tuple[Predictor, dict[str, Any]]]:
    """Quality against neurons read: for each of `reads`, the predictor calibrated to it, and `compare_sparse` of it.

    The results also hold the point of `reads`, as "target"; what was read and fired on the text is measured beside it.

    Args:
      config: the model.
      params: its parameters.
      predictor: as fitted.
      recording: of the model and of the predictor's input; calibration uses its held-out tokens.
      batches: text to compare on.
      reads: numbers of neurons to read in all layers together, each divided by the number that fire.
      sensitivity: see `calibrate_predictor`.
      dtype: compute dtype.
    """
    curves = [measure(layer, recording, i) for i, layer in enumerate(predictor.layers)]
    firing = sum(curve.fired for curve in curves)
    for read in reads:
        point = calibrate_predictor(predictor, recording, neurons=read * firing, sensitivity=sensitivity, curves=curves)
        yield point, {"target": read} | compare_sparse(config, params, point, batches, dtype=dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def comparison_sums(
    config: FalconConfig,
    input: PredictorInput,
    dtype: Any,
    params: Params,
    chosen: Selector,
    tokens_BxT: jax.Array,
    positions_BxT: jax.Array,
    segments_BxT: jax.Array,
) -> dict[str, jax.Array]:
    """The program behind `compare_sparse`: sums over a batch."""
    model = Falcon(config, dtype)
    batch = (tokens_BxT, positions_BxT, segments_BxT)
    dense_BxTxD, updates = model.apply({"params": params}, *batch, method="hidden", mutable=["statistics"])
    sparse_BxTxD, kept_LxBxT = masked_forward(config, params, chosen, input, *batch, dtype=dtype)
    real_BxT = segments_BxT != 0
    targets_BxT, has_target_BxT = next_tokens(tokens_BxT, segments_BxT)

    def of_chunk(chunk: tuple[jax.Array, ...]) -> dict[str, jax.Array]:
        dense_BxCxD, sparse_BxCxD, targets_BxC, has_target_BxC, real_BxC = chunk
        p_BxCxV, q_BxCxV = (
            jax.nn.log_softmax(model.apply({"params": params}, h, method="unembed"))  # type: ignore[arg-type]
            for h in (dense_BxCxD, sparse_BxCxD)
        )

        def loss(log_BxCxV: jax.Array) -> jax.Array:
            return -jnp.sum(jnp.take_along_axis(log_BxCxV, targets_BxC[..., None], axis=-1)[..., 0] * has_target_BxC)

        return {
            "kl": jnp.sum(jnp.sum(jnp.exp(p_BxCxV) * (p_BxCxV - q_BxCxV), axis=-1) * real_BxC),
            "agree": jnp.sum((p_BxCxV.argmax(-1) == q_BxCxV.argmax(-1)) & real_BxC),
            "dense_loss": loss(p_BxCxV),
            "sparse_loss": loss(q_BxCxV),
        }

    # A chunk of positions at a time: the logits of a whole batch would need the most memory of all arrays.
    B, T = tokens_BxT.shape
    chunk = largest_divisor(T, max(_LOGIT_ROWS * batch_shards() // B, 1))
    rows = (dense_BxTxD, sparse_BxTxD, targets_BxT, has_target_BxT, real_BxT)
    sums = jax.lax.map(of_chunk, split_chunks(rows, chunk))
    fired_LxBxT = updates["statistics"]["layers"]["mlp"]["active"]
    return jax.tree.map(lambda x: x.sum(0), sums) | {
        "tokens": jnp.sum(real_BxT),
        "targets": jnp.sum(has_target_BxT),
        "read_LxB": jnp.sum(kept_LxBxT * real_BxT[None], axis=2),  # summed over rows too, int32 might not hold it
        "fired_LxB": jnp.sum(fired_LxBxT * real_BxT[None], axis=2),
    }


@functools.cache  # part of a static argument: the same object keeps `comparison_sums` from compiling again
def _reading(input: PredictorInput) -> Select:
    def keep(variables: Any, block_input: jax.Array, mlp_input: jax.Array) -> jax.Array:
        layer = variables["layer"]
        x = block_input if input == "block_input" else mlp_input
        return choose(score(layer.maps, x), layer.threshold_L, layer.budget_L)

    return keep
