"""Products of rows with many vectors at once, for the prefill: blocks of rows widened to f32, then XLA's product.

XLA:CPU multiplies f32 matrices near the cores' peak but 16-bit ones far below it, and a whole matrix must never be
widened: a block's f32 copy stays small.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from infer.formats import Rows, widen

_BLOCK_BYTES = 16 << 20  # of the widened block


def rows_matmul(w: Rows, x: jax.Array) -> jax.Array:
    """y[..., m] = <row m, x[...]>: [..., M] f32 from [..., D] f32."""
    M, D = w.shape
    x_NxD = x.reshape(-1, D)

    def add(y_NxM: jax.Array, start: jax.Array, block_RxD: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(y_NxM, x_NxD @ block_RxD.T, start, 1)

    y_NxM = _over_blocks(w, jnp.zeros((len(x_NxD), M), jnp.float32), add)
    return y_NxM.reshape(*x.shape[:-1], M)


def weighted_rows_matmul(w: Rows, h: jax.Array) -> jax.Array:
    """y[...] = sum over m of h[..., m] * row m: [..., D] f32 from [..., M] f32."""
    M, D = w.shape
    h_NxM = h.reshape(-1, M)

    def add(y_NxD: jax.Array, start: jax.Array, block_RxD: jax.Array) -> jax.Array:
        return y_NxD + lax.dynamic_slice_in_dim(h_NxM, start, len(block_RxD), 1) @ block_RxD

    y_NxD = _over_blocks(w, jnp.zeros((len(h_NxM), D), jnp.float32), add)
    return y_NxD.reshape(*h.shape[:-1], D)


def _over_blocks(w: Rows, carry: jax.Array, add: Callable[..., jax.Array]) -> jax.Array:
    """Folds `add(carry, first row, widened rows)` over blocks of rows."""
    M, D = w.shape
    R = min(M, max(1, _BLOCK_BYTES // (4 * D)))

    def block(start: jax.Array, rows: int) -> jax.Array:
        part = lambda leaf: lax.dynamic_slice_in_dim(jnp.asarray(leaf), start, rows)  # noqa: E731
        return lax.optimization_barrier(widen(part(w.data), None if w.scale is None else part(w.scale)))

    def body(i: jax.Array, carry: jax.Array) -> jax.Array:
        return add(carry, i * R, block(i * R, R))

    carry = lax.fori_loop(0, M // R, body, carry)
    if rest := M % R:
        carry = add(carry, jnp.int32(M - rest), block(jnp.int32(M - rest), rest))
    return carry
