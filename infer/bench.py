"""Speed of decoding at a model's real widths, with random weights, against the memory bandwidth of the same threads.

Times on a shared machine drift, so what is compared is measured alternately in one loop, and medians are reported.
Weights must be far larger than the last-level cache, and the set of active neurons changes from call to call.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from falcon_relu.config import FalconConfig, family
from infer import kernels
from infer.generation import read_prompts
from infer.kernels.cache import CacheFormat
from infer.step import MODES, DecodeState, Mode, decode_step, half_full, step_bytes, unembed
from infer.weights.formats import Format, Rows, rows_like
from infer.weights.layout import DecodeWeights, Formats, Norm, skeleton
from infer.weights.memory import free_memory, huge_empty, reading_rates
from infer.weights.rounding import quantise

_PATTERN_ROWS = 2048  # distinct random rows; a matrix repeats them, which costs the memory the same
_LEAST_READ = 256 << 20  # bytes of a reading: more than the last-level caches hold
_KERNEL_BYTES = 4 << 30  # total size of the matrices that a kernel is measured on
_MOST_MATRICES = 16


def random_weights(config: FalconConfig, formats: Formats, rank: int, seed: int = 0) -> DecodeWeights:
    """Random decode weights at the config's widths, quick to generate.

    All pre-activations are positive, so every selected neuron fires and its down-projection row is read too. The
    predictors' logits are random: `with_active_share` sets the share of neurons that they select.
    """
    rng = np.random.default_rng(seed)
    before_mlp = "attention_norm" if config.block == "parallel" else "mlp_norm"

    def fill(path: tuple[Any, ...], wanted: Any) -> Any:
        name = path[-1].name
        if isinstance(wanted, Rows):
            M, D = wanted.shape
            mean, distinct = 0.01 if name == "up" else 0.0, M if name == "fc2" else _PATTERN_ROWS
            return random_rows(rng, M, D, wanted.format, mean=mean, distinct=distinct)
        if isinstance(wanted, Norm):
            (D,) = wanted.scale_D.shape
            return Norm(jnp.ones(D, jnp.float32), jnp.full(D, float(name == before_mlp), jnp.float32))
        value = {"threshold": -np.inf, "budget": config.d_ff}.get(name, 0)
        return jnp.full(wanted.shape, value, wanted.dtype)

    shapes = skeleton(config, formats, (rank,) * config.n_layers, "block_input")
    return jax.tree_util.tree_map_with_path(fill, shapes, is_leaf=lambda part: isinstance(part, Rows | Norm))


def random_rows(
    rng: np.random.Generator, M: int, D: int, format: Format, mean: float = 0.0, distinct: int = _PATTERN_ROWS
) -> Rows:
    """Rows [M, D] of normally distributed numbers, in huge pages, as device arrays."""
    pattern = quantise(rng.standard_normal((min(M, distinct), D), np.float32) * 0.02 + mean, format)
    repeats = -(-M // pattern.shape[0])
    data = huge_empty((M, pattern.data.shape[1]), pattern.data.dtype)
    for start in range(0, M, pattern.shape[0]):
        part = data[start : start + pattern.shape[0]]
        part[:] = np.asarray(pattern.data)[: len(part)]
    scale = np.tile(np.asarray(pattern.scale), repeats)[:M] if format == "int8" else pattern.scale
    return jax.tree.map(jax.device_put, dataclasses.replace(pattern, data=data, scale=scale))


def with_active_share(weights: DecodeWeights, share: float) -> DecodeWeights:
    """The weights with each predictor's budget set to that share of the neurons; every token selects other ones."""
    budget = jnp.int32(round(share * weights.config.d_ff))
    layers = tuple(
        dataclasses.replace(layer, predictor=dataclasses.replace(layer.predictor, budget=budget))  # type: ignore[type-var]
        for layer in weights.layers
    )
    return dataclasses.replace(weights, layers=layers)


