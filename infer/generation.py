"""Continuing prompts on a CPU: prefill in blocks, then one decode step for each token; new tokens are streamed."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Generator, Iterator, Sequence
from typing import ClassVar

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np

from falcon_relu.config import FalconConfig
from falcon_relu.generation import Sampling, check_prompts, pad_prompts, sample
from infer import kernels
from infer.kernels.cache import CacheFormat
from infer.step import DecodeState, Mode, Reads, check_mode, decode_step, prefill, prefill_bytes, step_bytes, unembed
from infer.weights.layout import DecodeWeights

_BLOCKS = (16, 64, 128, 192, 256)  # prompt tokens of a prefill program: few programs to compile, little padding
_CONTEXT_STEP = 128  # cache sizes are multiples of it, so that few programs are compiled


@dataclasses.dataclass
class DecodeStats:
    """Counts and times of decoding, filled in as it runs; several calls add up. Compilation is not counted.

    Attributes:
      prompt_tokens: number of tokens of all prompts.
      prompt_seconds: time of prefilling them.
      steps: number of decode steps; each generates one token for every sequence.
      timed_steps: number of steps that were timed: all but the first of each call.
      timed_tokens: number of tokens that the timed steps generated, over all sequences.
      step_seconds: time of the timed steps.
      tokens: number of tokens generated, over all sequences.
      step_bytes: bytes of weights read by a step, on average.
      neurons_read: share of the up-projections' rows read by a step, on average.
      mlp_read: share of both projections' rows read by a step, on average.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    steps: int = 0
    timed_steps: int = 0
    timed_tokens: int = 0
    step_seconds: float = 0.0
    tokens: int = 0
    step_bytes: float = 0.0
    neurons_read: float = 0.0
    mlp_read: float = 0.0

    @property
    def prompt_tokens_per_second(self) -> float:
        """Speed of the prefill."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Speed of generation, all sequences together."""
        return self.timed_tokens / self.step_seconds if self.step_seconds else 0.0

    @property
    def steps_per_second(self) -> float:
        """Decode steps a second."""
        return self.timed_steps / self.step_seconds if self.step_seconds else 0.0

    @property
    def bytes_per_second(self) -> float:
        """Bytes of weights read a second while decoding."""
        return self.step_bytes * self.steps_per_second


def generate(
    weights: DecodeWeights,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    mode: Mode = "dense",
    backend: kernels.Backend = "auto",
    cache: CacheFormat = "bf16",
    stats: DecodeStats | None = None,
) -> list[list[int]]:
    """Continues every prompt; returns the new ids only, up to and without a stop token. Errors as `stream`."""
    out: list[list[int]] = [[] for _ in prompts]
    for tokens in stream(weights, prompts, sampling, mode=mode, backend=backend, cache=cache, stats=stats):
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
    cache: CacheFormat = "bf16",
    stats: DecodeStats | None = None,
) -> Iterator[list[int | None]]:
    """Yields the next token of every sequence as soon as it is known; None for sequences that have ended.

    Given the same logits, it samples the same tokens as `falcon_relu.generation.generate`.

    Args:
      weights: the model.
      prompts: token ids, at least one to a prompt.
      sampling: how to choose and when to stop.
      mode: "dense", "exact" or "sparse", see `infer.step.decode_step`.
      backend: kernels to use.
      cache: number format of the KV cache.
      stats: filled in during the iteration.

    Raises:
      FalconError: a prompt is unusable, or the weights cannot serve the mode.
    """
    c = weights.config
    check_prompts(prompts, c.vocab_size, c.max_positions, sampling.max_new_tokens)
    check_mode(weights, mode)
    state = DecodeState.empty(c, len(prompts), _context(max(map(len, prompts)) + sampling.max_new_tokens), cache)
    return _stream(weights, state, prompts, sampling, mode, backend, stats or DecodeStats())


