"""Position embeddings and attention as pure functions: rotary, ALiBi, and grouped-query attention in four kernels."""

from __future__ import annotations

import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

SHARED = -1  # segment of keys that every later token of the row attends to, whatever its own segment

SAVED_ATTENTION = "attention"  # name of the attention output that remat policies may keep, see `falcon_relu.model`

Attend = Literal["auto", "chunked", "xla", "cudnn", "splash"]

_LANES = 128  # of a TPU's vector unit; sequence lengths that splash attention takes are multiples of it
_SPLASH_BLOCK = 512  # queries and keys in a tile of the TPU kernel, at most

# Finite, so that a padding query, which attends to no key, gives a mean of the values rather than NaN.
_MASKED = -1e30


Rotation = tuple[jax.Array, jax.Array]  # cosines and sines of the angles of half a head, [B, T, H / 2] float32 each


def rotation(positions_BxT: jax.Array, head_dim: int, theta: float) -> Rotation:
    """Rotary angles of each position (RoFormer, arXiv:2104.09864).

    Computed once for all layers: computed inside a layer, XLA repeats the cosines for every head.
    """
    half = head_dim // 2
    frequency_h = theta ** (-np.arange(half, dtype=np.float32) / half)
    angle_BxTxh = positions_BxT[..., None].astype(jnp.float32) * frequency_h[None, None]
    return jnp.cos(angle_BxTxh), jnp.sin(angle_BxTxh)


def rotary(x_BxTxNxH: jax.Array, by: Rotation) -> jax.Array:
    """Rotates heads, the two halves of H being the pairs, in float32; the result has the dtype of `x_BxTxNxH`."""
    cos, sin = (part_BxTxh[:, :, None] for part_BxTxh in by)
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
    k_BxTxKxH: jax.Array,
    v_BxTxKxH: jax.Array,
    *,
    positions_BxT: jax.Array,
    segments_BxT: jax.Array,
    kind: Attend = "auto",
    use_alibi: bool = False,
    query_chunk: int | None = None,
) -> jax.Array:
    """Causal grouped-query self-attention of packed rows; returns [B, T, K, G, H] in the dtype of q.

    A query attends to the keys of its own segment up to its own place in the row. The output at padding (segment 0) is
    meaningless and differs between the kinds; elsewhere they agree. Only "xla" materialises the scores of all heads.

    Args:
      q_BxTxKxGxH: queries, G to a key-value head.
      k_BxTxKxH: keys.
      v_BxTxKxH: values.
      positions_BxT: position of each token in its segment, ascending along the row.
      segments_BxT: segment of each token, 0 for padding.
      kind: "chunked" (`attend_chunked`), "xla" and "cudnn" (`jax.nn.dot_product_attention`), "splash" (the Pallas
        kernel for TPUs; interpreted, and slow, elsewhere), or "auto": the fastest on the current platform.
      use_alibi: whether ALiBi biases are added; only "chunked" supports them.
      query_chunk: used by "chunked" only, see `attend_chunked`.

    Raises:
      ValueError: the kind does not support these inputs; the message says why.
    """
    if kind == "auto":
        kind = _fastest(q_BxTxKxGxH, use_alibi)
    if kind != "chunked" and use_alibi:
        raise ValueError(f"attention {kind!r} does not support ALiBi biases; use 'chunked' or 'auto'")
    match kind:
        case "xla" | "cudnn":
            return _attend_dot_product(q_BxTxKxGxH, k_BxTxKxH, v_BxTxKxH, segments_BxT, kind)
        case "splash":
            return _attend_splash(q_BxTxKxGxH, k_BxTxKxH, v_BxTxKxH, segments_BxT)
    return attend_chunked(
        q_BxTxKxGxH,
        k_BxTxKxH,
        v_BxTxKxH,
        q_positions_BxT=positions_BxT,
        k_positions_BxS=positions_BxT,
        q_segments_BxT=segments_BxT,
        k_segments_BxS=segments_BxT,
        use_alibi=use_alibi,
        query_chunk=query_chunk,
    )


