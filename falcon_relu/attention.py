"""Positions and attention as pure functions: rotary, ALiBi, masked grouped-query attention."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

# Finite, so that a row without any visible key (padding) gives a mean of values and not NaN.
_MASKED = -1e30


def rotary(x_BxTxNxH: jax.Array, positions_BxT: jax.Array, theta: float) -> jax.Array:
    """Rotates heads by their positions (RoFormer, arXiv:2104.09864; the two halves of H form the pairs).

    Angles, cosines and the rotation are in float32; the result has the dtype of `x_BxTxNxH`.
    """
    half = x_BxTxNxH.shape[-1] // 2
    frequency_h = theta ** (-np.arange(half, dtype=np.float32) / half)
    angle_BxTx1xh = positions_BxT[..., None, None].astype(jnp.float32) * frequency_h[None, None, None, :]
    cos, sin = jnp.cos(angle_BxTx1xh), jnp.sin(angle_BxTx1xh)
    first, second = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BxTxNxH.dtype)


def alibi_slopes(n_heads: int) -> np.ndarray:
    """Slope of each head's linear position bias, [N] float32 (ALiBi, arXiv:2108.12409)."""

    def geometric(n: int) -> np.ndarray:
        return (2.0 ** (-8.0 / n)) ** np.arange(1, n + 1, dtype=np.float32)

    power = 2 ** math.floor(math.log2(n_heads))
    slopes = np.concatenate([geometric(power), geometric(2 * power)[0::2][: n_heads - power]])
    return slopes.astype(np.float32)


def alibi_bias(slopes_N: jax.Array, key_positions_BxS: jax.Array, head_dim: int) -> jax.Array:
    """Bias [B, N, S] float32 on the scaled attention scores.

    Falcon-RW computes slope x position in bfloat16 and adds it before the 1/sqrt(H) scaling; both are kept, since
    the checkpoints were trained with them.
    """
    product = slopes_N.astype(jnp.bfloat16)[None, :, None] * key_positions_BxS.astype(jnp.bfloat16)[:, None, :]
    return product.astype(jnp.float32) / math.sqrt(head_dim)


def attend(
    q_BxTxKxGxH: jax.Array,
    k_BxSxKxH: jax.Array,
    v_BxSxKxH: jax.Array,
    *,
    q_positions_BxT: jax.Array,
    k_positions_BxS: jax.Array,
    q_segments_BxT: jax.Array,
    k_segments_BxS: jax.Array,
    use_alibi: bool = False,
    query_chunk: int | None = None,
) -> jax.Array:
    """Causal grouped-query attention; returns [B, T, K, G, H] in the dtype of q.

    A query sees a key of its own segment at its own or an earlier position. Segment 0 is padding (or an unused slot of
    a cache). One rule thus covers packing, padding, causality and the cache. Softmax is in float32.

    Args:
      q_BxTxKxGxH: queries, G to a key-value head.
      k_BxSxKxH: keys.
      v_BxSxKxH: values.
      q_positions_BxT: position of each query in its segment.
      k_positions_BxS: position of each key.
      q_segments_BxT: segment of each query.
      k_segments_BxS: segment of each key.
      use_alibi: whether ALiBi biases are added.
      query_chunk: queries handled at a time; scores then take B x N x chunk x S instead of B x N x T x S, in the
        backward pass too. None, or T not above it, handles all at once.
    """

    k_BxKxSxH, v_BxKxSxH = k_BxSxKxH.swapaxes(1, 2), v_BxSxKxH.swapaxes(1, 2)

    def block(q_BxCxKxGxH: jax.Array, positions_BxC: jax.Array, segments_BxC: jax.Array) -> jax.Array:
        B, C, K, G, H = q_BxCxKxGxH.shape
        visible_BxCxS = (segments_BxC[:, :, None] == k_segments_BxS[:, None, :]) & (k_segments_BxS[:, None, :] != 0)
        visible_BxCxS &= positions_BxC[:, :, None] >= k_positions_BxS[:, None, :]
        bias = jnp.where(visible_BxCxS, 0.0, _MASKED)[:, None, None]
        if use_alibi:
            bias = bias + alibi_bias(jnp.asarray(alibi_slopes(K * G)), k_positions_BxS, H).reshape(B, K, G, 1, -1)
        # Plain batched products [G C, H] x [H, S], with the sums divided last: twice as fast on a CPU as the einsum.
        q_BxKxGCxH = q_BxCxKxGxH.transpose(0, 2, 3, 1, 4).reshape(B, K, G * C, H)
        scores = jnp.einsum("bkqh,bksh->bkqs", q_BxKxGCxH, k_BxKxSxH, preferred_element_type=jnp.float32)
        scores = scores.reshape(B, K, G, C, -1) * (1 / math.sqrt(H)) + bias
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        total_BxKxGxCx1 = weights.sum(-1, keepdims=True)
        weights = weights.astype(v_BxSxKxH.dtype).reshape(B, K, G * C, -1)
        y_BxKxGCxH = jnp.einsum("bkqs,bksh->bkqh", weights, v_BxKxSxH, preferred_element_type=jnp.float32)
        y_BxKxGxCxH = y_BxKxGCxH.reshape(B, K, G, C, H) / total_BxKxGxCx1
        return y_BxKxGxCxH.astype(q_BxCxKxGxH.dtype).transpose(0, 3, 1, 2, 4)

    T = q_BxTxKxGxH.shape[1]
    if query_chunk is None or query_chunk >= T:
        return block(q_BxTxKxGxH, q_positions_BxT, q_segments_BxT)
    if T % query_chunk:
        raise ValueError(f"query_chunk ({query_chunk}) must divide the number of queries ({T})")

    def chunks(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [T / chunk, B, chunk, ...]
        return jnp.moveaxis(x.reshape(x.shape[0], T // query_chunk, query_chunk, *x.shape[2:]), 1, 0)

    out = jax.lax.map(
        lambda piece: jax.checkpoint(block)(*piece),
        (chunks(q_BxTxKxGxH), chunks(q_positions_BxT), chunks(q_segments_BxT)),
    )
    return jnp.moveaxis(out, 0, 1).reshape(q_BxTxKxGxH.shape)
