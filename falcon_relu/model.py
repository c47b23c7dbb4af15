"""The Falcon family as one Flax Linen model.

Every matrix is stored as rows over its inputs, the orientation of the Hugging Face tensors, with one exception:
`mlp/down` is neuron-major like `mlp/up`, so that neuron f is row f of both and sparse decoding can read rows alone.
The layers' parameters carry a leading layer axis (`nn.scan`).

params (K KV heads, G query heads each, H head width; biases only where the config has them):
  embed/embedding                 [V, D]
  layers/attention_norm           scale, bias [L, D]     the only norm of a "parallel" block
  layers/mlp_norm                 scale, bias [L, D]     "parallel_two_norms" and "sequential"
  layers/attention/qkv            [L, K, G + 2, H, D]    queries, then key, then value of each KV head
  layers/attention/out            [L, D, K, G, H]
  layers/mlp/up, layers/mlp/down  [L, F, D]
  layers/*/{qkv,out,up,down}_bias
  final_norm                      scale, bias [D]
  head/kernel                     [V, D]                 untied models only
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from falcon_relu.activation import activation_fn
from falcon_relu.attention import SAVED_ATTENTION, Attend, Rotation, attend, attend_chunked, rotary, rotation
from falcon_relu.config import Activation, FalconConfig

Remat = Literal["none", "dots", "mlp", "full"]
Params = Any  # nested dict of jax.Array
# (a layer's variables of the "selector" collection, block input, MLP input) -> mask [B, T, F] of the neurons kept.
Select = Callable[[Any, jax.Array, jax.Array], jax.Array]

_INIT_STD = 0.02
_SAVED_QKV = "qkv"  # name of the queries, keys and values that remat policies may keep


@struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far, in slots that fill from 0.

    Attributes:
      keys_LxBxSxKxH: keys, rotated already.
      values_LxBxSxKxH: values.
      positions_BxS: position of the token in each slot.
      segments_BxS: its segment; 0 marks padding and unused slots.
      used: slots in use, a scalar; the next tokens go to slot `used` and on.
    """

    keys_LxBxSxKxH: jax.Array
    values_LxBxSxKxH: jax.Array
    positions_BxS: jax.Array
    segments_BxS: jax.Array
    used: jax.Array

    def __repr__(self) -> str:
        L, B, S, K, H = self.keys_LxBxSxKxH.shape
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))
        return f"KVCache({L=}, {B=}, {S=}, {K=}, {H=}, {self.keys_LxBxSxKxH.dtype}; {size / 1e6:,.1f} MB)"

    @classmethod
    def empty(cls, config: FalconConfig, batch: int, slots: int, dtype: Any = jnp.float32) -> KVCache:
        """A cache for `batch` sequences of up to `slots` tokens, padding included."""
        shape = (config.n_layers, batch, slots, config.n_kv_heads, config.head_dim)
        # Buffers of their own each, so that a cache can be donated.
        per_head, per_token = (shape, dtype), ((batch, slots), jnp.int32)
        return cls(*(jnp.zeros(*one) for one in (per_head, per_head, per_token, per_token, ((), jnp.int32))))


def _parameter(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...], std: float) -> jax.Array:
    """Declares one parameter: name, shape, logical axes and spread (0 for zeros), once for every use of them."""
    init = nn.initializers.normal(std) if std else nn.initializers.zeros
    value: Any = module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
    return value


