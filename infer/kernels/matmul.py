"""Products of rows with many vectors at once, for the prefill: XLA's matrix product over blocks of rows.

bf16, int8 and int4 rows are multiplied in bf16 (exact for the first two) with the vectors rounded to bf16 and sums in
f32, which CPUs with bf16 instructions do twice as fast as f32; f32 and f16 rows in f32. No whole matrix is converted,
only a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from infer.weights.formats import Array, Rows, part, widen

_BLOCK_BYTES = 16 << 20  # of the widened block


def rows_matmul(w: Rows, x: jax.Array, count: Array | None = None) -> jax.Array:
    """y[..., m] = <row m, x[...]>: [..., M] f32 from [..., D] f32.

    Only the first `count` vectors (of all, flattened) are of use to the caller; what comes out for others is finite.
    Here they are all multiplied: the shapes of XLA's products are fixed.
    """
    M, D = w.shape
    x_NxD = x.reshape(math.prod(x.shape[:-1]), D)  # also of no vectors, of which -1 cannot tell how many

    def add(y_NxM: jax.Array, start: jax.Array, rows_RxD: jax.Array, scale_R: jax.Array | None) -> jax.Array:
        y_NxR = _product(x_NxD, rows_RxD, 1)
        y_NxR = y_NxR if scale_R is None else y_NxR * scale_R[None]
        return lax.dynamic_update_slice_in_dim(y_NxM, y_NxR, start, 1)

    return _over_blocks(w, jnp.zeros((len(x_NxD), M), jnp.float32), add).reshape(*x.shape[:-1], M)


def weighted_rows_matmul(w: Rows, h: jax.Array, count: Array | None = None) -> jax.Array:
    """y[...] = sum over m of h[..., m] * row m: [..., D] f32 from [..., M] f32; `count` as in `rows_matmul`."""
    M, D = w.shape
    h_NxM = h.reshape(math.prod(h.shape[:-1]), M)

    def add(y_NxD: jax.Array, start: jax.Array, rows_RxD: jax.Array, scale_R: jax.Array | None) -> jax.Array:
        h_NxR = lax.dynamic_slice_in_dim(h_NxM, start, len(rows_RxD), 1)
        return y_NxD + _product(h_NxR if scale_R is None else h_NxR * scale_R[None], rows_RxD, 0)

    return _over_blocks(w, jnp.zeros((len(h_NxM), D), jnp.float32), add).reshape(*h.shape[:-1], D)


def _product(x: jax.Array, rows: jax.Array, axis: int) -> jax.Array:
    """x times rows, summed over the second axis of x and the given one of the rows, in f32."""
    contracted = (((1,), (axis,)), ((), ()))
    return lax.dot_general(x.astype(rows.dtype), rows, contracted, preferred_element_type=jnp.float32)


def _over_blocks(w: Rows, carry: jax.Array, add: Callable[..., jax.Array]) -> jax.Array:
    """Folds `add(carry, first row, rows as they are multiplied, their scales or None)` over blocks of rows."""
    M, D = w.shape
    R = min(M, max(1, _BLOCK_BYTES // (4 * D)))

    def step(carry: jax.Array, start: jax.Array, rows: int) -> jax.Array:
        some = part(w, lambda leaf: lax.dynamic_slice_in_dim(leaf, start, rows))
        multiplied = lax.optimization_barrier(_as_multiplied(some))
        return add(carry, start, multiplied, some.scale if w.format == "int8" else None)

    carry = lax.fori_loop(0, M // R, lambda i, carry: step(carry, i * R, R), carry)
    rest = M % R
    return step(carry, jnp.int32(M - rest), rest) if rest else carry


def _as_multiplied(rows: Rows) -> jax.Array:
    data = jnp.asarray(rows.data)
    match rows.format:
        case "bf16":
            return lax.bitcast_convert_type(data, jnp.bfloat16)
        case "int8":
            return data.astype(jnp.bfloat16)
        case "int4":
            return widen(rows).astype(jnp.bfloat16)
        case _:
            return data.astype(jnp.float32)
