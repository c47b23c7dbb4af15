"""The decode step and the prefill: pure functions from weights, state and tokens to logits and the next state.

Layers are unrolled in Python inside one program, each with its own cache buffers: a scan would copy the whole cache
twice a layer on a CPU. Weights are arguments and are never copied, converted or sliced as a whole.

Shapes: B sequences, T tokens of each, S positions of the cache, D model width, F neurons, K key-value heads, G query
heads of each of them, H head width, V vocabulary, L layers, R predictor rank.
"""

from __future__ import annotations

import dataclasses
import functools
from types import ModuleType
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from falcon_relu.attention import Rotation, alibi_bias, alibi_slopes, rotary, rotation
from falcon_relu.config import FalconConfig
from falcon_relu.errors import FalconError
from falcon_relu.layers import activation_fn
from infer import kernels
from infer.kernels.cache import Cache, CacheFormat, empty_cache, position_bytes
from infer.weights.formats import take
from infer.weights.layout import DecodeWeights, LayerWeights, Norm

Mode = Literal["dense", "exact", "sparse"]
MODES: tuple[Mode, ...] = get_args(Mode)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The KV cache of a batch of sequences.

    Attributes:
      keys: of each layer, [B, S, K, H] after rotary embedding; filled from slot 0.
      values: of each layer, [B, S, K, H].
      length_B: number of tokens of each sequence in the cache, int32.
    """

    keys: tuple[Cache, ...]
    values: tuple[Cache, ...]
    length_B: jax.Array

    @classmethod
    def empty(cls, config: FalconConfig, batch: int, context: int, format: CacheFormat = "bf16") -> DecodeState:
        """An empty cache for `batch` sequences of up to `context` tokens."""
        shape = (batch, context, config.n_kv_heads, config.head_dim)
        caches = lambda: tuple(empty_cache(shape, format) for _ in range(config.n_layers))  # noqa: E731
        return cls(caches(), caches(), jnp.zeros(batch, jnp.int32))

    @staticmethod
    def nbytes(config: FalconConfig, batch: int, context: int, format: CacheFormat = "bf16") -> int:
        """Bytes of `empty`."""
        slots = 2 * config.n_layers * batch * context
        return slots * config.n_kv_heads * position_bytes(config.head_dim, format)


def half_full(c: FalconConfig, batch: int, context: int, cache: CacheFormat = "bf16") -> DecodeState:
    """A KV cache with half of its `context` positions filled."""
    state = DecodeState.empty(c, batch, context, cache)
    return dataclasses.replace(state, length_B=jnp.full(batch, context // 2, jnp.int32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reads:
    """Number of MLP rows that a step read, per layer.

    Attributes:
      up_L: rows of the up-projection, int32 [L].
      down_L: rows of the down-projection, int32 [L].
    """

    up_L: jax.Array
    down_L: jax.Array


def check_mode(weights: DecodeWeights, mode: Mode) -> None:
    """Refuses a mode that the weights do not support.

    Raises:
      FalconError: the activation is GELU, which leaves no zeros to skip, or "sparse" has no predictor.
    """
    if mode != "dense" and weights.config.activation == "gelu":
        raise FalconError(f"{mode} decoding needs a model with a ReLU; this one's activation is gelu: use dense")
    if mode == "sparse" and weights.predictor_input is None:
        raise FalconError("sparse decoding needs a predictor; fit one with `falcon-relu predictor`, or use exact")


@functools.partial(jax.jit, static_argnames=("mode", "backend"), donate_argnames="state")
def decode_step(
    weights: DecodeWeights,
    state: DecodeState,
    token_B: jax.Array,
    *,
    mode: Mode = "dense",
    backend: kernels.Backend = "auto",
) -> tuple[jax.Array, DecodeState, Reads]:
    """Adds one token to every sequence.

    Args:
      weights: the model.
      state: donated; its buffers are updated in place. Every sequence must have a free slot.
      token_B: token ids, int32.
      mode: "dense" reads all rows; "exact" skips rows of the down-projection whose neuron is 0; "sparse" reads the rows
        of the neurons that the predictor selects for any sequence of the batch. A sequence uses only its own neurons,
        so that its result does not depend on the others.
      backend: kernels to use.

    Returns:
      Logits [B, V] in f32, the next state, and the number of rows read.

    Raises:
      jax.errors.JaxRuntimeError: a sequence had no free slot; raised when the results are used.
    """
    k = kernels.backend(backend)
    state = _with_room(state, 1)
    x_BxD = take(weights.embedding, token_B)
    angles = _rotation(weights.config, state, state.length_B[:, None])
    keys, values, reads = [], [], []
    for layer, key, value in zip(weights.layers, state.keys, state.values, strict=True):
        x_BxD, key, value, read = _layer_step(weights, layer, x_BxD, key, value, state.length_B, angles, mode, k)
        keys.append(key)
        values.append(value)
        reads.append(read)
    logits_BxV = k.rows_dot(weights.head_rows, _norm(weights.final_norm, x_BxD, weights.config.norm_eps))
    up, down = (jnp.stack(column) for column in zip(*reads, strict=True))
    return logits_BxV, DecodeState(tuple(keys), tuple(values), state.length_B + 1), Reads(up, down)


@functools.partial(jax.jit, static_argnames="backend", donate_argnames="state")
def prefill(
    weights: DecodeWeights,
    state: DecodeState,
    tokens_BxT: jax.Array,
    valid_B: jax.Array,
    *,
    backend: kernels.Backend = "auto",
) -> tuple[jax.Array, DecodeState]:
    """Adds the first `valid` of T tokens to every sequence, through matrix-matrix products and all neurons.

    The last layer's output is computed for the last tokens only.

    Args:
      weights: the model.
      state: donated; every sequence must have free slots for its valid tokens.
      tokens_BxT: token ids, padded on the right.
      valid_B: number of tokens of each sequence, int32, possibly 0; the others are padding.
      backend: kernels to use.

    Returns:
      The final hidden state [B, D] in f32 after each sequence's last valid token (see `unembed`), and the next state.

    Raises:
      jax.errors.JaxRuntimeError: a sequence had too few free slots; raised when the results are used.
    """
    k = kernels.backend(backend)
    c = weights.config
    B, T = tokens_BxT.shape
    S = state.keys[0].shape[1]
    state = _with_room(state, valid_B)
    position_BxT = state.length_B[:, None] + jnp.arange(T)[None]
    is_token_BxT = jnp.arange(T)[None] < valid_B[:, None]
    slot_BxT = jnp.where(is_token_BxT, position_BxT, S)  # padding goes to slot S, past the cache: it is not written
    seen_BxT = jnp.where(is_token_BxT, position_BxT + 1, 1)
    x_BxTxD = take(weights.embedding, tokens_BxT.reshape(-1)).reshape(B, T, -1)
    used = jnp.max(jnp.where(valid_B > 0, jnp.arange(B) * T + valid_B, 0))  # of the B * T tokens; padding follows
    multiply, weigh = (functools.partial(product, count=used) for product in (k.rows_matmul, k.weighted_rows_matmul))
    angles = _rotation(c, state, position_BxT)
    keys, values = [], []
    for layer, old_key, old_value in zip(weights.layers, state.keys, state.values, strict=True):
        q, k_new, v_new = _qkv(c, layer, _norm(layer.attention_norm, x_BxTxD, c.norm_eps), angles, multiply)
        key, value = old_key.written(slot_BxT, k_new), old_value.written(slot_BxT, v_new)
        keys.append(key)
        values.append(value)
        if len(keys) == c.n_layers:
            break
        y_BxTxKxGxH = k.attend(q, key, value, seen_BxT, _bias(c, S))
        attention = _plus(multiply(layer.out, y_BxTxKxGxH.reshape(B, T, -1)), layer.out_bias)
        residual, mlp_input = _mlp_input(c, layer, x_BxTxD, attention)
        h_BxTxF = activation_fn(c)(_plus(multiply(layer.up, mlp_input), layer.up_bias))
        x_BxTxD = residual + _plus(weigh(layer.down, h_BxTxF), layer.down_bias)
    hidden_BxD = _last_layer_of_prefill(weights, q, key, value, x_BxTxD, seen_BxT, valid_B, k)
    return hidden_BxD, DecodeState(tuple(keys), tuple(values), state.length_B + valid_B)


@functools.partial(jax.jit, static_argnames="backend")
def unembed(weights: DecodeWeights, hidden_BxD: jax.Array, *, backend: kernels.Backend = "auto") -> jax.Array:
    """Logits [B, V] in f32 of final hidden states."""
    normed_BxD = _norm(weights.final_norm, hidden_BxD, weights.config.norm_eps)
    return kernels.backend(backend).rows_dot(weights.head_rows, normed_BxD)


def step_bytes(weights: DecodeWeights, reads: Reads, mode: Mode) -> int:
    """Bytes of weights that a step read, computed from its numbers of rows."""
    total = weights.head_rows.nbytes
    for layer, up, down in zip(weights.layers, reads.up_L.tolist(), reads.down_L.tolist(), strict=True):
        total += layer.qkv.nbytes + layer.out.nbytes + up * layer.up.row_bytes + down * layer.down.row_bytes
        if mode == "sparse" and layer.predictor is not None:
            total += layer.predictor.fc1.nbytes + layer.predictor.fc2.nbytes
    return total


def prefill_bytes(config: FalconConfig, batch: int, tokens: int) -> int:
    """Bytes that `prefill` of `tokens` tokens a sequence needs beside weights and caches, the logits included."""
    c = config
    heads = (c.n_heads + 2 * c.n_kv_heads) * c.head_dim
    floats_of_token = 3 * c.d_ff + 3 * heads + 6 * c.d_model  # the arrays of a layer, and copies that products pack
    return 4 * batch * (tokens * floats_of_token + c.vocab_size) + (64 << 20)  # XLA's products widen blocks of rows


# ---- one layer


def _with_room(state: DecodeState, new: jax.Array | int) -> DecodeState:
    """The state, with a check at run time that `new` more tokens fit its cache; the program fails if they do not."""
    S = state.keys[0].shape[1]
    longest = jnp.max(state.length_B + new)

    def refuse(length: Any) -> Any:
        raise FalconError(f"a sequence of {int(length)} tokens does not fit the {S} positions of the cache")

    def full(length_B: jax.Array) -> jax.Array:
        shape = jax.ShapeDtypeStruct(length_B.shape, length_B.dtype)
        return jax.pure_callback(lambda longest, _: refuse(longest), shape, longest, length_B)

    length_B = jax.lax.cond(longest > S, full, lambda length_B: length_B, state.length_B)
    return dataclasses.replace(state, length_B=length_B)


def _last_layer_of_prefill(
    weights: DecodeWeights,
    q_BxTxKxGxH: jax.Array,
    key: Cache,
    value: Cache,
    x_BxTxD: jax.Array,
    seen_BxT: jax.Array,
    valid_B: jax.Array,
    k: ModuleType,
) -> jax.Array:
    """The hidden state [B, D] of each sequence's last token after the last layer.

    The last layer computes keys and values of all tokens, but its output only for the last token, which is all that the
    logits need.
    """
    last_B = jnp.maximum(valid_B - 1, 0)
    q_Bx1xKxGxH, x_Bx1xD, seen_Bx1 = (
        jnp.take_along_axis(of, last_B.reshape(-1, *[1] * (of.ndim - 1)), axis=1)
        for of in (q_BxTxKxGxH, x_BxTxD, seen_BxT)
    )
    y_Bx1xKxGxH = k.attend(q_Bx1xKxGxH, key, value, seen_Bx1, _bias(weights.config, key.shape[1]))
    return _after_attention(weights, weights.layers[-1], x_Bx1xD[:, 0], y_Bx1xKxGxH, "dense", k)[0]


def _layer_step(
    weights: DecodeWeights,
    layer: LayerWeights,
    x_BxD: jax.Array,
    key: Cache,
    value: Cache,
    length_B: jax.Array,
    angles: Rotation | None,
    mode: Mode,
    k: ModuleType,
) -> tuple[jax.Array, Cache, Cache, tuple[jax.Array, jax.Array]]:
    c = weights.config
    normed_Bx1xD = _norm(layer.attention_norm, x_BxD, c.norm_eps)[:, None]
    q, k_new, v_new = _qkv(c, layer, normed_Bx1xD, angles, lambda w, x: k.rows_dot(w, x[:, 0])[:, None])
    key = key.written(length_B[:, None], k_new)
    value = value.written(length_B[:, None], v_new)
    y_Bx1xKxGxH = k.attend(q, key, value, length_B[:, None] + 1, _bias(c, key.shape[1]))
    x_BxD, read = _after_attention(weights, layer, x_BxD, y_Bx1xKxGxH, mode, k)
    return x_BxD, key, value, read


def _after_attention(
    weights: DecodeWeights, layer: LayerWeights, x_BxD: jax.Array, y_Bx1xKxGxH: jax.Array, mode: Mode, k: ModuleType
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The residual stream [B, D] after a block, from its heads' outputs y; and the numbers of up and down rows read."""
    c = weights.config
    attention_BxD = _plus(k.rows_dot(layer.out, y_Bx1xKxGxH.reshape(len(x_BxD), -1)), layer.out_bias)
    residual_BxD, mlp_input_BxD = _mlp_input(c, layer, x_BxD, attention_BxD)
    predicting_BxD = x_BxD if weights.predictor_input == "block_input" else mlp_input_BxD
    mlp_BxD, read = _mlp(c, layer, mlp_input_BxD, predicting_BxD, mode, k)
    return residual_BxD + _plus(mlp_BxD, layer.down_bias), read