def _gathered(w: jax.Array, dtype: Any, stored: tuple[str, ...], used: tuple[str | None, ...]) -> jax.Array:
    """A parameter as products use it: cast, then gathered to the logical axes `used`.

    Its gradient goes the other way, scattered to the axes that the parameter is `stored` under: of what crosses the
    devices nothing is left to the compiler's choice.
    """

    @jax.custom_vjp
    def gather(w: jax.Array) -> jax.Array:
        return nn.with_logical_constraint(w, used)

    def scatter(_: None, gradient: jax.Array) -> tuple[jax.Array]:
        # First as the product is split, or every device along tensor would compute all of it.
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
        bias_D = _parameter(self, "bias", x_BxTxD.shape[-1:], ("norm",), 0.0)
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
    def __call__(self, x_BxTxD: jax.Array, context: _Context, cache: _LayerCache) -> tuple[jax.Array, _LayerCache]:
        """Returns the attention output [B, T, D] and the layer's cache with the new keys and values in it."""
        c = self.config
        D, K, G, H = c.d_model, c.n_kv_heads, c.q_per_kv, c.head_dim
        qkv_axes, out_axes = ("kv_heads", "q_per_kv", "head", "embed"), ("embed", "kv_heads", "q_per_kv", "head")
        qkv_KxExHxD = _parameter(self, "qkv", (K, G + 2, H, D), qkv_axes, _INIT_STD)
        out_DxKxGxH = _parameter(self, "out", (D, K, G, H), out_axes, _INIT_STD / math.sqrt(2 * c.n_layers))
        qkv_KxExHxD = _gathered(qkv_KxExHxD, self.dtype, qkv_axes, ("kv_heads", None, None, None))
        out_DxKxGxH = _gathered(out_DxKxGxH, self.dtype, out_axes, (None, "kv_heads", None, None))

        qkv = jnp.einsum("btd,kehd->btkeh", x_BxTxD, qkv_KxExHxD)
        if c.use_bias:
            bias = _parameter(self, "qkv_bias", (K, G + 2, H), ("kv_heads", "q_per_kv", "head"), 0.0)
            qkv = qkv + bias.astype(self.dtype)[None, None]
        qkv = nn.with_logical_constraint(qkv, ("batch", "sequence", "kv_heads", None, None))
        q_BxTxKxGxH, k_BxTxKxH, v_BxTxKxH = qkv[..., :G, :], qkv[..., G, :], qkv[..., G + 1, :]
        if context.rotation is not None:
            heads = q_BxTxKxGxH.reshape(*q_BxTxKxGxH.shape[:2], K * G, H)
            q_BxTxKxGxH = rotary(heads, context.rotation).reshape(q_BxTxKxGxH.shape)
            k_BxTxKxH = rotary(k_BxTxKxH, context.rotation)

        if cache is None:
            y_BxTxKxGxH = attend(
                *(checkpoint_name(x, _SAVED_QKV) for x in (q_BxTxKxGxH, k_BxTxKxH, v_BxTxKxH)),
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
        y_BxTxD = jnp.einsum("btkgh,dkgh->btd", y_BxTxKxGxH, out_DxKxGxH)
        if c.use_bias:
            y_BxTxD = y_BxTxD + _parameter(self, "out_bias", (D,), ("norm",), 0.0).astype(self.dtype)[None, None]
        return y_BxTxD, cache


class Mlp(nn.Module):
    """Two linear maps with the config's activation between; sows the neurons' activations."""

    config: FalconConfig
    dtype: Any
    start_activation: Activation | None = None

    @nn.compact
    def __call__(
        self, x_BxTxD: jax.Array, kept_BxTxF: jax.Array | None = None, ramp: jax.Array | None = None
    ) -> jax.Array:
        """Returns [B, T, D]; with a mask, neurons that are not kept count as zero; for `ramp` see `Falcon.hidden`."""
        c = self.config
        shape, axes = (c.d_ff, c.d_model), ("mlp", "embed")
        up_FxD = _parameter(self, "up", shape, axes, _INIT_STD)
        down_FxD = _parameter(self, "down", shape, axes, _INIT_STD / math.sqrt(2 * c.n_layers))
        up_FxD, down_FxD = (_gathered(w, self.dtype, axes, ("neurons", None)) for w in (up_FxD, down_FxD))
        h_BxTxF = jnp.einsum("btd,fd->btf", x_BxTxD, up_FxD)
        if c.use_bias:
            h_BxTxF = h_BxTxF + _parameter(self, "up_bias", (c.d_ff,), ("mlp",), 0.0).astype(self.dtype)[None, None]
        z_BxTxF = nn.with_logical_constraint(h_BxTxF, ("batch", "sequence", "neurons"))
        h_BxTxF = activation_fn(c)(z_BxTxF)
        if ramp is not None and self.start_activation is not None:
            start_BxTxF = activation_fn(c.with_activation(self.start_activation))(z_BxTxF)
            ramp = ramp.astype(self.dtype)
            h_BxTxF = ramp * h_BxTxF + (1 - ramp) * start_BxTxF
        if kept_BxTxF is not None:
            h_BxTxF = jnp.where(kept_BxTxF, h_BxTxF, 0)
            _sow(self, "statistics", "kept", lambda: jnp.sum(kept_BxTxF, axis=-1, dtype=jnp.int32))
        _sow(self, "activations", "neurons", lambda: h_BxTxF)
        _sow(self, "statistics", "active", lambda: jnp.sum(h_BxTxF != 0, axis=-1, dtype=jnp.int32))
        _sow(self, "magnitudes", "mean", lambda: jnp.mean(jnp.abs(h_BxTxF), axis=-1, dtype=jnp.float32))
        y_BxTxD = jnp.einsum("btf,fd->btd", h_BxTxF, down_FxD)
        if c.use_bias:
            y_BxTxD = (
                y_BxTxD + _parameter(self, "down_bias", (c.d_model,), ("norm",), 0.0).astype(self.dtype)[None, None]
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

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, cache: _LayerCache, context: _Context) -> tuple[jax.Array, _LayerCache]:
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
        _sow(self, "activations", "block_input", lambda: x_BxTxD)
        _sow(self, "activations", "mlp_input", lambda: mlp_input)
        kept_BxTxF = None
        if self.select is not None:
            kept_BxTxF = self.select(self.variables["selector"], x_BxTxD, mlp_input)
        mlp = Mlp(c, self.dtype, self.start_activation, name="mlp")
        return residual + mlp(mlp_input, kept_BxTxF, context.activation_ramp), cache


class Falcon(nn.Module):
    """A decoder-only Falcon language model.

    Attributes:
      config: the architecture.
      dtype: compute dtype; parameters stay float32 (or what they were loaded as) and are cast at use.
      remat: what the backward pass recomputes in each block: "none"; "dots", norms and activations; "mlp", these and
        the MLP's first product; "full", these and queries, keys, values and attention. No block recomputes what only
        adds to the residual stream, so that "full" costs half a forward pass.
      query_chunk: see `attention.attend_chunked`.
      select: chooses the neurons that each MLP may use, given its layer's slice of the "selector" collection; all if
        None.
      start_activation: the activation that `hidden` blends into the config's where it is told how far.
      attention: which kernel, see `attention.attend`; with a cache it is always `attention.attend_chunked`.

    `apply(..., mutable=["activations"])` also returns, stacked over layers, `neurons` [L, B, T, F] (after the
    activation), `block_input` and `mlp_input` [L, B, T, D]; `mutable=["statistics"]` returns `active` [L, B, T], the
    number of neurons that are not zero, and with `select` also `kept`, the number chosen; `mutable=["magnitudes"]`
    returns `mean` [L, B, T] float32, the mean absolute activation. None is computed unless asked for.
    """

    config: FalconConfig
    dtype: Any = jnp.float32
    remat: Remat = "none"
    query_chunk: int | None = None
    select: Select | None = None
    start_activation: Activation | None = None
    attention: Attend = "auto"

    def setup(self) -> None:
        """Declares the submodules."""
        c = self.config
        shape, axes = (c.vocab_size, c.d_model), ("vocab", "embed")
        self.embed = _Matrix("embedding", shape, axes)
        self.layers = nn.scan(
            _rematerialise(Block, self.remat),
            variable_axes={"params": 0, "selector": 0, "activations": 0, "statistics": 0, "magnitudes": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=c.n_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.dtype, self.query_chunk, self.select, self.start_activation, self.attention)
        self.final_norm = LayerNorm(c.norm_eps, self.dtype)
        if not c.tied_embeddings:
            self.head = _Matrix("kernel", shape, axes)

    def __call__(
        self,
        tokens_BxT: jax.Array,
        positions_BxT: jax.Array | None = None,
        segment_ids_BxT: jax.Array | None = None,
        cache: KVCache | None = None,
    ) -> Any:
        """Logits [B, T, V] in float32; with a cache, (logits, cache). Arguments as for `hidden`."""
        if cache is None:
            return self.unembed(self.hidden(tokens_BxT, positions_BxT, segment_ids_BxT))
        hidden_BxTxD, cache = self.hidden(tokens_BxT, positions_BxT, segment_ids_BxT, cache)
        return self.unembed(hidden_BxTxD), cache

    def hidden(
        self,
        tokens_BxT: jax.Array,
        positions_BxT: jax.Array | None = None,
        segment_ids_BxT: jax.Array | None = None,
        cache: KVCache | None = None,
        activation_ramp: jax.Array | None = None,
    ) -> Any:
        """Final hidden states [B, T, D] in the compute dtype; with a cache, (hidden states, cache).

        Args:
          tokens_BxT: token ids, int32.
          positions_BxT: position of each token in its segment; 0..T-1 (after the used slots of a cache) if None.
          segment_ids_BxT: segment of each token, 0 for padding; all 1 if None. Segments do not see each other.
          cache: keys and values of earlier tokens; must have T free slots.
          activation_ramp: the share of the config's activation in a blend with `start_activation`, a scalar in
            [0, 1]; 1 if None.
        """
        B, T = tokens_BxT.shape
        if segment_ids_BxT is None:
            segment_ids_BxT = jnp.ones((B, T), jnp.int32)
        if positions_BxT is None:
            start = 0 if cache is None else cache.used
            positions_BxT = jnp.broadcast_to((start + jnp.arange(T, dtype=jnp.int32))[None], (B, T))
        c = self.config
        turn = rotation(positions_BxT, c.head_dim, c.rope_theta) if c.position == "rotary" else None
        if cache is None:
            no_slot = jnp.zeros((), jnp.int32)
            context = _Context(
                positions_BxT, segment_ids_BxT, positions_BxT, segment_ids_BxT, no_slot, turn, activation_ramp
            )
            layer_caches = None
        else:
            cache = dataclasses.replace(
                cache,
                positions_BxS=jax.lax.dynamic_update_slice_in_dim(cache.positions_BxS, positions_BxT, cache.used, 1),
                segments_BxS=jax.lax.dynamic_update_slice_in_dim(cache.segments_BxS, segment_ids_BxT, cache.used, 1),
            )
            context = _Context(
                positions_BxT,
                segment_ids_BxT,
                cache.positions_BxS,
                cache.segments_BxS,
                cache.used,
                turn,
                activation_ramp,
            )
            layer_caches = (cache.keys_LxBxSxKxH, cache.values_LxBxSxKxH)

        table_VxD = _gathered(self.embed(), self.dtype, ("vocab", "embed"), ("vocab", None))
        x_BxTxD = table_VxD[tokens_BxT]
        x_BxTxD, layer_caches = self.layers(x_BxTxD, layer_caches, context)
        hidden_BxTxD = self.final_norm(x_BxTxD)
        if cache is None or layer_caches is None:
            return hidden_BxTxD
        keys, values = layer_caches
        cache = dataclasses.replace(cache, keys_LxBxSxKxH=keys, values_LxBxSxKxH=values, used=cache.used + T)
        return hidden_BxTxD, cache

    def unembed(self, hidden_BxTxD: jax.Array) -> jax.Array:
        """Logits [B, T, V] in float32 from hidden states [B, T, D]."""
        kernel_VxD = self.embed() if self.config.tied_embeddings else self.head()
        return jnp.einsum(
            "btd,vd->btv", hidden_BxTxD, kernel_VxD.astype(self.dtype), preferred_element_type=jnp.float32
        )


def head_kernel(config: FalconConfig, params: Params) -> jax.Array:
    """The vocabulary head [V, D] of a parameter tree: its own, or the embedding where tied."""
    return params["embed"]["embedding"] if config.tied_embeddings else params["head"]["kernel"]


@struct.dataclass
class _Context:
    """What every block needs to know of the tokens and of the cache's slots."""

    positions_BxT: jax.Array
    segments_BxT: jax.Array
    k_positions_BxS: jax.Array
    k_segments_BxS: jax.Array
    slot: jax.Array
    rotation: Rotation | None
    activation_ramp: jax.Array | None


_LayerCache = tuple[jax.Array, jax.Array] | None


class _Matrix(nn.Module):
    name_: str
    shape: tuple[int, int]
    axes: tuple[str, str]

    @nn.compact
    def __call__(self) -> jax.Array:
        return _parameter(self, self.name_, self.shape, self.axes, _INIT_STD)


def _sow(module: nn.Module, collection: str, name: str, value: Callable[[], jax.Array]) -> None:
    if module.is_mutable_collection(collection) and not module.is_initializing():
        module.sow(collection, name, value(), reduce_fn=lambda _, new: new, init_fn=lambda: None)


def _rematerialise(block: type[Block], remat: Remat) -> type[Block]:
    policies = jax.checkpoint_policies
    kept = policies.save_only_these_names(_SAVED_QKV, SAVED_ATTENTION)
    match remat:
        case "none":
            return block
        case "dots":
            policy = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, kept)
            return nn.remat(block, policy=policy, prevent_cse=False)
        case "mlp":
            return nn.remat(block, policy=kept, prevent_cse=False)
        case "full":
            return nn.remat(block, prevent_cse=False)