# ---- whole tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Measured decode steps of one setting; a step decodes one token a sequence.

    Attributes:
      seconds: time of each step, [steps].
      head_seconds: time of the vocabulary head alone, measured after each step; a step includes it.
      choosing_seconds: time of selecting the neurons of all layers, measured after each step; a sparse step includes
        it; 0 in the other modes.
      bandwidth: memory bandwidth, the best of several readings before and after each step, bytes a second.
      bytes: weights read by a step.
      head_bytes: how many of these are the vocabulary head's.
      active: share of the neurons read.
    """

    seconds: np.ndarray
    head_seconds: np.ndarray
    choosing_seconds: np.ndarray
    bandwidth: np.ndarray
    bytes: int
    head_bytes: int
    active: float

    @property
    def layer_seconds(self) -> np.ndarray:
        """Time of each step without the vocabulary head."""
        return self.seconds - self.head_seconds

    def row(
        self, name: dict[str, Any], dense: StepTimes | None, layers: int, full_layers: int, full_bandwidth: float
    ) -> dict[str, Any]:
        """A row of the results table, with the speed of the whole model projected to another memory bandwidth.

        Args:
          name: the row's first columns.
          dense: the times of dense decoding in the same loop, if it was measured.
          layers: number of layers measured.
          full_layers: number of layers of the whole model.
          full_bandwidth: memory bandwidth to project to, bytes a second; the same share of it is assumed to be used.

        Ratios are taken within each step and their median is reported, since the machine's speed drifts between steps.
        """
        seconds, bandwidth = float(np.median(self.seconds)), float(np.median(self.bandwidth))
        full_bytes = self.head_bytes + (self.bytes - self.head_bytes) * full_layers / layers
        share = float(np.median(self.bytes / self.seconds / self.bandwidth))
        return name | {
            "active": self.active,
            "ms/token": 1e3 * seconds,
            "GB/token": self.bytes / 1e9,
            "GB/s": self.bytes / seconds / 1e9,
            "memory GB/s": bandwidth / 1e9,
            "share of memory": share,
            "ideal ms": 1e3 * self.bytes / bandwidth,
            "layers, times dense": float(np.median(dense.layer_seconds / self.layer_seconds)) if dense else None,
            "choosing, share of layers": float(np.median(self.choosing_seconds / self.layer_seconds)),
            f"tokens/s, {full_layers} layers at {full_bandwidth / 1e9:g} GB/s": full_bandwidth * share / full_bytes,
        }


def measure_settings(
    settings: Sequence[tuple[DecodeWeights, Mode]],
    backend: kernels.Backend,
    context: int,
    steps: int,
    batch: int = 1,
    cache: CacheFormat = "bf16",
) -> list[StepTimes]:
    """Decodes random tokens with half of the context filled, one step of each setting (weights, mode) in turn.

    The settings must share their matrices; their predictors' budgets may differ.
    """
    weights = settings[0][0]
    c = weights.config
    rng = np.random.default_rng(0)
    read = memory_reader([rows for layer in weights.layers for rows in (layer.up, layer.down)])
    choose = _choosing(c.d_ff, c.n_layers, kernels.backend(backend))
    hidden_BxD = jnp.ones((batch, c.d_model), jnp.float32)
    states = [half_full(c, batch, context, cache) for _ in settings]
    times = np.zeros((len(settings), steps + 1, 4))  # a step, the head, choosing, reading
    reads: list[Any] = [None] * len(settings)
    for step in range(steps + 1):
        for i, (variant, mode) in enumerate(settings):
            token_B = jnp.asarray(rng.integers(0, c.vocab_size, batch), jnp.int32)
            before = read()
            start = time.perf_counter()
            logits, states[i], reads[i] = decode_step(variant, states[i], token_B, mode=mode, backend=backend)
            logits.block_until_ready()
            times[i, step, 0] = time.perf_counter() - start
            times[i, step, 1] = timed(functools.partial(unembed, backend=backend), weights, hidden_BxD)
            predictor = variant.layers[0].predictor
            times[i, step, 2] = choose(predictor.budget) if predictor and mode == "sparse" else 0.0
            times[i, step, 3] = max(before, read())
    return [
        StepTimes(
            seconds=of[1:, 0],  # the first step compiles
            head_seconds=of[1:, 1],
            choosing_seconds=of[1:, 2],
            bandwidth=of[1:, 3],
            bytes=step_bytes(weights, read, mode),
            head_bytes=weights.head_rows.nbytes,
            active=float(read.down_L.sum()) / (c.d_ff * c.n_layers),
        )
        for of, read, (_, mode) in zip(times, reads, settings, strict=True)
    ]


def measure_widths(
    model: str, *, layers: int = 1, active: float = 0.1, steps: int = 10, backend: kernels.Backend = "auto"
) -> list[dict[str, Any]]:
    """Measures dense, exact and sparse decoding at the widths of a model of the family, with random weights in bf16.

    Args:
      model: name of the model in `FAMILY`.
      layers: number of layers; each takes as much memory as one of the real model's.
      active: share of the neurons that the predictors, of rank D / 8, select.
      steps: number of tokens timed.
      backend: kernels to use.

    Returns:
      A mapping for each mode.

      - name: the mode.
      - bytes: bytes of weights read for a token.
      - seconds: median time of a token.
      - bandwidth: memory bandwidth of plain reads between the steps, bytes a second.
      - active: share of the down-projections' rows that were read.
    """
    config = family(model).replace(n_layers=layers, activation="relu", tied_embeddings=True)
    every = random_weights(config, Formats(), rank=config.d_model // 8)
    settings: list[tuple[DecodeWeights, Mode]] = [
        (with_active_share(every, active if m == "sparse" else 1), m) for m in MODES
    ]
    return [
        {
            "name": mode,
            "bytes": found.bytes,
            "seconds": float(np.median(found.seconds)),
            "bandwidth": float(np.median(found.bandwidth)),
            "active": found.active,
        }
        for found, (_, mode) in zip(
            measure_settings(settings, backend, context=256, steps=steps), settings, strict=True
        )
    ]


def measure_prefill(weights: DecodeWeights, prompt: int, repeats: int) -> dict[str, Any]:
    """Measures the prefill of a prompt of `prompt` tokens, the logits after the last included; a row of results."""
    c = weights.config
    tokens = np.random.default_rng(0).integers(0, c.vocab_size, prompt).tolist()

    def run() -> jax.Array:
        return read_prompts(weights, DecodeState.empty(c, 1, prompt), [tokens])[0]

    seconds = float(np.median([timed(run) for _ in range(repeats + 1)][1:]))
    every = sum(
        w.shape[0] * w.shape[1] for layer in weights.layers for w in (layer.qkv, layer.out, layer.up, layer.down)
    )
    final = sum(
        w.shape[0] * w.shape[1] for w in (weights.layers[-1].out, weights.layers[-1].up, weights.layers[-1].down)
    )
    products = 2 * (prompt * (every - final) + final + c.vocab_size * c.d_model)  # `final`: of the last token only
    return {
        "prompt": prompt,
        "seconds": seconds,
        "tokens/s": prompt / seconds,
        "GFLOP/s of the matrices": products / seconds / 1e9,
    }


def memory_reader(matrices: list[Rows]) -> Callable[[], float]:
    """A function that reads matrices with all threads: the best of the kernels' way and two others, bytes a second."""
    order = iter(range(1 << 60))

    def read(ways: Sequence[int]) -> dict[int, float]:
        rows = matrices[next(order) % len(matrices)]
        kernels_way = {-1: rows.data.nbytes / timed(_reader(), [rows], [()], jnp.int32(0))}
        return kernels_way | reading_rates(np.asarray(rows.data), ways)

    tried = [reading_rates(np.asarray(rows.data)) for rows in matrices[:3]]
    fastest = sorted(tried[0], key=lambda way: -max(rates[way] for rates in tried))[:2]
    read(fastest)
    return lambda: max(read(fastest).values())


