"""Log-likelihoods from CPU decoding: the prefill reads the context, decode steps score the continuation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from falcon_relu.evaluation.scoring import Branch, Row, Score
from falcon_relu.generation import Sampling, padded_length
from infer import kernels
from infer.generation import read_prompts, stream
from infer.kernels.cache import CacheFormat
from infer.step import DecodeState, Mode, check_mode, decode_step
from infer.weights.layout import DecodeWeights


class DecodeEngine:
    """Evaluates decode weights in one of the three modes, a sequence at a time; an `evaluation.scoring.Engine`.

    As in decoding, the context is read by the prefill, which uses every neuron; the context's last token and the
    continuation go through decode steps of the mode. A prefix that several branches share is read once: each branch
    starts again from the prefix's length, and overwrites the cache entries of the branch before it.

    Raises:
      FalconError: the weights cannot serve the mode.
    """

    prompts_together = 1

    def __init__(
        self,
        weights: DecodeWeights,
        mode: Mode,
        backend: kernels.Backend = "auto",
        cache: CacheFormat = "bf16",
    ):
        check_mode(weights, mode)
        self._cache = cache
        self.config, self._weights, self._mode, self._backend = weights.config, weights, mode, backend
        self._state: DecodeState | None = None

    def batches(self, rows: Sequence[Row]) -> list[list[Row]]:
        """A batch for every row, the longest first, so that its cache can be reused for the others."""
        return [[row] for row in sorted(rows, key=_longest, reverse=True)]

    def score(self, batch: Sequence[Row]) -> dict[int, Score]:
        """Scores of the rows' requests, by the request's number."""
        return {number: score for row in batch for number, score in self._score_row(row).items()}

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, until: Callable[[list[int]], bool]
    ) -> list[list[int]]:
        """Continues each prompt, one at a time, until `until` holds for the new ids or sampling ends."""
        return [self._continue(prompt, sampling, until) for prompt in prompts]

    def _continue(self, prompt: Sequence[int], sampling: Sampling, until: Callable[[list[int]], bool]) -> list[int]:
        ids: list[int] = []
        for (token,) in stream(
            self._weights, [prompt], sampling, mode=self._mode, backend=self._backend, cache=self._cache
        ):
            if token is not None:
                ids.append(token)
            if token is None or until(ids):
                break
        return ids

    def _score_row(self, row: Row) -> dict[int, Score]:
        state = self._read(self._empty_state(_longest(row)), row.prefix)
        scores: dict[int, Score] = {}
        for branch in row.branches:
            state = dataclasses.replace(state, length_B=jnp.full(1, len(row.prefix), jnp.int32))
            state = self._read(state, branch.tokens[: branch.known - 1])
            found, state = self._score_branch(state, branch)
            scores |= found
        self._state = state
        return scores

    def _empty_state(self, tokens: int) -> DecodeState:
        """An empty state with space for so many tokens, in the buffers of the last one where they are large enough."""
        state, self._state = self._state, None
        if state is None or state.keys[0].shape[1] < tokens:
            return DecodeState.empty(self.config, 1, padded_length(tokens, 128), self._cache)
        return dataclasses.replace(state, length_B=jnp.zeros(1, jnp.int32))

    def _read(self, state: DecodeState, tokens: Sequence[int]) -> DecodeState:
        return read_prompts(self._weights, state, [tokens], self._backend)[1] if tokens else state

    def _score_branch(self, state: DecodeState, branch: Branch) -> tuple[dict[int, Score], DecodeState]:
        sums = {number: Score(0.0, True) for number, _ in branch.requests}
        for i, token in enumerate(branch.tokens[branch.known - 1 :]):
            token_B = np.array([token], np.int32)
            logits_BxV, state, _ = decode_step(self._weights, state, token_B, mode=self._mode, backend=self._backend)
            logits_V = np.asarray(logits_BxV)[0]
            top = int(logits_V.argmax())
            normaliser = logits_V[top] + np.log(np.exp(logits_V - logits_V[top]).sum(dtype=np.float64))
            for number, targets in branch.requests:
                if i < len(targets):
                    logprob, greedy = sums[number]
                    more = float(logits_V[targets[i]] - normaliser)
                    sums[number] = Score(logprob + more, greedy and top == targets[i])
        return sums, state


def _longest(row: Row) -> int:
    """Number of tokens of the longest sequence in a row."""
    return len(row.prefix) + max(len(branch.tokens) for branch in row.branches)
