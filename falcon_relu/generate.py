"""Continuing prompts with the Flax model: jitted prefill and decoding on any backend."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from falcon_relu.errors import FalconError
from falcon_relu.model import Falcon, KVCache, Params

_PROMPT_BUCKET = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen, and when to stop.

    Attributes:
      max_new_tokens: tokens to add at most.
      temperature: divides the logits; 0 takes the likeliest token (greedy).
      top_k: sample among the k likeliest tokens only; 0 for all.
      top_p: sample among the likeliest tokens that together hold this probability (nucleus, arXiv:1904.09751).
      seed: of the random draws; the same seed and prompts give the same text.
      stop_tokens: ids that end a sequence; the stop token itself is not returned.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise FalconError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise FalconError(
                "sampling needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1, got "
                f"temperature={self.temperature}, top_k={self.top_k}, top_p={self.top_p}"
            )


def sample(logits_BxV: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """The next token of each sequence, [B] int32."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    logits_BxV = logits_BxV.astype(jnp.float32) / sampling.temperature
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


def generate(model: Falcon, params: Params, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    """Continues every prompt; returns the new ids only, up to and without a stop token.

    Prompts of different lengths are padded on the right, which changes no result. Programs are compiled for prompt
    lengths in steps of 32. Sampling draws depend on the seed and on the place of a prompt in the batch.

    Args:
      model: the model; its dtype is also the cache's.
      params: its parameters.
      prompts: token ids, at least one to a prompt.
      sampling: how to choose and when to stop.

    Raises:
      FalconError: a prompt is empty, has ids outside the vocabulary, or does not fit the context.
    """
    check_prompts(prompts, model.config.vocab_size, model.config.max_positions, sampling.max_new_tokens)
    tokens_BxT, lengths_B = pad_prompts(prompts, multiple=_PROMPT_BUCKET)
    out_BxN, count_B = jax.device_get(_generate(model, sampling, params, tokens_BxT, lengths_B))
    return [row[:count].tolist() for row, count in zip(out_BxN, count_B, strict=True)]


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int, context: int, max_new_tokens: int) -> None:
    """Refuses what could not be continued.

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


def pad_prompts(prompts: Sequence[Sequence[int]], multiple: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [B, T] padded on the right with 0 to a multiple, and the lengths [B]; both int32."""
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    T = -(-int(lengths_B.max()) // multiple) * multiple
    tokens_BxT = np.zeros((len(prompts), T), np.int32)
    for row, prompt in zip(tokens_BxT, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens_BxT, lengths_B


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(
    model: Falcon, sampling: Sampling, params: Params, tokens_BxT: jax.Array, lengths_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    B, T = tokens_BxT.shape
    N = sampling.max_new_tokens
    variables = {"params": params}
    keys = jax.random.split(jax.random.key(sampling.seed), N)
    stop = jnp.asarray(sampling.stop_tokens or (-1,), jnp.int32)

    slots = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    segments_BxT = (slots < lengths_B[:, None]).astype(jnp.int32)
    cache = KVCache.empty(model.config, B, T + N, model.dtype)
    apply: Any = model.apply
    hidden_BxTxD, cache = apply(variables, tokens_BxT, slots, segments_BxT, cache, method="hidden")
    last_Bx1xD = jnp.take_along_axis(hidden_BxTxD, (lengths_B - 1)[:, None, None], axis=1)
    logits_BxV = apply(variables, last_Bx1xD, method="unembed")[:, 0]

    def going(carry: tuple) -> jax.Array:
        step, *_, done_B = carry
        return (step < N) & ~jnp.all(done_B)

    def add_token(carry: tuple) -> tuple:
        step, logits_BxV, cache, out_BxN, count_B, done_B = carry
        token_B = sample(logits_BxV, keys[step], sampling)
        done_B = done_B | jnp.any(token_B[:, None] == stop[None], axis=1)
        out_BxN = out_BxN.at[:, step].set(jnp.where(done_B, 0, token_B))
        count_B = count_B + ~done_B
        logits, cache = apply(
            variables, token_B[:, None], (lengths_B + step)[:, None], jnp.ones((B, 1), jnp.int32), cache
        )
        return step + 1, logits[:, 0], cache, out_BxN, count_B, done_B

    start = (0, logits_BxV, cache, jnp.zeros((B, N), jnp.int32), jnp.zeros(B, jnp.int32), jnp.zeros(B, bool))
    _, _, _, out_BxN, count_B, _ = jax.lax.while_loop(going, add_token, start)
    return out_BxN, count_B
