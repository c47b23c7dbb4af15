"""Log-likelihoods of continuations. Requests with a common prefix share a row, so that the prefix is computed once.

A row is a prefix followed by several branches in one sequence. Each branch attends to the prefix and to itself: the
prefix has segment SHARED, every branch a segment of its own, and positions count along prefix and branch. One forward
pass of the unchanged model thus scores all choices of a question, or all questions that follow the same examples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from falcon_relu.attention import SHARED
from falcon_relu.config import FalconConfig
from falcon_relu.errors import FalconError
from falcon_relu.generation import Sampling, generate, padded_length
from falcon_relu.model import Falcon, Params
from falcon_relu.sharding import batch_sharding, on_host, place, use_mesh

_LEAST_SHARED = 16  # tokens; sharing a shorter prefix does not pay for the longer row
_LEAST_LENGTH = 64  # tokens; shorter rows are padded to it
_POSITIONS = 32  # positions of every row whose logits are computed at a time
_QUERY_CHUNK = 128
_BATCH_TOKENS = 2048  # a device: enough for full products, and logits that fit


class Request(NamedTuple):
    """Token ids of a context and of the continuation to be scored, neither empty."""

    context: Sequence[int] | np.ndarray
    continuation: Sequence[int]


class Score(NamedTuple):
    """A continuation's log-probability in nats, and whether each of its tokens is the likeliest at its place."""

    logprob: float
    greedy: bool


@dataclasses.dataclass
class Branch:
    """A context's end and its continuation, after a row's prefix; one branch serves requests that contain each other.

    Attributes:
      tokens: the end of the context, then the longest continuation without its last token.
      known: number of tokens that are of the context; scoring starts with the logits at index `known` - 1.
      requests: (number of the request, its continuation); each continuation starts at index `known`.
    """

    tokens: list[int]
    known: int
    requests: list[tuple[int, list[int]]]


@dataclasses.dataclass
class Row:
    """A prefix and the branches that follow it."""

    prefix: list[int]
    branches: list[Branch]

    @property
    def n_tokens(self) -> int:
        """Number of tokens in the row."""
        return len(self.prefix) + sum(len(branch.tokens) for branch in self.branches)

    @property
    def n_scored(self) -> int:
        """Number of log-probabilities to compute."""
        return sum(len(targets) for branch in self.branches for _, targets in branch.requests)

    @property
    def requests(self) -> list[int]:
        """The numbers of its requests."""
        return [number for branch in self.branches for number, _ in branch.requests]


def plan_rows(requests: Sequence[Request], context: int) -> list[Row]:
    """Groups all requests into rows of up to `context` tokens; the same requests always give the same rows.

    A request longer than the context is cut at its start, as in lm-eval.

    Raises:
      FalconError: a context or continuation is empty, or a continuation does not fit the context.
    """
    inputs = [_Input.of(number, request, context) for number, request in enumerate(requests)]
    inputs = list(_merge(sorted(inputs, key=_Input.order)))
    rows, start = [], 0
    while start < len(inputs):
        n, shared = _alike(inputs, start, context)
        rows.append(Row(inputs[start].ids[:shared].tolist(), [x.branch(shared) for x in inputs[start : start + n]]))
        start += n
    return rows