class Conversation:
    """A chat: a text that grows turn by turn, whose earlier turns stay in the KV cache.

    Where the text would exceed the model's context, its older half is dropped.
    """

    def __init__(
        self,
        weights: DecodeWeights,
        *,
        mode: Mode = "dense",
        backend: kernels.Backend = "auto",
        cache: CacheFormat = "bf16",
    ):
        check_mode(weights, mode)
        self._weights, self._mode, self._backend, self._cache = weights, mode, backend, cache
        self._text: list[int] = []
        self._state: DecodeState | None = None  # the cache of a prefix of the text

    def reply(self, ids: Sequence[int], sampling: Sampling, stats: DecodeStats | None = None) -> Iterator[int]:
        """Adds the tokens of a turn to the text, then continues it; yields the new tokens.

        Raises:
          FalconError: the new tokens alone do not fit the context.
        """
        c = self._weights.config
        check_prompts([ids], c.vocab_size, c.max_positions, sampling.max_new_tokens)
        self._text += ids
        if len(self._text) + sampling.max_new_tokens > c.max_positions:
            self._text = self._text[-max(len(ids), (c.max_positions - sampling.max_new_tokens) // 2) :]
            self._state = None
        state = self._state or DecodeState.empty(c, 1, c.max_positions, self._cache)
        unread = [self._text[int(state.length_B[0]) :]]
        self._state = (
            None  # the first step donates it; if the caller stops early, the next turn prefills the whole text
        )
        steps = _stream(self._weights, state, unread, sampling, self._mode, self._backend, stats or DecodeStats())
        while True:
            try:
                (token,) = next(steps)
            except StopIteration as end:
                self._state = end.value
                return
            assert token is not None  # a single sequence ends the stream
            self._text.append(token)
            yield token


def _stream(
    weights: DecodeWeights,
    state: DecodeState,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    mode: Mode,
    backend: kernels.Backend,
    stats: DecodeStats,
) -> Generator[list[int | None], None, DecodeState]:
    """See `stream`; returns the state, whose cache lacks the last token, and a stop token."""
    begun, compiled = time.perf_counter(), _Compiling.seconds
    logits_BxV, state = read_prompts(weights, state, prompts, backend)
    logits_BxV.block_until_ready()
    stats.prompt_tokens += sum(map(len, prompts))
    stats.prompt_seconds += max(time.perf_counter() - begun - (_Compiling.seconds - compiled), 1e-6)

    keys = jax.random.split(jax.random.key(sampling.seed), sampling.max_new_tokens)
    # The static settings of the sampling program: another seed, length or stop token compiles nothing.
    drawing = dataclasses.replace(sampling.of_program(), max_new_tokens=1, stop_tokens=())
    ended = np.zeros(len(prompts), bool)
    begun = 0.0
    for step, key in enumerate(keys):
        token_B = _sample(logits_BxV, key, drawing)
        reads = None
        if step + 1 < sampling.max_new_tokens:  # dispatched before this step's token is read back
            logits_BxV, state, reads = decode_step(weights, state, token_B, mode=mode, backend=backend)
        tokens = np.asarray(token_B)
        ended |= np.isin(tokens, sampling.stop_tokens)
        if ended.all():
            return state if reads is None else dataclasses.replace(state, length_B=state.length_B - 1)
        stats.tokens += int((~ended).sum())
        yield [None if done else int(token) for token, done in zip(tokens, ended, strict=True)]
        if reads is not None:
            logits_BxV.block_until_ready()
            now = time.perf_counter()
            if begun:  # the first step may have compiled
                stats.timed_steps += 1
                stats.timed_tokens += int((~ended).sum())
                stats.step_seconds += now - begun
            _note(stats, weights, reads, mode)
            begun = now  # the time between two steps counts too, including `_note`
    return state


def working_bytes(config: FalconConfig, batch: int, prompt: int, tokens: int, cache: CacheFormat = "bf16") -> int:
    """Bytes that `generate` needs beside the weights: the KV cache and the temporary buffers of a prefill.

    Args:
      config: the model.
      batch: number of sequences.
      prompt: number of tokens of the longest prompt.
      tokens: number of tokens of the longest sequence, prompt and continuation.
      cache: number format of the KV cache.
    """
    return DecodeState.nbytes(config, batch, _context(tokens), cache) + prefill_bytes(config, batch, _block(prompt))


def read_prompts(
    weights: DecodeWeights, state: DecodeState, prompts: Sequence[Sequence[int]], backend: kernels.Backend = "auto"
) -> tuple[jax.Array, DecodeState]:
    """Prefills prompts of any lengths; returns the logits [B, V] after each one's last token, and the state."""
    tokens_BxT, lengths_B = pad_prompts(prompts)
    hidden_BxD = jnp.zeros((len(prompts), weights.config.d_model), jnp.float32)
    start = 0
    while (left := tokens_BxT.shape[1] - start) > 0:
        T = _block(left)
        block_BxT = np.zeros((len(prompts), T), np.int32)
        block_BxT[:, : min(left, T)] = tokens_BxT[:, start : start + T]
        valid_B = np.clip(lengths_B - start, 0, T)
        last_BxD, state = prefill(weights, state, block_BxT, valid_B, backend=backend)
        hidden_BxD = jnp.where(jnp.asarray(valid_B > 0)[:, None], last_BxD, hidden_BxD)
        start += T
    return unembed(weights, hidden_BxD, backend=backend), state


def _block(tokens: int) -> int:
    """Size of the next prefill block, when `tokens` are left."""
    return next((size for size in _BLOCKS if size >= tokens), _BLOCKS[-1])


def _context(tokens: int) -> int:
    return -(-tokens // _CONTEXT_STEP) * _CONTEXT_STEP


_sample = functools.partial(jax.jit, static_argnums=2)(sample)


def _note(stats: DecodeStats, weights: DecodeWeights, reads: Reads, mode: Mode) -> None:
    stats.steps += 1
    n_neurons = weights.config.d_ff * weights.config.n_layers
    up, down = (float(np.asarray(rows_L).sum()) / n_neurons for rows_L in (reads.up_L, reads.down_L))
    stats.neurons_read += (up - stats.neurons_read) / stats.steps
    stats.mlp_read += ((up + down) / 2 - stats.mlp_read) / stats.steps
    stats.step_bytes += (step_bytes(weights, reads, mode) - stats.step_bytes) / stats.steps


class _Compiling:
    """Seconds that this process has spent tracing and compiling programs, from JAX's events."""

    seconds = 0.0
    _spans: ClassVar[list[tuple[float, float]]] = []  # (start, duration) of events that do not contain each other

    @classmethod
    def add(cls, event: str, duration_secs: float, **_: str | int) -> None:
        if not event.startswith("/jax/core/compile/"):
            return
        start = time.perf_counter() - duration_secs
        while cls._spans and cls._spans[-1][0] >= start:  # nested in this one, and reported before it
            cls.seconds -= cls._spans.pop()[1]
        cls._spans.append((start, duration_secs))
        cls.seconds += duration_secs


jax.monitoring.register_event_duration_secs_listener(_Compiling.add)
