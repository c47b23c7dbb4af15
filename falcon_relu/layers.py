"""The layers of a Falcon as Flax modules: LayerNorm, attention, MLP, and the block that joins them.

`falcon_relu.model` stacks the blocks and lists all parameters with their shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from falcon_relu.attention import SAVED_ATTENTION, Attend, Rotation, attend, attend_chunked, rotary
from falcon_relu.config import Activation, FalconConfig

# (a layer's variables of the "selector" collection, block input, MLP input) -> mask [B, T, F] of the neurons to use.
Select = Callable[[Any, jax.Array, jax.Array], jax.Array]
Observe = Callable[[jax.Array], Any]  # activations [B, T, F] of a layer -> what is kept of them
LayerCache = tuple[jax.Array, jax.Array] | None  # one layer's keys and values, [B, S, K, H] each

INIT_STD = 0.02
SAVED_QKV = "qkv"  # name of the queries, keys and values that remat policies may keep


@struct.dataclass
class Context:
    """What all blocks share: the tokens and keys' positions and segments, the cache slot to write, rotary angles."""

    positions_BxT: jax.Array
    segments_BxT: jax.Array
    k_positions_BxS: jax.Array
    k_segments_BxS: jax.Array
    slot: jax.Array
    rotation: Rotation | None
    activation_ramp: jax.Array | None


def activation_fn(config: FalconConfig) -> Callable[[jax.Array], jax.Array]:
    """The element-wise non-linearity of a config; keeps shape and dtype.

    "gelu" is the exact erf form. "shifted_relu" is max(x - shift, 0) (ReLU Strikes Back, arXiv:2310.04564) and
    "relu2" is max(x, 0)^2 (ReLU^2 Wins, arXiv:2402.03804).
    """
    match config.activation:
        case "gelu":
            return _gelu
        case "relu":
            return jax.nn.relu
        case "shifted_relu":
            return lambda x: jax.nn.relu(x - jnp.asarray(config.activation_shift, x.dtype))
        case "relu2":
            return lambda x: jnp.square(jax.nn.relu(x))


def _gelu(x: jax.Array) -> jax.Array:
    # Not jax.nn.gelu: its erfc takes several times as long on a CPU as erf.
    return 0.5 * x * (1 + jax.lax.erf(x * jnp.asarray(math.sqrt(0.5), x.dtype)))


def parameter(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...], std: float) -> jax.Array:
    """Declares a float32 parameter; its shape, logical axes and initial standard deviation are stated here only.

    Initialisation, sharding and checkpoints all read them from this declaration. A `std` of 0 means zeros.
    """
    init = nn.initializers.normal(std) if std else nn.initializers.zeros
    value: Any = module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
    return value


def gathered(w: jax.Array, dtype: Any, stored: tuple[str, ...], used: tuple[str | None, ...]) -> jax.Array:
    """A parameter ready for a matrix product: cast to `dtype`, then gathered over devices to the logical axes `used`.

    The gradient is reduced and scattered back to the axes `stored`. Both collectives are stated, because the compiler
    left alone picks costlier ones.
    """

    @jax.custom_vjp
    def gather(w: jax.Array) -> jax.Array:
        return nn.with_logical_constraint(w, used)

    def scatter(_: None, gradient: jax.Array) -> tuple[jax.Array]:
        # Constrained to `used` first: else every device of the tensor axis computes the whole product.
        return (nn.with_logical_constraint(nn.with_logical_constraint(gradient, used), stored),)

    gather.defvjp(lambda w: (gather(w), None), scatter)
    return gather(nn.with_logical_constraint(w.astype(dtype), stored))


class LayerNorm(nn.Module):
    """LayerNorm over D with scale and bias, computed in float32."""

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """Returns the normalised input, [B, T, D] in `dtype`."""
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale_D: Any = self.param("scale", ones, x_BxTxD.shape[-1:], jnp.float32)
        bias_D = parameter(self, "bias", x_BxTxD.shape[-1:], ("norm",), 0.0)
        x_BxTxD = x_BxTxD.astype(jnp.float32)
        centred = x_BxTxD - x_BxTxD.mean(-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.epsilon)
        return (normal * scale_D[None, None] + bias_D[None, None]).astype(self.dtype)


