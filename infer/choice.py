"""The rule by which predictor scores select neurons, in pure JAX; the kernels and the Flax model both use it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def choose(score: jax.Array, threshold: jax.Array | float, budget: jax.Array | int) -> jax.Array:
    """The mask [..., F] of selected neurons: those with a score of at least `threshold`, but at most `budget` of them.

    Where more than `budget` reach the threshold, the highest scores are selected, and of equal ones the lower indices.
    A NaN is never selected.

    Args:
      score: [..., F] f32; the last axis is one sequence's neurons.
      threshold: lowest score of a selected neuron.
      budget: most neurons selected.
    """
    budget = jnp.clip(jnp.asarray(budget), 0, score.shape[-1])
    found = score >= threshold
    key = jnp.where(found, _ordered(score), 0)
    lowest = _nth_highest(key, budget)
    above, tied = found & (key > lowest), found & (key == lowest)
    spare = budget - jnp.sum(above, -1, keepdims=True)
    return above | (tied & (jnp.cumsum(tied, -1) <= spare))


def _ordered(x: jax.Array) -> jax.Array:
    """uint32 keys above 0 in the order of the floats; both zeros have the same key."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    bits = jnp.where(x == 0, 0, bits)
    return jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))


def _nth_highest(key: jax.Array, n: jax.Array) -> jax.Array:
    """The largest number that at least n keys of each row reach, [..., 1], found bit by bit; all ones for n = 0."""

    def bit(i: jax.Array, cut: jax.Array) -> jax.Array:
        tried = cut | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(jnp.sum(key >= tried, -1, keepdims=True) >= n, tried, cut)

    return lax.fori_loop(0, 32, bit, jnp.zeros((*key.shape[:-1], 1), jnp.uint32))
