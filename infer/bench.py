"""Speed of decoding at real widths, with random weights, against what the memory delivers to the same threads.

Times on a shared machine drift, so everything that is compared is measured in turn, again and again, and medians are
reported. Weights must be far larger than the last-level cache, and active sets change from call to call.
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
from infer.step import MODES, DecodeState, Mode, decode_step, step_bytes, unembed
from infer.weights.formats import DTYPES, Format, Rows, quantise
from infer.weights.layout import DecodeWeights, Formats, LayerWeights, Norm, PredictorWeights
from infer.weights.memory import free_memory, huge_empty

_PATTERN_ROWS = 2048  # distinct random rows; a matrix repeats them, which memory cannot tell
_KERNEL_BYTES = 4 << 30  # of the matrices that a kernel is measured on
_MOST_MATRICES = 16


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
      seconds: time of each step.
      head_seconds: of the vocabulary head alone, which a step includes, after each step.
      choosing_seconds: of choosing the neurons of all layers, which a sparse step includes, after each step; else 0.
      bandwidth: bytes a second that memory delivered to plain reading after each step.
      bytes: of weights read by a step.
      head_bytes: of these, the vocabulary head's, which a model has once.
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
        self, name: dict[str, Any], dense: TokenFigures | None, layers: int, full_layers: int, full_bandwidth: float
    ) -> dict[str, Any]:
        """As a table row, projected to a whole model on a machine of another bandwidth at the same share of it.

        Ratios are medians over the steps of what was measured one after the other: memory may be slower a second later.
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


def measure_ways(
    ways: Sequence[tuple[DecodeWeights, Mode]], backend: kernels.Backend, context: int, steps: int, batch: int = 1
) -> list[TokenFigures]:
    """Decodes random tokens with half of the context behind them, one step each way in turn.

    The ways must share their matrices; their predictors' budgets may differ.
    """
    weights = ways[0][0]
    c = weights.config
    rng = np.random.default_rng(0)
    read = memory_reader([rows for layer in weights.layers for rows in (layer.up, layer.down)])
    choose = _choosing(c.d_ff, c.n_layers, kernels.backend(backend))
    hidden_BxD = jnp.ones((batch, c.d_model), jnp.float32)
    states = [half_full(c, batch, context) for _ in ways]
    times = np.zeros((len(ways), steps + 1, 4))  # a step, the head, choosing, reading
    reads: list[Any] = [None] * len(ways)
    for step in range(steps + 1):
        for i, (chosen, mode) in enumerate(ways):
            token_B = jnp.asarray(rng.integers(0, c.vocab_size, batch), jnp.int32)
            start = time.perf_counter()
            logits, states[i], reads[i] = decode_step(chosen, states[i], token_B, mode=mode, backend=backend)
            logits.block_until_ready()
            times[i, step, 0] = time.perf_counter() - start
            times[i, step, 1] = timed(functools.partial(unembed, backend=backend), weights, hidden_BxD)
            predictor = chosen.layers[0].predictor
            times[i, step, 2] = choose(predictor.budget) if predictor and mode == "sparse" else 0.0
            times[i, step, 3] = read()
    return [
        TokenFigures(
            seconds=of[1:, 0],  # the first step compiles
            head_seconds=of[1:, 1],
            choosing_seconds=of[1:, 2],
            bandwidth=of[1:, 3],
            bytes=step_bytes(weights, read, mode),
            head_bytes=weights.head_rows.nbytes,
            active=float(read.down_L.sum()) / (c.d_ff * c.n_layers),
        )
        for of, read, (_, mode) in zip(times, reads, ways, strict=True)
    ]


