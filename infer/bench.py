"""Speed of decoding at real widths, with random weights, against what the memory delivers to the same threads.

Times on a shared machine drift, so every measurement of a kernel or a step stands between two readings of memory, and
medians are reported. Weights must be far larger than the last-level cache, and active sets change from call to call.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from falcon_relu.config import FalconConfig
from infer import kernels
from infer.formats import DTYPES, Format, Rows, quantise
from infer.kernels import native
from infer.memory import huge_empty
from infer.step import DecodeState, Mode, decode_step, step_bytes
from infer.weights import DecodeWeights, Formats, LayerWeights, Norm, PredictorWeights

_PATTERN_ROWS = 2048  # distinct random rows; a matrix repeats them, which memory cannot tell


def random_weights(config: FalconConfig, formats: Formats, rank: int, seed: int = 0) -> DecodeWeights:
    """Decode weights of true widths that cost little time to make.

    All up-projections come out positive, so that every neuron that is chosen fires and its down row is read too. The
    predictors' logits are random: set the share of neurons with `with_active_share`.
    """
    D, F, V = config.d_model, config.d_ff, config.vocab_size
    heads = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    rng = np.random.default_rng(seed)

    def norm(bias: float) -> Norm:
        return Norm(jnp.ones(D, jnp.float32), jnp.full(D, bias, jnp.float32))

    def layer() -> LayerWeights:
        return LayerWeights(
            attention_norm=norm(0.0 if config.block != "parallel" else 1.0),
            mlp_norm=None if config.block == "parallel" else norm(1.0),
            qkv=random_rows(rng, heads, D, formats.attention),
            out=random_rows(rng, D, D, formats.attention),
            up=random_rows(rng, F, D, formats.mlp, mean=0.01),
            down=random_rows(rng, F, D, formats.mlp),
            predictor=PredictorWeights(
                random_rows(rng, rank, D, formats.predictor),
                random_rows(rng, F, rank, formats.predictor, distinct=F),
                jnp.float32(-np.inf),
                jnp.int32(F),
            ),
        )

    return DecodeWeights(
        config=config,
        predictor_input="block_input",
        embedding=random_rows(rng, V, D, formats.head),
        layers=tuple(layer() for _ in range(config.n_layers)),
        final_norm=norm(0.0),
    )


def random_rows(
    rng: np.random.Generator, M: int, D: int, format: Format, mean: float = 0.0, distinct: int = _PATTERN_ROWS
) -> Rows:
    """[M, D] of normal numbers in huge pages, on the device."""
    pattern = quantise(rng.standard_normal((min(M, distinct), D), np.float32) * 0.02 + mean, format)
    repeats = -(-M // pattern.shape[0])
    data = huge_empty((M, D), DTYPES[format])
    for start in range(0, M, pattern.shape[0]):
        part = data[start : start + pattern.shape[0]]
        part[:] = np.asarray(pattern.data)[: len(part)]
    scale = None if pattern.scale is None else np.tile(np.asarray(pattern.scale), repeats)[:M]
    return jax.tree.map(jax.device_put, Rows(data, scale))


def with_active_share(weights: DecodeWeights, share: float) -> DecodeWeights:
    """The weights with budgets of that share of the neurons: the highest logits, other ones for every token."""
    budget = jnp.int32(round(share * weights.config.d_ff))
    layers = tuple(
        dataclasses.replace(layer, predictor=dataclasses.replace(layer.predictor, budget=budget))  # type: ignore[type-var]
        for layer in weights.layers
    )
    return dataclasses.replace(weights, layers=layers)


# ---- whole tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenFigures:
    """One way of decoding, measured.

    Attributes:
      seconds: median time of a step.
      bytes: of weights read by a step.
      head_bytes: of these, the vocabulary head's, which a model has once.
      bandwidth: bytes a second that memory delivered to plain reading between the steps.
      active: share of the neurons read.
    """

    seconds: float
    bytes: int
    head_bytes: int
    bandwidth: float
    active: float

    def row(self, name: dict[str, Any], layers: int, full_layers: int, full_bandwidth: float) -> dict[str, Any]:
        """As a table row, projected to a whole model on a machine of another bandwidth at the same share of it."""
        rate = self.bytes / self.seconds
        full_bytes = self.head_bytes + (self.bytes - self.head_bytes) * full_layers / layers
        share = rate / self.bandwidth
        return name | {
            "active": self.active,
            "ms/token": 1e3 * self.seconds,
            "GB/token": self.bytes / 1e9,
            "GB/s": rate / 1e9,
            "memory GB/s": self.bandwidth / 1e9,
            "share of memory": share,
            "ideal ms": 1e3 * self.bytes / self.bandwidth,
            f"tokens/s, {full_layers} layers at {full_bandwidth / 1e9:g} GB/s": full_bandwidth * share / full_bytes,
        }


def measure_tokens(
    weights: DecodeWeights, mode: Mode, backend: kernels.Backend, context: int, steps: int, batch: int = 1
) -> TokenFigures:
    """Decodes random tokens with half of the context behind them."""
    rng = np.random.default_rng(0)
    state = DecodeState.empty(weights.config, batch, context, jnp.float16)
    state = dataclasses.replace(state, length_B=jnp.full(batch, context // 2, jnp.int32))
    read = memory_reader([rows for layer in weights.layers for rows in (layer.up, layer.down)])
    seconds, bandwidths = [], []
    for step in range(steps + 1):
        token_B = jnp.asarray(rng.integers(0, weights.config.vocab_size, batch), jnp.int32)
        start = time.perf_counter()
        logits, state, reads = decode_step(weights, state, token_B, mode=mode, backend=backend)
        logits.block_until_ready()
        if step:  # the first one compiles
            seconds.append(time.perf_counter() - start)
        bandwidths.append(read())
    c = weights.config
    return TokenFigures(
        seconds=float(np.median(seconds)),
        bytes=step_bytes(weights, reads, mode),
        head_bytes=weights.head_rows.nbytes,
        bandwidth=float(np.median(bandwidths)),
        active=float(reads.down_L.sum()) / (c.d_ff * c.n_layers),
    )


def memory_reader(matrices: list[Rows]) -> Callable[[], float]:
    """A function that streams through the next of the matrices, all threads reading, and returns bytes a second."""
    order = iter(range(1 << 60))

    def read() -> float:
        rows = matrices[next(order) % len(matrices)]
        return rows.data.nbytes / _timed(_read, rows)

    read()
    return read


# ---- single kernels


def measure_kernels(
    D: int, F: int, format: Format, active: tuple[float, ...], repeats: int
) -> Iterator[dict[str, Any]]:
    """One table row a kernel and backend: its rate against plain reading of the same rows in the same order."""
    rng = np.random.default_rng(0)
    matrices = [random_rows(rng, F, D, format) for _ in range(2)]  # in turn, so that no call finds the last one's rows
    x_BxD = jnp.asarray(rng.standard_normal((1, D)), jnp.float32)
    h_BxF = jnp.asarray(rng.standard_normal((1, F)), jnp.float32)
    index = [_random_index(rng, F, share) for share in active for _ in range(repeats)]
    every = [()] * repeats
    for k in _backends():
        dot, gathered, weighted = (jax.jit(f) for f in (k.rows_dot, k.gathered_rows_dot, k.weighted_row_sum))
        shape = {"backend": kernels.describe(k), "format": format}
        yield _row(shape | {"kernel": "rows_dot"}, matrices, every, lambda w: dot(w, x_BxD))  # noqa: B023
        yield _row(shape | {"kernel": "weighted_row_sum"}, matrices, every, lambda w: weighted(w, h_BxF))  # noqa: B023
        for share in active:
            some = [one for one in index if int(one[1]) == round(share * F)]
            named = shape | {"active": share}
            up = lambda w, i, n: gathered(w, i, n, x_BxD)  # noqa: E731, B023
            down = lambda w, i, n: weighted(w, h_BxF, i, n)  # noqa: E731, B023
            yield _row(named | {"kernel": "gathered_rows_dot"}, matrices, some, up)
            yield _row(named | {"kernel": "weighted_row_sum"}, matrices, some, down)


def measure_select(F: int, share: float, repeats: int) -> Iterator[dict[str, Any]]:
    """Time of choosing that share of F neurons, by threshold and by budget."""
    score_BxF = jnp.asarray(np.random.default_rng(0).standard_normal((1, F)), jnp.float32)
    threshold = float(jnp.quantile(score_BxF, 1 - share))
    for k in _backends():
        select = jax.jit(k.select)
        for by, arguments in (("threshold", (threshold, F)), ("budget", (-np.inf, round(share * F)))):
            seconds = [_timed(select, score_BxF, *arguments) for _ in range(repeats + 1)][1:]
            yield {"backend": kernels.describe(k), "by": by, "active": share, "ms": 1e3 * float(np.median(seconds))}


def _row(
    name: dict[str, Any], matrices: list[Rows], index: list[tuple], kernel: Callable[..., jax.Array]
) -> dict[str, Any]:
    w = matrices[0]
    rates, memory = [], []
    for i, one in enumerate([index[0], *index]):
        count = int(one[1]) if one else w.shape[0]
        read, compute = matrices[i % 2], matrices[(i + 1) % 2]
        size = count * w.row_bytes
        memory.append(size / _timed(_read, read, *one))
        rates.append(size / _timed(kernel, compute, *one))
    rate, delivered = float(np.median(rates[1:])), float(np.median(memory[1:]))  # the first calls compile
    order = ("kernel", "backend", "format", "active")
    labels = {key: name.get(key) for key in order}
    return labels | {"GB/s": rate / 1e9, "memory GB/s": delivered / 1e9, "share of memory": rate / delivered}


def _random_index(rng: np.random.Generator, F: int, share: float) -> tuple[jax.Array, jax.Array]:
    count = round(share * F)
    index = np.full(F, F, np.int32)
    index[:count] = np.sort(rng.choice(F, count, replace=False))
    return jnp.asarray(index), jnp.int32(count)


def _backends() -> list[Any]:
    return [kernels.xla] if native.missing() else [native, kernels.xla]


@functools.cache
def _reader() -> Callable[..., jax.Array]:
    return jax.jit(kernels.backend().read_rows)


def _read(*args: Any) -> jax.Array:
    return _reader()(*args)


def _timed(function: Callable[..., Any], *args: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start
