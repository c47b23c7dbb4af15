"""What number formats and decoding modes cost in quality: the decode step run on given text, against a reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from falcon_relu.errors import FalconError
from infer import kernels
from infer.kernels.cache import CacheFormat
from infer.step import DecodeState, Mode, check_mode, decode_step, step_bytes
from infer.weights.layout import KINDS, DecodeWeights, Kind

K = TypeVar("K", bound=Hashable)


class DecodeSetting(NamedTuple):
    """A configuration of decoding to be measured: these weights, in this mode."""

    weights: DecodeWeights
    mode: Mode = "dense"
    cache: CacheFormat = "f32"


def measure_quality(
    reference: DecodeWeights,
    settings: Mapping[K, DecodeSetting],
    batches: Iterable[np.ndarray],
    *,
    backend: kernels.Backend = "auto",
) -> dict[K, dict[str, float]]:
    """How far decoding in each setting is from the reference's dense decoding, token by token on the same text.

    Args:
      reference: the model in the number format that the others are compared with.
      settings: what to measure, by name.
      batches: token ids [B, T], int32. The sequences of a batch are decoded together, so that "sparse" reads the union
        of the neurons selected for them.
      backend: kernels to use.

    Returns:
      Metrics of each setting, by its name.

      - kl: KL(reference || setting), nats a token.
      - agreement: share of tokens with the same likeliest next token.
      - loss: cross-entropy of the next token, nats.
      - read, fired: shares of the up-projections' and of the down-projections' rows that are read.
      - bytes: bytes of weights read for a step.

    Raises:
      FalconError: the weights cannot serve a mode, or there is no batch.
    """
    for setting in settings.values():
        check_mode(setting.weights, setting.mode)
    totals: dict[K, np.ndarray] = {name: np.zeros(6) for name in settings}
    tokens = targets = steps = 0
    for tokens_BxT in batches:
        B, T = tokens_BxT.shape
        expected, _ = teacher_forced(reference, tokens_BxT, backend=backend)
        for name, setting in settings.items():
            logits, reads = teacher_forced(
                setting.weights, tokens_BxT, mode=setting.mode, backend=backend, cache=setting.cache
            )
            totals[name] += np.concatenate([np.asarray(_sums(expected, logits, tokens_BxT), np.float64), reads])
        tokens, targets, steps = tokens + B * T, targets + B * (T - 1), steps + T
    if not steps:
        raise FalconError("there is no batch of text to decode")
    counts = dict(kl=tokens, agreement=tokens, loss=targets, read=steps, fired=steps, bytes=steps)
    return {
        name: {metric: float(sum_ / n) for (metric, n), sum_ in zip(counts.items(), sums, strict=True)}
        for name, sums in totals.items()
    }


def one_kind(weights: DecodeWeights, other: DecodeWeights, kind: Kind) -> DecodeWeights:
    """`weights` with the matrices of one kind replaced by those of `other`; nothing is copied."""

    def replaced(part: Any, source: Any) -> Any:
        names = [name for name in KINDS[kind] if hasattr(part, name)]
        return dataclasses.replace(part, **{name: getattr(source, name) for name in names})

    layers = tuple(replaced(*pair) for pair in zip(weights.layers, other.layers, strict=True))
    return dataclasses.replace(replaced(weights, other), layers=layers)


def teacher_forced(
    weights: DecodeWeights,
    tokens_BxT: np.ndarray,
    *,
    mode: Mode = "dense",
    backend: kernels.Backend = "auto",
    cache: CacheFormat = "f32",
) -> tuple[jax.Array, np.ndarray]:
    """Logits [B, T, V] after each of the given tokens; sums over the T steps of the shares of up-projection and
    down-projection rows read, and of the bytes read.
    """
    B, T = tokens_BxT.shape
    c = weights.config
    state = DecodeState.empty(c, B, T, cache)
    logits, sums = [], np.zeros(3)
    for token_B in jnp.asarray(tokens_BxT, jnp.int32).T:
        logits_BxV, state, reads = decode_step(weights, state, token_B, mode=mode, backend=backend)
        logits.append(logits_BxV)
        shares = [float(rows_L.sum()) / (c.d_ff * c.n_layers) for rows_L in (reads.up_L, reads.down_L)]
        sums += [*shares, step_bytes(weights, reads, mode)]
    return jnp.stack(logits, axis=1), sums


@jax.jit
def _sums(p_BxTxV: jax.Array, q_BxTxV: jax.Array, tokens_BxT: jax.Array) -> jax.Array:
    """Sums over tokens: KL(p || q), the same likeliest token or not, -log q of the next token."""
    p, q = (jax.nn.log_softmax(logits) for logits in (p_BxTxV, q_BxTxV))
    kl = jnp.sum(jnp.exp(p) * (p - q))
    same = jnp.sum(p.argmax(-1) == q.argmax(-1))
    loss = -jnp.sum(jnp.take_along_axis(q[:, :-1], tokens_BxT[:, 1:, None], axis=-1))
    return jnp.stack([kl, same, loss])