def memory_bandwidth(size: int = 1 << 30) -> float | None:
    """Bytes a second that memory delivers to all threads together, reading `size` bytes of numbers in a stream.

    Where less than four times that is free it reads a quarter of what is free; None if that would fit into a cache.
    """
    size = int(min(size, free_memory() / 4))
    if size < _LEAST_READ:
        return None
    data = huge_empty((size >> 14, 1 << 12), np.float32)
    data.fill(1.0)  # pages never written all map to one zero page, which stays in the cache
    read = memory_reader([Rows(jax.device_put(data))])
    return float(np.median([read() for _ in range(3)]))


# ---- single kernels


def measure_kernels(
    D: int, F: int, format: Format, active: tuple[float, ...], repeats: int, backends: Sequence[kernels.Backend]
) -> Iterator[dict[str, Any]]:
    """Yields a row of results for each kernel and backend: its bandwidth against a plain read of the same rows.

    A call goes through all matrices, each product depending on the one before, as in the layers of a model.
    """
    rng = np.random.default_rng(0)
    size = rows_like(F, D, format).nbytes
    matrices = [random_rows(rng, F, D, format) for _ in range(min(_MOST_MATRICES, -(-_KERNEL_BYTES // size)))]
    x_BxD = jnp.asarray(rng.standard_normal((1, D)), jnp.float32)
    h_BxF = jnp.asarray(rng.standard_normal((1, F)), jnp.float32)
    for k in map(kernels.backend, backends):
        up = _chain(lambda w, i, x, k=k: k.gathered_rows_dot(w, *i, x) if i else k.rows_dot(w, x))
        down = _chain(lambda w, i, h, k=k: k.weighted_row_sum(w, h, *i, skip_zeros=bool(i)))
        for share in (None, *active):
            for name, run, x in (("rows_dot", up, x_BxD), ("weighted_row_sum", down, h_BxF)):
                name = f"gathered_{name}" if share else name
                labels = {"kernel": name, "backend": kernels.describe(k), "format": format, "active": share}
                yield labels | _against_reading(run, x, matrices, share, repeats, rng)


def measure_select(F: int, share: float, repeats: int, backends: Sequence[kernels.Backend]) -> list[dict[str, Any]]:
    """Measures selecting that share of F neurons, by threshold and by budget; a row of results for each."""
    rows = []
    highest = (statistics.NormalDist().inv_cdf(1 - share) if share < 1 else -np.inf, F)
    for k in map(kernels.backend, backends):
        for by, (threshold, budget) in (("threshold", highest), ("budget", (-np.inf, round(share * F)))):
            choose = _choosing(F, _MOST_MATRICES, k, threshold)
            seconds = float(np.median([choose(budget) for _ in range(repeats + 1)][1:])) / _MOST_MATRICES
            rows.append({"backend": kernels.describe(k), "by": by, "active": share, "ms": 1e3 * seconds})
    return rows


def _against_reading(
    run: Callable[..., jax.Array],
    x: jax.Array,
    matrices: list[Rows],
    share: float | None,
    repeats: int,
    rng: np.random.Generator,
) -> dict[str, float]:
    F = matrices[0].shape[0]
    size = len(matrices) * (F if share is None else round(share * F)) * matrices[0].row_bytes
    rates = np.zeros((repeats + 1, 2))  # of reading, then of the kernel
    for repeat in range(repeats + 1):
        for i, (call, start) in enumerate(((_reader(), jnp.int32(0)), (run, x))):
            index = [() if share is None else _random_index(rng, F, share) for _ in matrices]
            jax.block_until_ready(index)  # else its copies are measured too
            rates[repeat, i] = size / timed(call, matrices, index, start)
    memory, rate = rates[1:].T  # the first calls compile
    return {
        "GB/s": float(np.median(rate)) / 1e9,
        "memory GB/s": float(np.median(memory)) / 1e9,
        "share of memory": float(np.median(rate / memory)),
    }


def _chain(kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Calls kernel(matrix, index, x) for every matrix and its index, each call depending on the result of the last."""

    @jax.jit
    def run(matrices: list[Rows], index: list[tuple], x: jax.Array) -> jax.Array:
        for w, i in zip(matrices, index, strict=True):
            # Added to a single element: XLA would repeat an addition to all of x in every later call.
            first = x[:, :1] + 0.0 * kernel(w, i, x)[:, :1]
            x = jax.lax.dynamic_update_slice(x, first, (0, 0))
        return x

    return run


@functools.cache
def _reader() -> Callable[..., jax.Array]:
    k = kernels.backend()

    @jax.jit
    def run(matrices: list[Rows], index: list[tuple], seen: jax.Array) -> jax.Array:
        for w, i in zip(matrices, index, strict=True):
            seen = k.read_rows(w, *i, seen=seen)
        return seen

    return run


def _choosing(F: int, times: int, k: ModuleType, threshold: float = -np.inf) -> Callable[[Any], float]:
    """A function from a budget to the time of selecting among F random scores, `times` times in a row."""
    score_BxF = jnp.asarray(np.random.default_rng(0).standard_normal((1, F)), jnp.float32)

    @jax.jit
    def run(threshold: jax.Array, budget: jax.Array) -> jax.Array:
        for _ in range(times):
            threshold = threshold + 0.0 * k.select(score_BxF, threshold, budget)[1]
        return threshold

    return lambda budget: timed(run, jnp.float32(threshold), jnp.int32(budget))


def _random_index(rng: np.random.Generator, F: int, share: float) -> tuple[jax.Array, jax.Array]:
    count = round(share * F)
    index = np.full(F, F, np.int32)
    index[:count] = np.sort(rng.choice(F, count, replace=False))
    return jnp.asarray(index), jnp.int32(count)


def timed(function: Callable[..., Any], *args: Any) -> float:
    """Seconds until the function's results are computed."""
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start
