"""The portable backend: the kernels in pure JAX, which also says what the native ones must compute.

What XLA:CPU does well with 16-bit rows is elementwise work on 32-bit lanes inside a loop over blocks of rows; its
own conversions and gathers run at a tenth of that, and it hoists the conversion of a whole matrix out of a loop.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from infer.formats import Array, Rows

_BLOCK = 16  # rows a step of a loop
_KEYS = 256  # cache positions a step of a loop


def rows_dot(w: Rows, x_BxD: jax.Array) -> jax.Array:
    """y[b, m] = <row m, x_b>: [B, M] f32 from f32 vectors."""
    return _dot(w, None, w.shape[0], w.shape[0], x_BxD)


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
    total = jnp.asarray(A if count is None else count, jnp.int32)
    columns = w.shape[1]

    def add(i: jax.Array, planes: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        position, rows = _block_rows(w, index_A, total, i)
        weight_BxR = (
            jnp.where((position < total)[None], h_BxA[:, jnp.minimum(position, A - 1)], 0) * _row_scale(w, rows)[None]
        )
        block = _widen(_take(w.data, index_A, rows), columns)
        for r in range(_BLOCK):
            planes = tuple(y + weight_BxR[:, r, None] * plane[r][None] for y, plane in zip(planes, block, strict=True))
        return planes

    width = _planes(w.data.dtype, columns)
    start = tuple(jnp.zeros((B, columns // width), jnp.float32) for _ in range(width))
    return _join(lax.fori_loop(0, -(-total // _BLOCK), add, start))


def select(score_BxF: jax.Array, threshold: jax.Array, budget: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The neurons whose score reaches the threshold in any sequence; if they are more than `budget`, the highest.

    A neuron's score is its highest over the batch; of equal scores the lower neurons stay. A NaN reaches nothing.

    Returns:
      index_F: int32, the neurons in ascending order, then F up to the end.
      count: int32 scalar, how many.
    """
    F = score_BxF.shape[1]
    best_F = jnp.max(jnp.where(jnp.isnan(score_BxF), -jnp.inf, score_BxF), axis=0)
    found_F = jnp.any(score_BxF >= threshold, axis=0)
    key_F = jnp.where(found_F, _ordered(best_F), 0)
    budget = jnp.clip(budget, 0, F)
    cut = _nth_highest(key_F, budget)
    tied_F = found_F & (key_F == cut)
    spare = budget - jnp.sum(found_F & (key_F > cut))
    kept_F = found_F & ((key_F > cut) | (tied_F & (jnp.cumsum(tied_F) <= spare)))
    place_F = jnp.where(kept_F, jnp.cumsum(kept_F) - 1, F)
    index_F = jnp.full(F, F, jnp.int32).at[place_F].set(jnp.arange(F, dtype=jnp.int32), mode="drop")
    return index_F, jnp.sum(kept_F).astype(jnp.int32)


