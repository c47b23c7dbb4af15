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
from falcon_relu.model import Falcon, Params
from infer.choice import choose
from infer.predictor.calibration import calibrate_predictor, measure
from infer.predictor.predictor import EVERY, LayerPredictor, Predictor, PredictorInput, score, stack
from infer.predictor.recording import BATCH_KEYS, Batch, Recording


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
    """Compares the dense with the sparse model on text.

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
        sums = _sums(config, predictor.input, dtype, params, chosen, *(batch[k] for k in BATCH_KEYS))
        totals = {name: totals.get(name, 0) + np.asarray(value, np.float64) for name, value in sums.items()}
    if not totals:
        raise FalconError("there is no batch of text to compare on")
    tokens, targets = float(totals["tokens"]), float(totals["targets"])
    read, fired = (totals[name] / (tokens * config.d_ff) for name in ("read_L", "fired_L"))
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
        yield point, {"read_over_firing": read} | compare_sparse(config, params, point, batches, dtype=dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sums(
    config: FalconConfig,
    input: PredictorInput,
    dtype: Any,
    params: Params,
    chosen: Selector,
    tokens_BxT: jax.Array,
    positions_BxT: jax.Array,
    segments_BxT: jax.Array,
) -> dict[str, jax.Array]:
    model = Falcon(config, dtype)
    batch = (tokens_BxT, positions_BxT, segments_BxT)
    dense_BxTxD, updates = model.apply({"params": params}, *batch, method="hidden", mutable=["statistics"])
    sparse_BxTxD, kept_LxBxT = masked_forward(config, params, chosen, input, *batch, dtype=dtype)
    real_BxT = segments_BxT != 0

    def of_sequence(rows: tuple[jax.Array, ...]) -> dict[str, jax.Array]:
        dense_TxD, sparse_TxD, tokens_T, segments_T = rows
        p_TxV, q_TxV = (
            jax.nn.log_softmax(model.apply({"params": params}, h[None], method="unembed")[0])
            for h in (dense_TxD, sparse_TxD)
        )
        real_T = segments_T != 0
        target_T = real_T[:-1] & (segments_T[1:] == segments_T[:-1])

        def loss(log_TxV: jax.Array) -> jax.Array:
            return -jnp.sum(jnp.take_along_axis(log_TxV[:-1], tokens_T[1:, None], axis=-1)[:, 0] * target_T)

        return {
            "kl": jnp.sum(jnp.sum(jnp.exp(p_TxV) * (p_TxV - q_TxV), axis=-1) * real_T),
            "agree": jnp.sum((p_TxV.argmax(-1) == q_TxV.argmax(-1)) & real_T),
            "dense_loss": loss(p_TxV),
            "sparse_loss": loss(q_TxV),
            "tokens": jnp.sum(real_T),
            "targets": jnp.sum(target_T),
        }

    # One sequence's logits at a time: those of a whole batch would need the most memory of all arrays.
    sums = jax.lax.map(of_sequence, (dense_BxTxD, sparse_BxTxD, tokens_BxT, segments_BxT))
    fired_LxBxT = updates["statistics"]["layers"]["mlp"]["active"]
    return jax.tree.map(lambda x: x.sum(0), sums) | {
        "read_L": jnp.sum(kept_LxBxT * real_BxT[None], axis=(1, 2)),
        "fired_L": jnp.sum(fired_LxBxT * real_BxT[None], axis=(1, 2)),
    }


@functools.cache  # the function is part of a static argument: the same object keeps `_sums` from compiling again
def _reading(input: PredictorInput) -> Select:
    def keep(variables: Any, block_input: jax.Array, mlp_input: jax.Array) -> jax.Array:
        layer = variables["layer"]
        x = block_input if input == "block_input" else mlp_input
        return choose(score(layer.maps, x), layer.threshold_L, layer.budget_L)

    return keep