@dataclasses.dataclass
class _Input:
    """The ids that the model reads, [T] big-endian uint32; how many are of the context; the requests they serve."""

    ids: np.ndarray
    known: int
    requests: list[tuple[int, list[int]]]

    @classmethod
    def of(cls, number: int, request: Request, context: int) -> _Input:
        targets = list(request.continuation)
        if not len(request.context) or not targets:
            raise FalconError(f"request {number} has an empty context or continuation")
        if len(targets) > context:
            raise FalconError(f"request {number} has a continuation of {len(targets)} tokens; the context is {context}")
        ids = np.array([*request.context, *targets][-(context + 1) : -1], ">u4")
        return cls(ids, len(ids) + 1 - len(targets), [(number, targets)])

    def order(self) -> tuple[bytes, int]:
        return self.ids.tobytes(), self.known  # big-endian bytes are in the order of the ids

    @property
    def n_scored(self) -> int:
        return sum(len(targets) for _, targets in self.requests)

    def branch(self, shared: int) -> Branch:
        return Branch(self.ids[shared:].tolist(), self.known - shared, self.requests)

    def common(self, other: _Input) -> int:
        """Length of the common prefix, up to the first token that is scored."""
        most = min(self.known, other.known) - 1
        different = np.flatnonzero(self.ids[:most] != other.ids[:most])
        return int(different[0]) if len(different) else most


def _merge(inputs: Sequence[_Input]) -> Iterator[_Input]:
    """Drops every sorted input that the next one starts with, which takes over its requests."""
    held = inputs[0] if inputs else None
    for new in inputs[1:]:
        assert held is not None
        if held.known == new.known and np.array_equal(held.ids, new.ids[: len(held.ids)]):
            new = dataclasses.replace(new, requests=held.requests + new.requests)
        else:
            yield held
        held = new
    if held is not None:
        yield held


def _alike(inputs: Sequence[_Input], start: int, context: int) -> tuple[int, int]:
    """The number of inputs from `start` on to put into one row, and the length of their common prefix.

    Inputs are added as long as that saves tokens and the row fits the context.
    """
    shared, n, tokens, scored = inputs[start].known - 1, 1, len(inputs[start].ids), inputs[start].n_scored
    for before, new in itertools.pairwise(itertools.islice(inputs, start, None)):
        common = min(shared, before.common(new))
        tokens, scored = tokens + len(new.ids), scored + new.n_scored
        fits = max(tokens - n * common, scored) <= context
        if common < _LEAST_SHARED or n * common <= (n - 1) * shared or not fits:
            break
        shared, n = common, n + 1
    return n, shared if n > 1 else 0


class Engine(Protocol):
    """What an evaluation needs of a model, implemented by `FlaxEngine` and `infer.DecodeEngine`.

    Attributes:
      config: the architecture.
      prompts_together: the best number of prompts for a call of `generate`.
    """

    config: FalconConfig
    prompts_together: int

    def batches(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Groups rows into batches for `score`; the same rows always give the same batches."""

    def score(self, batch: Sequence[Row]) -> dict[int, Score]:
        """Scores of a batch, by the number of the request."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, until: Callable[[list[int]], bool]
    ) -> list[list[int]]:
        """Continues prompts; returns the new ids, up to a stop token or until `until(new ids)` is true."""


