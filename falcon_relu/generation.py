"""Continuing prompts with the Flax model: jitted prefill and decoding on any backend."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from falcon_relu.errors import FalconError, check_number, check_seed
from falcon_relu.model import Falcon, KVCache, Params
from falcon_relu.sharding import on_host

_STEPS_BETWEEN_LOOKS = 32  # tokens generated between calls of `until`
_MOST_IDS = 1 << 31  # token ids are int32
_LEAST_TEMPERATURE = float(jnp.finfo(jnp.float32).tiny)  # what is smaller counts as 0 in a product


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen, and when to stop.

    Attributes:
      max_new_tokens: number of tokens to generate at most.
      temperature: divides the logits; 0 takes the likeliest token (greedy).
      top_k: sample among the k likeliest tokens only; 0 for all.
      top_p: sample among the likeliest tokens that together hold this probability (nucleus, arXiv:1904.09751).
      seed: of the random draws, from 0 to 2^32 - 1; the same seed and prompts give the same text.
      stop_tokens: ids that end a sequence; the stop token itself is not returned.

    Raises:
      FalconError: a field is out of range or not finite.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_number("max_new_tokens", self.max_new_tokens, low=1)
        check_number("temperature", self.temperature, low=0)
        check_number("top_k", self.top_k, low=0)
        check_number("top_p", self.top_p, above=0, high=1)
        check_seed("seed", self.seed)
        for token in self.stop_tokens:
            check_number("a stop token", token, low=0, high=_MOST_IDS - 1)

    def of_program(self) -> Sampling:
        """The settings that a compiled program depends on: all but the seed, which is one of its arguments."""
        return dataclasses.replace(self, seed=0)


def sample(logits_BxV: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """The next token of each sequence, [B] int32."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    logits_BxV = logits_BxV.astype(jnp.float32)
    # The largest is moved to 0, so that after the division only logits of tokens that are never drawn are infinite.
    logits_BxV = logits_BxV - jnp.max(logits_BxV, axis=-1, keepdims=True)
    logits_BxV = logits_BxV / max(sampling.temperature, _LEAST_TEMPERATURE)
    if sampling.top_k and sampling.top_k < logits_BxV.shape[-1]:
        kth = jax.lax.top_k(logits_BxV, sampling.top_k)[0][:, -1:]
        logits_BxV = jnp.where(logits_BxV >= kth, logits_BxV, -jnp.inf)
    if sampling.top_p < 1:
        descending = jnp.sort(logits_BxV, axis=-1, descending=True)
        probability = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability  # the likeliest token is always kept
        least_kept = jnp.min(jnp.where(before < sampling.top_p, descending, jnp.inf), axis=-1, keepdims=True)
        logits_BxV = jnp.where(logits_BxV >= least_kept, logits_BxV, -jnp.inf)
    return jax.random.categorical(key, logits_BxV, axis=-1).astype(jnp.int32)