def measure_widths(
    model: str, *, layers: int = 1, active: float = 0.1, steps: int = 10, backend: kernels.Backend = "auto"
) -> list[dict[str, Any]]:
    """Decoding at the widths of a member of the family, with random weights in bf16: dense, exact, sparse in turn.

    Args:
      model: member of the family.
      layers: of it; each takes as much memory as one of the real model's.
      active: share of the neurons that the predictors, of rank D / 8, choose.
      steps: tokens that are timed.
      backend: of the kernels.

    Returns:
      A mapping for each mode.

      - name: the mode.
      - bytes: read for a token.
      - seconds: median time of one.
      - bandwidth: bytes a second that memory gave to plain reading between the steps.
      - active: share of the down-projections' rows that were read.
    """
    config = family(model).replace(n_layers=layers, activation="relu", tied_embeddings=True)
    every = random_weights(config, Formats(), rank=config.d_model // 8)
    ways: list[tuple[DecodeWeights, Mode]] = [
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
        for found, (_, mode) in zip(measure_ways(ways, backend, context=256, steps=steps), ways, strict=True)
    ]


def measure_prefill(weights: DecodeWeights, prompt: int, repeats: int) -> dict[str, Any]:
    """Reading a prompt of so many tokens, the logits after its last one included, as a table row."""
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
    products = 2 * (prompt * (every - final) + final + c.vocab_size * c.d_model)  # `final` meets the last token only
    return {
        "prompt": prompt,
        "seconds": seconds,
        "tokens/s": prompt / seconds,
        "GFLOP/s of the matrices": products / seconds / 1e9,
    }


def memory_reader(matrices: list[Rows]) -> Callable[[], float]:
    """A function that streams through the next of the matrices, all threads reading, and returns bytes a second."""
    order = iter(range(1 << 60))

    def read() -> float:
        rows = matrices[next(order) % len(matrices)]
        return rows.data.nbytes / timed(_reader(), [rows], [()], jnp.int32(0))

    read()
    return read


def memory_bandwidth(size: int = 1 << 30) -> float:
    """Bytes a second that memory delivers to all threads together, reading `size` bytes of numbers in a stream.

    Fewer where less memory is free.
    """
    data = huge_empty((int(min(size, free_memory() / 4)) >> 14, 1 << 12), np.float32)
    data.fill(1.0)  # pages never written would all be the same one
    read = memory_reader([Rows(jax.device_put(data))])
    return float(np.median([read() for _ in range(3)]))


def half_full(c: FalconConfig, batch: int, context: int) -> DecodeState:
    """A cache in f16 with half of its context behind the next token."""
    state = DecodeState.empty(c, batch, context, jnp.float16)
    return dataclasses.replace(state, length_B=jnp.full(batch, context // 2, jnp.int32))


# ---- single kernels


def measure_kernels(
    D: int, F: int, format: Format, active: tuple[float, ...], repeats: int, backends: Sequence[kernels.Backend]
) -> Iterator[dict[str, Any]]:
    """One table row a kernel and backend: its rate against plain reading of as many rows in the same order.

    A call goes through all matrices, each product waiting for the one before, as the layers of a model do.
    """
    rng = np.random.default_rng(0)
    size = F * D * DTYPES[format].itemsize
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
    """Time of choosing that share of F neurons, by threshold and by budget."""
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
    for turn in range(repeats + 1):
        for i, (call, start) in enumerate(((_reader(), jnp.int32(0)), (run, x))):
            index = [() if share is None else _random_index(rng, F, share) for _ in matrices]
            jax.block_until_ready(index)  # copies that go on would be measured too
            rates[turn, i] = size / timed(call, matrices, index, start)
    memory, rate = rates[1:].T  # the first calls compile
    return {
        "GB/s": float(np.median(rate)) / 1e9,
        "memory GB/s": float(np.median(memory)) / 1e9,
        "share of memory": float(np.median(rate / memory)),
    }


def _chain(kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """kernel(matrix, index, x) for every matrix and its index, in order: none can start before the last one ended."""

    @jax.jit
    def run(matrices: list[Rows], index: list[tuple], x: jax.Array) -> jax.Array:
        for w, i in zip(matrices, index, strict=True):
            # To one number of x: XLA would do an addition to all of x anew in every later one.
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
    """A function from a budget to the time of choosing among F random scores so many times."""
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
    """Seconds that the function takes, its arrays included."""
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start