def attend(
    q_BxKxGxH: jax.Array,
    k_BxSxKxH: jax.Array,
    v_BxSxKxH: jax.Array,
    length_B: jax.Array,
    bias_NxS: jax.Array | None = None,
) -> jax.Array:
    """softmax(q . k / sqrt(H) + bias) v over each sequence's first `length` positions: [B, K, G, H] f32.

    Args:
      q_BxKxGxH: f32 queries, one position a sequence.
      k_BxSxKxH: key cache, f32, bf16 or f16; not read past the longest sequence.
      v_BxSxKxH: value cache.
      length_B: int32, at least 1.
      bias_NxS: f32 bias of every query head on the scaled scores (ALiBi).
    """
    B, K, G, H = q_BxKxGxH.shape
    S = k_BxSxKxH.shape[1]
    step = min(_KEYS, S)

    def block(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        high, total, out = carry
        start = jnp.minimum(i * step, S - step)  # the last block may overlap: what was seen before is masked
        k = lax.dynamic_slice_in_dim(k_BxSxKxH, start, step, 1).astype(jnp.float32)
        v = lax.dynamic_slice_in_dim(v_BxSxKxH, start, step, 1).astype(jnp.float32)
        score = jnp.einsum("bkgh,bskh->bkgs", q_BxKxGxH, k) * H**-0.5
        if bias_NxS is not None:
            score += lax.dynamic_slice_in_dim(bias_NxS, start, step, 1).reshape(1, K, G, step)
        position = start + jnp.arange(step)[None]
        seen = (position >= i * step) & (position < length_B[:, None])
        score = jnp.where(seen[:, None, None], score, -jnp.inf)
        higher = jnp.maximum(high, jnp.max(score, -1))
        p, shrink = jnp.exp(score - higher[..., None]), jnp.exp(high - higher)
        out = out * shrink[..., None] + jnp.einsum("bkgs,bskh->bkgh", p, v)
        return higher, total * shrink + jnp.sum(p, -1), out

    start = (jnp.full((B, K, G), -1e30), jnp.zeros((B, K, G)), jnp.zeros((B, K, G, H)))
    _, total, out = lax.fori_loop(0, -(-jnp.max(length_B) // step), block, start)
    return out / total[..., None]


def read_rows(w: Rows, index_A: jax.Array | None = None, count: jax.Array | None = None) -> jax.Array:
    """Reads the rows and returns a number that depends on all of them: a measure of memory."""
    A = w.shape[0] if index_A is None else index_A.shape[0]
    total = jnp.asarray(A if count is None else count, jnp.int32)

    def add(i: jax.Array, seen: jax.Array) -> jax.Array:
        _, rows = _block_rows(w, index_A, total, i)
        return seen + jnp.sum(_take(w.data, index_A, rows).astype(jnp.int32))

    return lax.fori_loop(0, -(-total // _BLOCK), add, jnp.int32(0))


# ---- blocks of rows


def _block_rows(w: Rows, index_A: jax.Array | None, total: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Positions [R] of block i and the rows [R] that stand there; past the end the last row again."""
    position = i * _BLOCK + jnp.arange(_BLOCK)
    last = jnp.minimum(position, total - 1)
    return position, last if index_A is None else index_A[last]


def _take(data: Array, index_A: jax.Array | None, rows: jax.Array) -> jax.Array:
    """The rows [R, ...] of a block, each a slice of its own: XLA's gather is ten times slower."""
    return jnp.concatenate([lax.dynamic_slice_in_dim(jnp.asarray(data), rows[r], 1, 0) for r in range(_BLOCK)])


def _row_scale(w: Rows, rows: jax.Array) -> jax.Array:
    return jnp.ones(rows.shape) if w.scale is None else jnp.asarray(w.scale)[rows]


def _planes(dtype: jnp.dtype, columns: int) -> int:
    """In how many vectors a row is widened: even and odd columns for bf16, where a pair is one 32-bit lane."""
    return 2 if dtype == jnp.bfloat16 and columns % 2 == 0 else 1


def _widen(block_RxD: jax.Array, columns: int) -> tuple[jax.Array, ...]:
    if _planes(block_RxD.dtype, columns) == 1:
        return (block_RxD.astype(jnp.float32),)
    pairs = lax.bitcast_convert_type(block_RxD.reshape(*block_RxD.shape[:-1], columns // 2, 2), jnp.uint32)
    return (
        lax.bitcast_convert_type(pairs << 16, jnp.float32),
        lax.bitcast_convert_type(pairs & jnp.uint32(0xFFFF0000), jnp.float32),
    )


def _split(x_BxD: jax.Array, planes: int) -> tuple[jax.Array, ...]:
    return tuple(x_BxD[:, i::planes] for i in range(planes))


def _join(planes: tuple[jax.Array, ...]) -> jax.Array:
    return jnp.stack(planes, -1).reshape(planes[0].shape[0], -1)


def _dot(w: Rows, index_A: jax.Array | None, count: jax.Array | int, outputs: int, x_BxD: jax.Array) -> jax.Array:
    B, columns = x_BxD.shape
    total = jnp.asarray(count, jnp.int32)
    x = _split(x_BxD, _planes(w.data.dtype, columns))

    def block(i: jax.Array, y_BxA: jax.Array) -> jax.Array:
        _, rows = _block_rows(w, index_A, total, i)
        widened = _widen(_take(w.data, index_A, rows), columns)
        dots = [
            sum(jnp.sum(plane * part[b][None], -1) for plane, part in zip(widened, x, strict=True))
            * _row_scale(w, rows)
            for b in range(B)
        ]
        return lax.dynamic_update_slice_in_dim(y_BxA, jnp.stack(dots), i * _BLOCK, 1)

    padded = -(-outputs // _BLOCK) * _BLOCK
    y = lax.fori_loop(0, -(-total // _BLOCK), block, jnp.zeros((B, padded), jnp.float32))[:, :outputs]
    return y if index_A is None else jnp.where(jnp.arange(outputs)[None] < total, y, 0)


# ---- selection


def _without_zeros(
    h_BxA: jax.Array, index_A: jax.Array | None, count: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    A = h_BxA.shape[1]
    used_A = jnp.any(h_BxA != 0, axis=0) & (True if count is None else jnp.arange(A) < count)
    position_A = jnp.nonzero(used_A, size=A, fill_value=0)[0].astype(jnp.int32)
    index_A = position_A if index_A is None else index_A[position_A]
    return index_A, jnp.sum(used_A).astype(jnp.int32), h_BxA[:, position_A]


def _ordered(x: jax.Array) -> jax.Array:
    """uint32 above 0 in the order of the floats; both zeros alike."""
    bits = lax.bitcast_convert_type(x + 0.0, jnp.uint32)
    bits = jnp.where(x == 0, 0, bits)
    return jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))


def _nth_highest(key_F: jax.Array, n: jax.Array) -> jax.Array:
    """The largest key that at least n keys reach, found bit by bit; the largest uint32 for n = 0."""

    def bit(i: jax.Array, cut: jax.Array) -> jax.Array:
        tried = cut | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(jnp.sum(key_F >= tried) >= n, tried, cut)

    return lax.fori_loop(0, 32, bit, jnp.uint32(0))
