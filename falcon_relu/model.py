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
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from falcon_relu.attention import SAVED_ATTENTION, Attend, rotation
from falcon_relu.config import Activation, FalconConfig
from falcon_relu.layers import INIT_STD, SAVED_QKV, Block, Context, LayerNorm, Observe, Select, gathered, parameter

Remat = Literal["none", "dots", "mlp", "full"]
Params = Any  # nested dict of jax.Array

BATCH_KEYS = ("tokens_BxT", "positions_BxT", "segment_ids_BxT")  # arrays of a batch, as the model takes them


@struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far, in slots that fill from 0.

    Attributes:
      keys_LxBxSxKxH: keys, after rotary embedding.
      values_LxBxSxKxH: values.
      positions_BxS: position of the token in each slot.
      segments_BxS: segment of the token in each slot; 0 marks padding and unused slots.
      used: number of slots in use, a scalar; the next token goes to slot `used`.
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
        # A separate buffer for each field, so that the cache can be donated to a jitted function.
        per_head, per_token = (shape, dtype), ((batch, slots), jnp.int32)
        return cls(*(jnp.zeros(*one) for one in (per_head, per_head, per_token, per_token, ((), jnp.int32))))

    def sharded(self) -> KVCache:
        """The same, its rows and heads sharded over the current mesh by the rules of `sharding`; for compiled code."""
        heads = (None, "batch", None, "kv_heads", None)
        return dataclasses.replace(
            self,
            keys_LxBxSxKxH=nn.with_logical_constraint(self.keys_LxBxSxKxH, heads),
            values_LxBxSxKxH=nn.with_logical_constraint(self.values_LxBxSxKxH, heads),
        )


class Falcon(nn.Module):
    """A decoder-only Falcon language model.

    Attributes:
      config: the architecture.
      dtype: compute dtype; parameters stay float32 (or what they were loaded as) and are cast at use.
      remat: what the backward pass recomputes in each block: "none", nothing; "dots", the norms and activations;
        "mlp", these and the MLP's up-projection; "full", these and the queries, keys, values and attention. The
        output projections of attention and MLP, which are only added to the residual stream, are never recomputed,
        so "full" costs half a forward pass.
      query_chunk: see `attention.attend_chunked`.
      select: chooses the neurons that each MLP may use, given its layer's slice of the "selector" collection; None for
        all neurons.
      start_activation: blended with the config's activation, in the proportion given to `hidden`.
      attention: which kernel, see `attention.attend`; with a cache it is always `attention.attend_chunked`.
      observe: what `neurons` below is of a layer's activations, so that those of all layers are never kept; they
        themselves if None.

    `apply(..., mutable=["activations"])` also returns, stacked over layers, `neurons` [L, B, T, F] (after the
    activation), `block_input`, `attention_input` and `mlp_input` [L, B, T, D], and `heads` [L, B, T, N * H], the
    attention's outputs before the output projection; `mutable=["statistics"]` returns `active` [L, B, T], the
    number of neurons that are not zero, and with `select` also `kept`, the number chosen; `mutable=["magnitudes"]`
    returns `mean` [L, B, T] float32, the mean absolute activation. What is not asked for is not computed.
    """

    config: FalconConfig
    dtype: Any = jnp.float32
    remat: Remat = "none"
    query_chunk: int | None = None
    select: Select | None = None
    start_activation: Activation | None = None
    attention: Attend = "auto"
    observe: Observe | None = None

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
        )(c, self.dtype, self.query_chunk, self.select, self.start_activation, self.attention, self.observe)
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
          segment_ids_BxT: segment of each token, 0 for padding; all 1 if None. Tokens attend to their own segment only.
          cache: keys and values of earlier tokens; must have T free slots.
          activation_ramp: weight of the config's activation against `start_activation`, a scalar in [0, 1]; 1 if
            None.
        """
        B, T = tokens_BxT.shape
        if segment_ids_BxT is None:
            segment_ids_BxT = jnp.ones((B, T), jnp.int32)
        if positions_BxT is None:
            start = 0 if cache is None else cache.used
            positions_BxT = jnp.broadcast_to((start + jnp.arange(T, dtype=jnp.int32))[None], (B, T))
        c = self.config
        rotations = rotation(positions_BxT, c.head_dim, c.rope_theta) if c.position == "rotary" else None
        if cache is None:
            no_slot = jnp.zeros((), jnp.int32)
            context = Context(
                positions_BxT, segment_ids_BxT, positions_BxT, segment_ids_BxT, no_slot, rotations, activation_ramp
            )
            layer_caches = None
        else:
            cache = dataclasses.replace(
                cache,
                positions_BxS=jax.lax.dynamic_update_slice_in_dim(cache.positions_BxS, positions_BxT, cache.used, 1),
                segments_BxS=jax.lax.dynamic_update_slice_in_dim(cache.segments_BxS, segment_ids_BxT, cache.used, 1),
            )
            context = Context(
                positions_BxT,
                segment_ids_BxT,
                cache.positions_BxS,
                cache.segments_BxS,
                cache.used,
                rotations,
                activation_ramp,
            )
            layer_caches = (cache.keys_LxBxSxKxH, cache.values_LxBxSxKxH)

        table_VxD = gathered(self.embed(), self.dtype, ("vocab", "embed"), ("vocab", None))
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
    """The vocabulary head [V, D] of a parameter tree: the embedding where the two are tied."""
    return params["embed"]["embedding"] if config.tied_embeddings else params["head"]["kernel"]


def next_tokens(tokens_BxT: jax.Array, segment_ids_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Targets [B, T] int32 and mask [B, T] bool: the next token of the row, where it is of the same segment."""
    targets_BxT = jnp.roll(tokens_BxT, -1, axis=1)
    same_BxT = (segment_ids_BxT == jnp.roll(segment_ids_BxT, -1, axis=1)) & (segment_ids_BxT != 0)
    return targets_BxT, same_BxT.at[:, -1].set(False)


def largest_divisor(n: int, at_most: int) -> int:
    """The largest divisor of `n` that is not above `at_most`."""
    return max(d for d in range(1, min(at_most, n) + 1) if n % d == 0)


def split_chunks(tree: Any, size: int) -> Any:
    """Arrays [B, T, ...] as [T / size, B, size, ...], to go through chunk by chunk."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0), tree)


def join_chunks(tree: Any) -> Any:
    """Undoes `split_chunks`."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]), tree)


class _Matrix(nn.Module):
    """A single matrix parameter under a submodule's name: the embedding, or the vocabulary head."""

    name_: str
    shape: tuple[int, int]
    axes: tuple[str, str]

    @nn.compact
    def __call__(self) -> jax.Array:
        return parameter(self, self.name_, self.shape, self.axes, INIT_STD)


def _rematerialise(block: type[Block], remat: Remat) -> type[Block]:
    policies = jax.checkpoint_policies
    kept = policies.save_only_these_names(SAVED_QKV, SAVED_ATTENTION)
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