class FlaxEngine:
    """Runs the Flax model on one device or a mesh; all rows of a batch have one padded length. See `Engine`.

    A program is compiled for every padded length that occurs, see `falcon_relu.generation.padded_length`.
    """

    def __init__(self, model: Falcon, params: Params, mesh: Mesh | None = None):
        self.config, self._model, self._params, self._mesh = model.config, model, params, mesh
        self._devices = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        self.prompts_together = 8 * self._devices

    def batches(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Batches of rows of one padded length, the longest first."""
        found: list[list[Row]] = []
        for T, alike in itertools.groupby(sorted(rows, key=_length, reverse=True), _length):
            same, B = list(alike), self._batch_size(T)
            found += [same[start : start + B] for start in range(0, len(same), B)]
        return found

    def score(self, batch: Sequence[Row]) -> dict[int, Score]:
        """Scores of the rows' requests, in one forward pass."""
        T = _length(batch[0])
        chunk = _QUERY_CHUNK if T % _QUERY_CHUNK == 0 else None
        model = dataclasses.replace(self._model, query_chunk=chunk, attention="chunked")  # the kernel with SHARED
        arrays = _lay_out(batch, self._batch_size(T), T)
        count = max(row.n_scored for row in batch)
        if self._mesh is None:
            logprob_BxM, greedy_BxM = jax.device_get(_score(model, self._params, *arrays, count))
        else:
            with use_mesh(self._mesh):
                placed = (place(array, batch_sharding(self._mesh)) for array in arrays)
                found = _score(model, self._params, *placed, count)
                logprob_BxM, greedy_BxM = on_host(found)
        scores = {}
        for b, row in enumerate(batch):
            at = 0
            for branch in row.branches:
                for number, targets in branch.requests:
                    part = slice(at, at := at + len(targets))
                    logprob = float(logprob_BxM[b, part].astype(np.float64).sum())
                    scores[number] = Score(logprob, bool(greedy_BxM[b, part].all()))
        return scores

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, until: Callable[[list[int]], bool]
    ) -> list[list[int]]:
        """Continues all prompts together, padded to the same number in every call."""
        filled = [*prompts, *[prompts[-1]] * (self.prompts_together - len(prompts))]
        with contextlib.nullcontext() if self._mesh is None else use_mesh(self._mesh):
            return generate(self._model, self._params, filled, sampling, until)[: len(prompts)]

    def _batch_size(self, length: int) -> int:
        return self._devices * max(_BATCH_TOKENS // length, 1)


def _length(row: Row) -> int:
    return padded_length(max(row.n_tokens, row.n_scored), _LEAST_LENGTH)


def _lay_out(rows: Sequence[Row], B: int, T: int) -> tuple[np.ndarray, ...]:
    """Arrays [B, T]: tokens, positions, segments; and, filled from the left, indices to score and their targets."""
    tokens, positions, segments, slots, targets = (np.zeros((B, T), np.int32) for _ in range(5))
    for b, row in enumerate(rows):
        P = len(row.prefix)
        tokens[b, :P], positions[b, :P], segments[b, :P] = row.prefix, np.arange(P), SHARED
        start, at = P, 0
        for segment, branch in enumerate(row.branches, 1):
            n = len(branch.tokens)
            part = slice(start, start + n)
            tokens[b, part], positions[b, part], segments[b, part] = branch.tokens, P + np.arange(n), segment
            for _, wanted in branch.requests:
                first = start + branch.known - 1
                slots[b, at : at + len(wanted)] = first + np.arange(len(wanted))
                targets[b, at : at + len(wanted)] = wanted
                at += len(wanted)
            start += n
    return tokens, positions, segments, slots, targets


@functools.partial(jax.jit, static_argnums=0)
def _score(
    model: Falcon,
    params: Params,
    tokens_BxT: jax.Array,
    positions_BxT: jax.Array,
    segments_BxT: jax.Array,
    slots_BxT: jax.Array,
    targets_BxT: jax.Array,
    count: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of the first `count` targets of each row, and whether each is the likeliest; [B, T]."""
    apply: Any = functools.partial(model.apply, {"params": params})
    hidden_BxTxD = apply(tokens_BxT, positions_BxT, segments_BxT, method="hidden")

    def some(i: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start = i * _POSITIONS
        part = lambda x: jax.lax.dynamic_slice_in_dim(x, start, _POSITIONS, 1)  # noqa: E731
        at_BxCxD = jnp.take_along_axis(hidden_BxTxD, part(slots_BxT)[..., None], axis=1)
        logits_BxCxV = apply(at_BxCxD, method="unembed")
        target_BxC = jnp.take_along_axis(logits_BxCxV, part(targets_BxT)[..., None], axis=-1)[..., 0]
        new = target_BxC - jax.nn.logsumexp(logits_BxCxV, axis=-1), logits_BxCxV.argmax(-1) == part(targets_BxT)
        return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, start, 1), found, new)

    nothing = jnp.zeros(slots_BxT.shape, jnp.float32), jnp.zeros(slots_BxT.shape, bool)
    return jax.lax.fori_loop(0, -(-count // _POSITIONS), some, nothing)