def generate(
    model: Falcon,
    params: Params,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    until: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """Continues every prompt; returns the new ids only, up to and without a stop token.

    Prompts of different lengths are padded on the right, which changes no result. A program is compiled for each
    `padded_length` of prompts. Sampled tokens depend on the seed and on the prompt's place in the batch.

    Args:
      model: the model; its dtype is also the cache's.
      params: its parameters.
      prompts: token ids, at least one to a prompt.
      sampling: how to choose and when to stop.
      until: called every 32 tokens with the new ids of each prompt; a sequence for which it returns true ends. Up to 31
        tokens may follow the one that made it true.

    Raises:
      FalconError: a prompt is empty, has ids outside the vocabulary, or does not fit the context.
    """
    check_prompts(prompts, model.config.vocab_size, model.config.max_positions, sampling.max_new_tokens)
    tokens_BxT, lengths_B = pad_prompts(prompts, padded_length(max(map(len, prompts))))
    key, program = jax.random.key(sampling.seed), sampling.of_program()
    carry = read_prompts(model, program, params, tokens_BxT, lengths_B)
    N = sampling.max_new_tokens
    last = N if until is None else 0
    while True:
        last = min(last + _STEPS_BETWEEN_LOOKS, N)
        carry = add_tokens(model, program, params, lengths_B, carry, last, key)
        rows, done_B = _new_tokens(carry), on_host(carry.done_B)
        if until is not None:
            done_B = np.array([done or until(row) for row, done in zip(rows, done_B, strict=True)])
        if last == N or done_B.all():
            return rows
        carry = dataclasses.replace(carry, done_B=jnp.asarray(done_B))


def padded_length(n: int, least: int = 32) -> int:
    """`n` rounded up, above 128 by at most a quarter, so that few programs are compiled for many lengths."""
    step = max(least, 1 << max((n - 1).bit_length() - 3, 0))
    return -(-n // step) * step


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int, context: int, max_new_tokens: int) -> None:
    """Refuses prompts that cannot be continued.

    Raises:
      FalconError: no prompt, an empty one, an id outside the vocabulary, or prompt + new tokens above the context.
    """
    if not prompts:
        raise FalconError("no prompt was given")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise FalconError(f"prompt {number} is empty; start it with the end-of-text token to generate from nothing")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise FalconError(f"prompt {number} has token ids outside the model's vocabulary of {vocab_size}")
        if len(prompt) + max_new_tokens > context:
            raise FalconError(
                f"prompt {number} has {len(prompt)} tokens; with {max_new_tokens} new ones that is more than the "
                f"context of {context}; shorten the prompt or ask for fewer new tokens"
            )


def pad_prompts(prompts: Sequence[Sequence[int]], width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [B, T], padded on the right with 0 to the longest prompt or to `width`, and lengths [B]; both int32."""
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens_BxT = np.zeros((len(prompts), width or int(lengths_B.max())), np.int32)
    for row, prompt in zip(tokens_BxT, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens_BxT, lengths_B


@struct.dataclass
class _Carry:
    """State of the generation loop: `step` tokens generated, the logits for the next, and the new ids so far."""

    step: jax.Array
    logits_BxV: jax.Array
    cache: KVCache
    out_BxN: jax.Array
    count_B: jax.Array
    done_B: jax.Array


def _new_tokens(carry: _Carry) -> list[list[int]]:
    out_BxN, count_B = on_host((carry.out_BxN, carry.count_B))
    return [row[:count].tolist() for row, count in zip(out_BxN, count_B, strict=True)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def read_prompts(
    model: Falcon, sampling: Sampling, params: Params, tokens_BxT: jax.Array, lengths_B: jax.Array
) -> _Carry:
    """Fills the cache with the prompts, and works out the logits of each one's first new token."""
    B, T = tokens_BxT.shape
    N = sampling.max_new_tokens
    apply: Any = functools.partial(model.apply, {"params": params})
    slots = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    segments_BxT = (slots < lengths_B[:, None]).astype(jnp.int32)
    cache = KVCache.empty(model.config, B, T + N, model.dtype)
    hidden_BxTxD, cache = apply(tokens_BxT, slots, segments_BxT, cache, method="hidden")
    last_Bx1xD = jnp.take_along_axis(hidden_BxTxD, (lengths_B - 1)[:, None, None], axis=1)
    logits_BxV = apply(last_Bx1xD, method="unembed")
    none_B = jnp.zeros(B, jnp.int32)
    return _Carry(jnp.int32(0), logits_BxV[:, 0], cache, jnp.zeros((B, N), jnp.int32), none_B, none_B != 0)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def add_tokens(
    model: Falcon,
    sampling: Sampling,
    params: Params,
    lengths_B: jax.Array,
    carry: _Carry,
    last: jax.Array,
    key: jax.Array,
) -> _Carry:
    """Generates until every sequence that is not done has `last` new tokens."""
    keys = jax.random.split(key, sampling.max_new_tokens)
    stop = jnp.asarray(sampling.stop_tokens or (-1,), jnp.int32)
    segments_Bx1 = jnp.ones((len(lengths_B), 1), jnp.int32)
    apply: Any = functools.partial(model.apply, {"params": params})

    def going(c: _Carry) -> jax.Array:
        return (c.step < last) & ~jnp.all(c.done_B)

    def add_token(c: _Carry) -> _Carry:
        token_B = sample(c.logits_BxV, keys[c.step], sampling)
        done_B = c.done_B | jnp.any(token_B[:, None] == stop[None], axis=1)
        out_BxN = c.out_BxN.at[:, c.step].set(jnp.where(done_B, 0, token_B))
        position_Bx1 = (lengths_B + c.step)[:, None]
        logits, cache = apply(token_B[:, None], position_Bx1, segments_Bx1, c.cache)
        return _Carry(c.step + 1, logits[:, 0], cache, out_BxN, c.count_B + ~done_B, done_B)

    return jax.lax.while_loop(going, add_token, carry)
