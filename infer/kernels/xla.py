"""The portable backend: the kernels in pure JAX, which also says what the native ones must compute.

XLA:CPU multiplies 16-bit matrices at a tenth of the memory's speed, so everything is a loop over blocks of rows,
widened into the cache and multiplied there in f32.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from infer.choice import choose
from infer.kernels.cache import Cache
from infer.kernels.matmul import rows_matmul, weighted_rows_matmul  # noqa: F401
from infer.weights.formats import Rows, take

_BLOCK_BYTES = 4 << 20  # of a widened block: in the cache
_KEYS = 256  # cache positions a step of a loop


def rows_dot(w: Rows, x_BxD: jax.Array) -> jax.Array:
    """y[b, m] = <row m, x_b>: [B, M] f32 from f32 vectors."""
    return _dot(w, None, None, w.shape[0], x_BxD)


def gathered_rows_dot(w: Rows, index_A: jax.Array, count: jax.Array, x_BxD: jax.Array) -> jax.Array:
    """h[b, a] = <row index[a], x_b> for a < count, else 0: [B, A] f32.

    Args:
      w: the matrix; only the rows named are read.
      index_A: row numbers, int32; the first `count` count.
      count: int32 scalar.
      x_BxD: f32.
    """
    return _dot(w, index_A, count, index_A.shape[0], x_BxD)


def weighted_row_sum(
    w: Rows,
    h_BxA: jax.Array,
    index_A: jax.Array | None = None,
    count: jax.Array | None = None,
    skip_zeros: bool = False,
) -> jax.Array:
    """y[b] = sum over a < count of h[b, a] * row index[a]: [B, D] f32; without an index over every row.

    With `skip_zeros` (a static choice), rows whose weight is 0 in every sequence are not read.
    """
    if skip_zeros:
        index_A, count, h_BxA = _without_zeros(h_BxA, index_A, count)
    B, A = h_BxA.shape

    def add(y_BxD: jax.Array, start: jax.Array, fresh_R: jax.Array, rows_RxD: jax.Array) -> jax.Array:
        h_BxR = lax.dynamic_slice_in_dim(h_BxA, start, len(fresh_R), 1)
        return y_BxD + jnp.where(fresh_R[None], h_BxR, 0) @ rows_RxD

    return _fold(w, index_A, count, A, jnp.zeros((B, w.shape[1]), jnp.float32), add)


def select(score_BxF: jax.Array, threshold: jax.Array, budget: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The neurons that any sequence chooses, each for itself by the rule of `infer.choice.choose`.

    Returns:
      index_F: int32, the neurons in ascending order, then F up to the end.
      count: int32 scalar, how many.
      chosen_BxF: bool, whether sequence b has chosen neuron index[i]; false from the count on.
    """
    F = score_BxF.shape[1]
    chosen_BxF = choose(score_BxF, threshold, budget)
    index_F, count = _positions(jnp.any(chosen_BxF, axis=0))
    return index_F, count, chosen_BxF[:, jnp.minimum(index_F, F - 1)] & (jnp.arange(F) < count)[None]


