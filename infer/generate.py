"""Continuing prompts on a CPU: prefill in blocks, then one decode step a token, streamed as they come."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from falcon_relu.generate import Sampling, check_prompts, pad_prompts, sample
from infer import kernels
from infer.step import DecodeState, Mode, Reads, check_mode, decode_step, prefill, step_bytes, unembed
from infer.weights import DecodeWeights

_BLOCKS = (16, 64, 256)  # prompt tokens a prefill program takes: few programs, little padding
_CONTEXT_STEP = 128  # cache sizes, so that few programs are compiled


@dataclasses.dataclass
class Figures:
    """What a run took, filled in as it goes.

    Attributes:
      prompt_tokens: tokens of all prompts.
      prompt_seconds: time for them, compilation included.
      steps: decode steps, each one token a sequence.
      step_seconds: time for the steps but the first, which compiles.
      tokens: tokens added to all sequences.
      step_bytes: bytes of weights that an average step read.
      neurons_read: share of the up-projections' rows that an average step read.
      mlp_read: share of both projections' rows that an average step read.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    steps: int = 0
    step_seconds: float = 0.0
    tokens: int = 0
    step_bytes: float = 0.0
    neurons_read: float = 0.0
    mlp_read: float = 0.0

    @property
    def steps_per_second(self) -> float:
        """Decode steps a second, without the first."""
        return (self.steps - 1) / self.step_seconds if self.steps > 1 else 0.0

    @property
    def bytes_per_second(self) -> float:
        """Weights read a second while decoding."""
        return self.step_bytes * self.steps_per_second


def generate(
    weights: DecodeWeights,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    mode: Mode = "dense",
    backend: kernels.Backend = "auto",
    figures: Figures | None = None,
) -> list[list[int]]:
    """Continues every prompt; returns the new ids only, up to and without a stop token. Errors as `stream`."""
    out: list[list[int]] = [[] for _ in prompts]
    for tokens in stream(weights, prompts, sampling, mode=mode, backend=backend, figures=figures):
        for row, token in zip(out, tokens, strict=True):
            if token is not None:
                row.append(token)
    return out


def stream(
    weights: DecodeWeights,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    mode: Mode = "dense",
    backend: kernels.Backend = "auto",
    figures: Figures | None = None,
) -> Iterator[list[int | None]]:
    """Yields the next token of every sequence as it comes; None for those that have ended.

    Given the same logits, the draws are those of `falcon_relu.generate.generate`.

    Args:
      weights: the model.
      prompts: token ids, at least one to a prompt.
      sampling: how to choose and when to stop.
      mode: see `decode_step`.
      backend: of the kernels.
      figures: filled in while the caller iterates.

    Raises:
      FalconError: a prompt is unusable, or the weights cannot serve the mode.
    """
    c = weights.config
    check_prompts(prompts, c.vocab_size, c.max_positions, sampling.max_new_tokens)
    check_mode(weights, mode)
    return _stream(weights, prompts, sampling, mode, backend, figures or Figures())


def _stream(
    weights: DecodeWeights,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    mode: Mode,
    backend: kernels.Backend,
    figures: Figures,
) -> Iterator[list[int | None]]:
    longest = max(map(len, prompts)) + sampling.max_new_tokens
    context = -(-longest // _CONTEXT_STEP) * _CONTEXT_STEP
    begun = time.perf_counter()
    logits_BxV, state = read_prompts(
        weights, DecodeState.empty(weights.config, len(prompts), context), prompts, backend
    )
    logits_BxV.block_until_ready()
    figures.prompt_tokens = sum(map(len, prompts))
    figures.prompt_seconds = time.perf_counter() - begun

    keys = jax.random.split(jax.random.key(sampling.seed), sampling.max_new_tokens)
    ended = np.zeros(len(prompts), bool)
    for step, key in enumerate(keys):
        token_B = _sample(logits_BxV, key, sampling)
        reads = None
        if step + 1 < sampling.max_new_tokens:  # under way before this token is looked at
            logits_BxV, state, reads = decode_step(weights, state, token_B, mode=mode, backend=backend)
        tokens = np.asarray(token_B)
        ended |= np.isin(tokens, sampling.stop_tokens)
        if ended.all():
            return
        figures.tokens += int((~ended).sum())
        yield [None if done else int(token) for token, done in zip(tokens, ended, strict=True)]
        if reads is not None:
            logits_BxV.block_until_ready()
            _note(figures, weights, reads, mode, begun)
            begun = time.perf_counter()


def read_prompts(
    weights: DecodeWeights, state: DecodeState, prompts: Sequence[Sequence[int]], backend: kernels.Backend = "auto"
) -> tuple[jax.Array, DecodeState]:
    """Prefills prompts of any lengths; the logits [B, V] after each one's last token, and the state."""
    tokens_BxT, lengths_B = pad_prompts(prompts)
    hidden_BxD = jnp.zeros((len(prompts), weights.config.d_model), jnp.float32)
    start = 0
    while (left := tokens_BxT.shape[1] - start) > 0:
        T = next((size for size in _BLOCKS if size >= left), _BLOCKS[-1])
        block_BxT = np.zeros((len(prompts), T), np.int32)
        block_BxT[:, : min(left, T)] = tokens_BxT[:, start : start + T]
        valid_B = np.clip(lengths_B - start, 0, T)
        last_BxD, state = prefill(weights, state, block_BxT, valid_B)
        hidden_BxD = jnp.where(jnp.asarray(valid_B > 0)[:, None], last_BxD, hidden_BxD)
        start += T
    return unembed(weights, hidden_BxD, backend=backend), state


_sample = functools.partial(jax.jit, static_argnums=2)(sample)


def _note(figures: Figures, weights: DecodeWeights, reads: Reads, mode: Mode, begun: float) -> None:
    figures.steps += 1
    if figures.steps > 1:
        figures.step_seconds += time.perf_counter() - begun
    n_neurons = weights.config.d_ff * weights.config.n_layers
    up, down = float(reads.up_L.sum()) / n_neurons, float(reads.down_L.sum()) / n_neurons
    figures.neurons_read += (up - figures.neurons_read) / figures.steps
    figures.mlp_read += ((up + down) / 2 - figures.mlp_read) / figures.steps
    figures.step_bytes += (step_bytes(weights, reads, mode) - figures.step_bytes) / figures.steps