def _mlp(
    c: FalconConfig, layer: LayerWeights, x_BxD: jax.Array, predicting_BxD: jax.Array, mode: Mode, k: ModuleType
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The MLP's output [B, D] without the down-projection's bias, and the numbers of up and down rows read."""
    F = layer.up.shape[0]
    every = jnp.int32(F)
    if mode != "sparse":
        h_BxF = activation_fn(c)(_plus(k.rows_dot(layer.up, x_BxD), layer.up_bias))
        if mode == "dense":
            return k.weighted_row_sum(layer.down, h_BxF), (every, every)
        return k.weighted_row_sum(layer.down, h_BxF, skip_zeros=True), (every, _firing(h_BxF))
    assert layer.predictor is not None  # check_mode
    hidden_BxR = jax.nn.relu(k.rows_dot(layer.predictor.fc1, predicting_BxD))
    score_BxF = k.rows_dot(layer.predictor.fc2, hidden_BxR)
    index_F, count, chosen_BxF = k.select(score_BxF, layer.predictor.threshold, layer.predictor.budget)
    h_BxF = k.gathered_rows_dot(layer.up, index_F, count, x_BxD)
    if layer.up_bias is not None:
        h_BxF += jnp.asarray(layer.up_bias)[index_F][None]  # arbitrary past `count`, where the mask drops it
    h_BxF = jnp.where(chosen_BxF, activation_fn(c)(h_BxF), 0)
    return k.weighted_row_sum(layer.down, h_BxF, index_F, count, skip_zeros=True), (count, _firing(h_BxF))


def _firing(h_BxF: jax.Array) -> jax.Array:
    return jnp.sum(jnp.any(h_BxF != 0, axis=0)).astype(jnp.int32)


def _rotation(c: FalconConfig, state: DecodeState, position_BxT: jax.Array) -> Rotation | None:
    """Rotary angles from a table of all cache positions: computed in the step, XLA would repeat them for every head."""
    if c.position != "rotary":
        return None
    with jax.ensure_compile_time_eval():
        table = rotation(jnp.arange(state.keys[0].shape[1])[None], c.head_dim, c.rope_theta)
    cos_BxTxh, sin_BxTxh = (part[0][position_BxT] for part in table)
    return cos_BxTxh, sin_BxTxh


def _bias(c: FalconConfig, S: int) -> jax.Array | None:
    """ALiBi bias of each query head's scores at each position, [N, S]; None without ALiBi."""
    if c.position != "alibi":
        return None
    return alibi_bias(jnp.asarray(alibi_slopes(c.n_heads)), jnp.arange(S)[None], c.head_dim)[0]


def _qkv(
    c: FalconConfig, layer: LayerWeights, x_BxTxD: jax.Array, angles: Rotation | None, multiply: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, T, K, G, H], keys and values [B, T, K, H], rotated where the model rotates."""
    B, T = x_BxTxD.shape[:2]
    K, G, H = c.n_kv_heads, c.q_per_kv, c.head_dim
    heads = _plus(multiply(layer.qkv, x_BxTxD), layer.qkv_bias).reshape(B, T, K, G + 2, H)
    if angles is not None:
        rotated = rotary(heads[..., : G + 1, :].reshape(B, T, -1, H), angles).reshape(B, T, K, G + 1, H)
        return rotated[..., :G, :], rotated[..., G, :], heads[..., G + 1, :]
    return heads[..., :G, :], heads[..., G, :], heads[..., G + 1, :]


def _mlp_input(c: FalconConfig, layer: LayerWeights, x: jax.Array, attention: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The residual stream that the MLP's output is added to, and the MLP's input."""
    residual = x + attention
    if layer.mlp_norm is None:
        return residual, _norm(layer.attention_norm, x, c.norm_eps)
    return residual, _norm(layer.mlp_norm, residual if c.block == "sequential" else x, c.norm_eps)


def _norm(norm: Norm, x: jax.Array, epsilon: float) -> jax.Array:
    """LayerNorm over the last axis, in f32."""
    centred = x - x.mean(-1, keepdims=True)
    normal = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)
    return _plus(normal * _broadcast(norm.scale_D, x), norm.bias_D)


def _plus(x: jax.Array, bias: Any) -> jax.Array:
    return x if bias is None else x + _broadcast(bias, x)


def _broadcast(vector: Any, like: jax.Array) -> jax.Array:
    return jnp.asarray(vector).reshape((1,) * (like.ndim - 1) + (-1,))