def attend(
    q_BxTxKxGxH: jax.Array,
    keys: Cache,
    values: Cache,
    length_BxT: jax.Array,
    bias_NxS: jax.Array | None = None,
) -> jax.Array:
    """softmax(q . k / sqrt(H) + bias) v over each query's first `length` positions: [B, T, K, G, H] f32.

    Args:
      q_BxTxKxGxH: f32, T queries a sequence.
      keys: [B, S, K, H]; not read past the greatest length.
      values: likewise.
      length_BxT: int32, at least 1.
      bias_NxS: f32 bias of every query head on the scaled scores (ALiBi).
    """
    B, T, K, G, H = q_BxTxKxGxH.shape
    S = keys.shape[1]
    step = min(_KEYS, S)
    q_BxKxGTxH = q_BxTxKxGxH.transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H) * H**-0.5

    def block(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        high, total, out = carry
        start = jnp.minimum(i * step, S - step)  # the last block may overlap: what was seen before is masked
        k, v = (cache.positions(start, step).wide().swapaxes(1, 2) for cache in (keys, values))
        score = jnp.einsum("bkqh,bksh->bkqs", q_BxKxGTxH, k).reshape(B, K, G, T, step)
        if bias_NxS is not None:
            score += lax.dynamic_slice_in_dim(bias_NxS, start, step, 1).reshape(1, K, G, 1, step)
        position = start + jnp.arange(step)[None, None]
        seen_BxTxs = (position >= i * step) & (position < length_BxT[:, :, None])
        score = jnp.where(seen_BxTxs[:, None, None], score, -jnp.inf).reshape(B, K, G * T, step)
        higher = jnp.maximum(high, jnp.max(score, -1))
        p, shrink = jnp.exp(score - higher[..., None]), jnp.exp(high - higher)
        out = out * shrink[..., None] + jnp.einsum("bkqs,bksh->bkqh", p, v)
        return higher, total * shrink + jnp.sum(p, -1), out

    start = (jnp.full((B, K, G * T), -1e30), jnp.zeros((B, K, G * T)), jnp.zeros((B, K, G * T, H)))
    _, total, out = lax.fori_loop(0, -(-jnp.max(length_BxT) // step), block, start)
    return (out / total[..., None]).reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4)


def read_rows(
    w: Rows, index_A: jax.Array | None = None, count: jax.Array | None = None, seen: jax.Array | int = 0
) -> jax.Array:
    """Reads the rows, after `seen` is known, and returns a number that depends on all of them: a measure of memory."""
    A = w.shape[0] if index_A is None else index_A.shape[0]

    def add(seen: jax.Array, start: jax.Array, fresh_R: jax.Array, rows_RxD: jax.Array) -> jax.Array:
        return seen + jnp.sum(rows_RxD)

    return _fold(w, index_A, count, A, jnp.asarray(seen, jnp.float32), add).astype(jnp.int32)


# ---- blocks of rows


def _dot(w: Rows, index_A: jax.Array | None, count: jax.Array | None, outputs: int, x_BxD: jax.Array) -> jax.Array:
    def write(y_BxA: jax.Array, start: jax.Array, fresh_R: jax.Array, rows_RxD: jax.Array) -> jax.Array:
        # One vector is multiplied as a vector, for which XLA has faster code.
        y_RxB = (rows_RxD @ x_BxD[0])[:, None] if len(x_BxD) == 1 else rows_RxD @ x_BxD.T
        return lax.dynamic_update_slice_in_dim(y_BxA, y_RxB.T, start, 1)

    y_BxA = _fold(w, index_A, count, outputs, jnp.zeros((len(x_BxD), outputs), jnp.float32), write)
    return y_BxA if count is None else jnp.where(jnp.arange(outputs)[None] < count, y_BxA, 0)


def _fold(
    w: Rows,
    index_A: jax.Array | None,
    count: jax.Array | None,
    positions: int,
    carry: jax.Array,
    step: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Folds step(carry, first position, whether positions [R] are in use and new, rows [R, D] in f32) over blocks.

    The last block is moved back to end at the last position; what came before in it is not new.
    """
    R = max(1, min(positions, _BLOCK_BYTES // (4 * w.shape[1])))
    total = jnp.asarray(positions if count is None else count, jnp.int32)

    def body(i: jax.Array, carry: jax.Array) -> jax.Array:
        start = jnp.minimum(i * R, positions - R)
        position_R = start + jnp.arange(R, dtype=jnp.int32)
        fresh_R = (position_R >= i * R) & (position_R < total)
        row_R = position_R if index_A is None else jnp.asarray(index_A)[position_R]
        # Past the count an index names no row. Without the barriers row numbers would be computed again for every
        # element and the product taken element by element.
        row_R = lax.optimization_barrier(jnp.minimum(row_R, w.shape[0] - 1))
        rows_RxD = lax.optimization_barrier(take(w, row_R))
        return step(carry, start, fresh_R, rows_RxD)

    return lax.fori_loop(0, -(-total // R), body, carry)


# ---- positions


def _without_zeros(
    h_BxA: jax.Array, index_A: jax.Array | None, count: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    A = h_BxA.shape[1]
    used_A = jnp.any(h_BxA != 0, axis=0) & (True if count is None else jnp.arange(A) < count)
    position_A, n_used = _positions(used_A)
    position_A = jnp.minimum(position_A, A - 1)
    index_A = position_A if index_A is None else index_A[position_A]
    return index_A, n_used, h_BxA[:, position_A]


def _positions(true_F: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where an entry is true, in ascending order, then F up to the end; and how many there are."""
    F = len(true_F)
    place_F = jnp.where(true_F, jnp.cumsum(true_F) - 1, F)
    index_F = jnp.full(F, F, jnp.int32).at[place_F].set(jnp.arange(F, dtype=jnp.int32), mode="drop")
    return index_F, jnp.sum(true_F).astype(jnp.int32)