class Attention(nn.Module):
    """Grouped-query attention over the sequence itself or over a cache."""

    config: FalconConfig
    dtype: Any
    kind: Attend
    query_chunk: int | None

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, context: Context, cache: LayerCache) -> tuple[jax.Array, LayerCache]:
        """Returns the attention output [B, T, D] and the layer's cache with the new keys and values in it."""
        c = self.config
        D, K, G, H = c.d_model, c.n_kv_heads, c.q_per_kv, c.head_dim
        qkv_axes, out_axes = ("kv_heads", "q_per_kv", "head", "embed"), ("embed", "kv_heads", "q_per_kv", "head")
        qkv_KxExHxD = parameter(self, "qkv", (K, G + 2, H, D), qkv_axes, INIT_STD)
        out_DxKxGxH = parameter(self, "out", (D, K, G, H), out_axes, INIT_STD / math.sqrt(2 * c.n_layers))
        qkv_KxExHxD = gathered(qkv_KxExHxD, self.dtype, qkv_axes, ("kv_heads", None, None, None))
        out_DxKxGxH = gathered(out_DxKxGxH, self.dtype, out_axes, (None, "kv_heads", None, None))

        qkv = jnp.einsum("btd,kehd->btkeh", x_BxTxD, qkv_KxExHxD)
        if c.use_bias:
            bias = parameter(self, "qkv_bias", (K, G + 2, H), ("kv_heads", "q_per_kv", "head"), 0.0)
            qkv = qkv + bias.astype(self.dtype)[None, None]
        qkv = nn.with_logical_constraint(qkv, ("batch", "sequence", "kv_heads", None, None))
        q_BxTxKxGxH, k_BxTxKxH, v_BxTxKxH = qkv[..., :G, :], qkv[..., G, :], qkv[..., G + 1, :]
        if context.rotation is not None:
            heads = q_BxTxKxGxH.reshape(*q_BxTxKxGxH.shape[:2], K * G, H)
            q_BxTxKxGxH = rotary(heads, context.rotation).reshape(q_BxTxKxGxH.shape)
            k_BxTxKxH = rotary(k_BxTxKxH, context.rotation)

        if cache is None:
            y_BxTxKxGxH = attend(
                *(checkpoint_name(x, SAVED_QKV) for x in (q_BxTxKxGxH, k_BxTxKxH, v_BxTxKxH)),
                positions_BxT=context.positions_BxT,
                segments_BxT=context.segments_BxT,
                kind=self.kind,
                use_alibi=c.position == "alibi",
                query_chunk=self.query_chunk,
            )
            y_BxTxKxGxH = checkpoint_name(y_BxTxKxGxH, SAVED_ATTENTION)
        else:
            k_BxSxKxH, v_BxSxKxH = (
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), context.slot, axis=1)
                for old, new in zip(cache, (k_BxTxKxH, v_BxTxKxH), strict=True)
            )
            cache = (k_BxSxKxH, v_BxSxKxH)
            y_BxTxKxGxH = attend_chunked(
                q_BxTxKxGxH,
                k_BxSxKxH.astype(self.dtype),
                v_BxSxKxH.astype(self.dtype),
                q_positions_BxT=context.positions_BxT,
                k_positions_BxS=context.k_positions_BxS,
                q_segments_BxT=context.segments_BxT,
                k_segments_BxS=context.k_segments_BxS,
                use_alibi=c.position == "alibi",
                query_chunk=self.query_chunk,
            )
        _sow(self, "activations", "heads", lambda: y_BxTxKxGxH.reshape(*y_BxTxKxGxH.shape[:2], -1))
        y_BxTxD = jnp.einsum("btkgh,dkgh->btd", y_BxTxKxGxH, out_DxKxGxH)
        if c.use_bias:
            y_BxTxD = y_BxTxD + parameter(self, "out_bias", (D,), ("norm",), 0.0).astype(self.dtype)[None, None]
        return y_BxTxD, cache