def target_platform() -> str:
    """Platform that is compiled for: that of the current mesh, whose devices may be absent, or else JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _fastest(q_BxTxKxGxH: jax.Array, use_alibi: bool) -> Attend:
    if use_alibi:
        return "chunked"
    match target_platform():
        case "tpu" if q_BxTxKxGxH.shape[1] % _LANES == 0:
            return "splash"
        case "gpu" if q_BxTxKxGxH.dtype in (jnp.bfloat16, jnp.float16):
            return "cudnn"
    return "chunked"


def _attend_dot_product(
    q_BxTxKxGxH: jax.Array,
    k_BxTxKxH: jax.Array,
    v_BxTxKxH: jax.Array,
    segments_BxT: jax.Array,
    implementation: Literal["xla", "cudnn"],
) -> jax.Array:
    B, T, K, G, H = q_BxTxKxGxH.shape
    y_BxTxNxH = jax.nn.dot_product_attention(
        q_BxTxKxGxH.reshape(B, T, K * G, H),
        k_BxTxKxH,
        v_BxTxKxH,
        mask=(segments_BxT[:, :, None] == segments_BxT[:, None, :])[:, None],
        is_causal=True,
        implementation=implementation,
    )
    return y_BxTxNxH.reshape(B, T, K, G, H)


def _attend_splash(
    q_BxTxKxGxH: jax.Array, k_BxTxKxH: jax.Array, v_BxTxKxH: jax.Array, segments_BxT: jax.Array
) -> jax.Array:
    """Splash attention in a shard_map over rows and heads, because XLA cannot partition a Pallas kernel."""
    # Imported here: it takes tens of milliseconds and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, H = q_BxTxKxGxH.shape[1], q_BxTxKxGxH.shape[-1]
    if T % _LANES:
        raise ValueError(f"attention 'splash' needs a sequence length that is a multiple of {_LANES}, got {T}")
    block = max(size for size in range(_LANES, _SPLASH_BLOCK + 1, _LANES) if T % size == 0)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )

    def local(q_BxTxKxGxH: jax.Array, k_BxTxKxH: jax.Array, v_BxTxKxH: jax.Array, segments_BxT: jax.Array) -> jax.Array:
        B, _, K, G, _ = q_BxTxKxGxH.shape
        kernel = splash.make_splash_mha(
            masks.MultiHeadMask([masks.CausalMask((T, T))] * (K * G)),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=SAVED_ATTENTION,
            interpret=target_platform() != "tpu",
        )
        q_BxNxTxH = q_BxTxKxGxH.reshape(B, T, K * G, H).swapaxes(1, 2) * (1 / math.sqrt(H))
        y_BxNxTxH = jax.vmap(kernel)(
            q_BxNxTxH.astype(q_BxTxKxGxH.dtype),
            k_BxTxKxH.swapaxes(1, 2),
            v_BxTxKxH.swapaxes(1, 2),
            splash.SegmentIds(segments_BxT, segments_BxT),
        )
        return y_BxNxTxH.swapaxes(1, 2).reshape(q_BxTxKxGxH.shape)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not nn.get_logical_axis_rules():
        return local(q_BxTxKxGxH, k_BxTxKxH, v_BxTxKxH, segments_BxT)
    batch, heads = nn.logical_to_mesh_axes(("batch", "kv_heads")) or (None, None)
    if heads is not None and k_BxTxKxH.shape[2] % mesh.shape[heads]:
        heads = None
    P = jax.sharding.PartitionSpec
    split = (P(batch, None, heads), P(batch, None, heads), P(batch, None, heads), P(batch))
    return jax.shard_map(local, mesh=mesh, in_specs=split, out_specs=P(batch, None, heads), check_vma=False)(
        q_BxTxKxGxH, k_BxTxKxH, v_BxTxKxH, segments_BxT
    )


def attend_chunked(
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
    """Causal grouped-query attention to given keys, such as a cache's; returns [B, T, K, G, H] in the dtype of q.

    A query attends to the keys of its own segment, or of segment SHARED, at its own or an earlier position. Segment 0
    is padding (or an unused slot of a cache). This one rule covers packing, padding, causality, the cache, and rows
    that hold several continuations of one context. Softmax is in float32.

    Args:
      q_BxTxKxGxH: queries, G to a key-value head.
      k_BxSxKxH: keys.
      v_BxSxKxH: values.
      q_positions_BxT: position of each query in its segment.
      k_positions_BxS: position of each key.
      q_segments_BxT: segment of each query.
      k_segments_BxS: segment of each key.
      use_alibi: whether ALiBi biases are added.
      query_chunk: queries processed at a time; scores then take B x N x chunk x S instead of B x N x T x S, in the
        backward pass too. None, or at least T: all at once.

    Raises:
      ValueError: `query_chunk` does not divide T.
    """

    k_BxKxSxH, v_BxKxSxH = k_BxSxKxH.swapaxes(1, 2), v_BxSxKxH.swapaxes(1, 2)

    def block(q_BxCxKxGxH: jax.Array, positions_BxC: jax.Array, segments_BxC: jax.Array) -> jax.Array:
        B, C, K, G, H = q_BxCxKxGxH.shape
        k_segments_Bx1xS = k_segments_BxS[:, None, :]
        visible_BxCxS = (segments_BxC[:, :, None] == k_segments_Bx1xS) & (k_segments_Bx1xS != 0)
        visible_BxCxS |= k_segments_Bx1xS == SHARED
        visible_BxCxS &= positions_BxC[:, :, None] >= k_positions_BxS[:, None, :]
        bias = jnp.where(visible_BxCxS, 0.0, _MASKED)[:, None, None]
        if use_alibi:
            bias = bias + alibi_bias(jnp.asarray(alibi_slopes(K * G)), k_positions_BxS, H).reshape(B, K, G, 1, -1)
        # Batched products [G C, H] x [H, S], and the softmax's division last: twice as fast on a CPU as one einsum.
        q_BxKxGCxH = q_BxCxKxGxH.transpose(0, 2, 3, 1, 4).reshape(B, K, G * C, H)
        scores = jnp.einsum("bkqh,bksh->bkqs", q_BxKxGCxH, k_BxKxSxH, preferred_element_type=jnp.float32)
        # Reshaped before exp, so that its result is in the shape of the next product and is saved once for both.
        scores = (scores.reshape(B, K, G, C, -1) * (1 / math.sqrt(H)) + bias).reshape(scores.shape)
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        total_BxKxGCx1 = weights.sum(-1, keepdims=True)
        weights = weights.astype(v_BxSxKxH.dtype)
        y_BxKxGCxH = jnp.einsum("bkqs,bksh->bkqh", weights, v_BxKxSxH, preferred_element_type=jnp.float32)
        y_BxKxGxCxH = (y_BxKxGCxH / total_BxKxGCx1).reshape(B, K, G, C, H)
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