class Mlp(nn.Module):
    """Two linear maps with the config's activation between; sows the neurons' activations."""

    config: FalconConfig
    dtype: Any
    start_activation: Activation | None = None
    observe: Observe | None = None

    @nn.compact
    def __call__(
        self, x_BxTxD: jax.Array, kept_BxTxF: jax.Array | None = None, ramp: jax.Array | None = None
    ) -> jax.Array:
        """Returns [B, T, D]. Neurons outside the mask are set to zero; for `ramp` see `Falcon.hidden`."""
        c = self.config
        shape, axes = (c.d_ff, c.d_model), ("mlp", "embed")
        up_FxD = parameter(self, "up", shape, axes, INIT_STD)
        down_FxD = parameter(self, "down", shape, axes, INIT_STD / math.sqrt(2 * c.n_layers))
        up_FxD, down_FxD = (gathered(w, self.dtype, axes, ("neurons", None)) for w in (up_FxD, down_FxD))
        h_BxTxF = jnp.einsum("btd,fd->btf", x_BxTxD, up_FxD)
        if c.use_bias:
            h_BxTxF = h_BxTxF + parameter(self, "up_bias", (c.d_ff,), ("mlp",), 0.0).astype(self.dtype)[None, None]
        z_BxTxF = nn.with_logical_constraint(h_BxTxF, ("batch", "sequence", "neurons"))
        h_BxTxF = activation_fn(c)(z_BxTxF)
        if ramp is not None and self.start_activation is not None:
            start_BxTxF = activation_fn(c.with_activation(self.start_activation))(z_BxTxF)
            ramp = ramp.astype(self.dtype)
            h_BxTxF = ramp * h_BxTxF + (1 - ramp) * start_BxTxF
        if kept_BxTxF is not None:
            h_BxTxF = jnp.where(kept_BxTxF, h_BxTxF, 0)
            _sow(self, "statistics", "kept", lambda: jnp.sum(kept_BxTxF, axis=-1, dtype=jnp.int32))
        _sow(self, "activations", "neurons", lambda: self.observe(h_BxTxF) if self.observe else h_BxTxF)
        _sow(self, "statistics", "active", lambda: jnp.sum(h_BxTxF != 0, axis=-1, dtype=jnp.int32))
        _sow(self, "magnitudes", "mean", lambda: jnp.mean(jnp.abs(h_BxTxF), axis=-1, dtype=jnp.float32))
        y_BxTxD = jnp.einsum("btf,fd->btd", h_BxTxF, down_FxD)
        if c.use_bias:
            y_BxTxD = (
                y_BxTxD + parameter(self, "down_bias", (c.d_model,), ("norm",), 0.0).astype(self.dtype)[None, None]
            )
        return y_BxTxD


class Block(nn.Module):
    """One decoder block, in the arrangement that the config names."""

    config: FalconConfig
    dtype: Any
    query_chunk: int | None
    select: Select | None = None
    start_activation: Activation | None = None
    attention: Attend = "auto"
    observe: Observe | None = None

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, cache: LayerCache, context: Context) -> tuple[jax.Array, LayerCache]:
        """Returns the residual stream after the block, [B, T, D], and the layer's cache."""
        c = self.config
        x_BxTxD = nn.with_logical_constraint(x_BxTxD, ("batch", "residual_sequence", None))
        attention_input = LayerNorm(c.norm_eps, self.dtype, name="attention_norm")(x_BxTxD)
        attention = Attention(c, self.dtype, self.attention, self.query_chunk, name="attention")
        attention_output, cache = attention(attention_input, context, cache)
        match c.block:
            case "parallel":
                residual, mlp_input = x_BxTxD + attention_output, attention_input
            case "parallel_two_norms":
                residual = x_BxTxD + attention_output
                mlp_input = LayerNorm(c.norm_eps, self.dtype, name="mlp_norm")(x_BxTxD)
            case "sequential":
                residual = x_BxTxD + attention_output
                mlp_input = LayerNorm(c.norm_eps, self.dtype, name="mlp_norm")(residual)
        _sow(self, "activations", "attention_input", lambda: attention_input)
        _sow(self, "activations", "block_input", lambda: x_BxTxD)
        _sow(self, "activations", "mlp_input", lambda: mlp_input)
        kept_BxTxF = None
        if self.select is not None:
            kept_BxTxF = self.select(self.variables["selector"], x_BxTxD, mlp_input)
        mlp = Mlp(c, self.dtype, self.start_activation, self.observe, name="mlp")
        return residual + mlp(mlp_input, kept_BxTxF, context.activation_ramp), cache


def _sow(module: nn.Module, collection: str, name: str, value: Callable[[], jax.Array]) -> None:
    if module.is_mutable_collection(collection) and not module.is_initializing():
        module.sow(collection, name, value(), reduce_fn=lambda _, new: new, init_fn=lambda: None)
