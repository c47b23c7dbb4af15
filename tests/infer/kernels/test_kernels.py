from __future__ import annotations

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from falcon_relu.errors import FalconError
from infer import kernels
from infer.kernels import native, xla
from infer.kernels.cache import Cache, CacheFormat, empty_cache
from infer.weights.formats import DTYPES, Rows, widen
from infer.weights.int4 import EVEN_LEVELS, pack_int4
from infer.weights.rounding import quantise

INSTRUCTION_SETS = native.instruction_sets() if native.missing() is None else ()
BACKENDS = ("xla", *INSTRUCTION_SETS)
# Those with matrix products of their own; of these "plain_tiles", a stand-in of AMX in ordinary loops, runs everywhere.
PRODUCT_SETS = tuple(
    name for name in (*INSTRUCTION_SETS, "plain_tiles") if name not in ("avx512", "avx2", "plain", "neon")
)
FORMATS = tuple(DTYPES)
KERNELS = ("rows_dot", "gathered_rows_dot", "weighted_row_sum", "select", "attend")
# Compiled once a shape: instruction sets are picked when a kernel runs.
COMPILED = {
    (module, name): jax.jit(getattr(module, name), static_argnums=4 if name == "weighted_row_sum" else ())
    for module in (xla, native)
    for name in KERNELS
}


def run(backend: str, kernel: str, *args):
    """A kernel of "xla", or of the native library forced to an instruction set."""
    if backend != "xla":
        native.use_instruction_set(backend)
    return (
        np.asarray(out)
        if isinstance(out := COMPILED[xla if backend == "xla" else native, kernel](*args), jax.Array)
        else out
    )


@pytest.fixture(autouse=True)
def _best_instruction_set():
    yield
    if native.missing() is None:
        native.use_instruction_set(native.instruction_sets()[0])


def draw_case(seed: int, format: str, M: int, D: int, B: int, share: float):
    """Random rows, vectors, weights, and a sorted index of a share of the rows."""
    rng = np.random.default_rng(seed)
    w = quantise(rng.normal(size=(M, D)).astype(np.float32) * rng.uniform(0.1, 3, (M, 1)), format)
    count = round(share * M)
    index = np.full(M, M, np.int32)
    index[:count] = np.sort(rng.choice(M, count, replace=False))
    x = rng.normal(size=(B, D)).astype(np.float32)
    h = rng.normal(size=(B, M)).astype(np.float32)
    return w, np.asarray(widen(w), np.float64), index, np.int32(count), x, h


def half_step(vectors: np.ndarray) -> np.ndarray:
    """The most that rounding to 16 bits, as kernels of int8 rows do, may change an entry of each vector: [B, 1]."""
    return 1.01 * np.abs(vectors).max(axis=1, initial=0, keepdims=True) / 2 / 32639


def half_int8_steps(vectors: np.ndarray) -> np.ndarray:
    """The most that rounding runs of 32 numbers to 8 bits, as kernels of int4 rows do, may change an entry: [B, D]."""
    B, D = vectors.shape
    runs = np.pad(np.abs(vectors), ((0, 0), (0, -D % 32))).reshape(B, -1, 32).max(axis=-1)
    return 1.01 * np.repeat(runs, 32, axis=1)[:, :D] / 2 / 127


def close(actual: jax.Array, expected: np.ndarray, magnitude: np.ndarray, rounding: np.ndarray) -> None:
    """Within float32 rounding of sums whose terms have that total magnitude, and what rounding an input may change."""
    np.testing.assert_array_less(np.abs(np.asarray(actual) - expected), 4e-5 * magnitude + rounding + 1e-6)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("M", "D", "B"), [(1, 1, 3), (70, 64, 5), (19, 1600, 2), (150, 257, 1)])
@settings(max_examples=5)
@given(seed=st.integers(0, 1000), share=st.sampled_from([0.0, 0.3, 1.0]))
def test_rows_match_plain_arithmetic(format, M, D, B, seed, share):
    compare_with_plain_arithmetic(format, *draw_case(seed, format, M, D, B, share))


@pytest.mark.parametrize("format", FORMATS)
def test_wide_rows_and_sums_in_several_parts_match_plain_arithmetic(format):
    """Rows of more than 4,096 bytes, and enough of them for a sum in several parts on several threads."""
    compare_with_plain_arithmetic(format, *draw_case(0, format, 1100, 4230, 2, 0.6))


def compare_with_plain_arithmetic(format, w, dense, index, count, x, h):
    (B, D), M = x.shape, len(dense)
    chosen = index[:count]
    scale = np.asarray(w.scale, np.float64) if format == "int8" else np.ones(M)

    def dot() -> tuple[np.ndarray, ...]:
        rounding = half_step(x) * np.abs(dense).sum(axis=1) if format == "int8" else np.zeros((B, M))
        if format == "int4":
            rounding = half_int8_steps(x) @ np.abs(dense).T
        return x @ dense.T, np.abs(x) @ np.abs(dense).T, rounding

    def row_sum(h: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, ...]:
        units = np.abs(dense[rows] / scale[rows, None]).sum(axis=0)
        rounding = half_step(h * scale[rows]) * units if format == "int8" else np.zeros((B, D))
        return h @ dense[rows], np.abs(h) @ np.abs(dense[rows]), rounding

    for name in BACKENDS:
        close(run(name, "rows_dot", w, x), *dot())
        gathered = run(name, "gathered_rows_dot", w, index, count, x)
        close(gathered[:, :count], *(part[:, chosen] for part in dot()))
        assert not gathered[:, count:].any()
        close(run(name, "weighted_row_sum", w, h), *row_sum(h, np.arange(M)))
        close(run(name, "weighted_row_sum", w, h, index, count), *row_sum(h[:, :count], chosen))
        positive = np.maximum(h, 0)
        skipped = run(name, "weighted_row_sum", w, positive, index, count, True)
        close(skipped, *row_sum(positive[:, :count], chosen))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_finite_comes_out_as_in_f32_and_only_for_its_own_vector(format, bad):
    w, dense, _, _, x, h = draw_case(3, format, 60, 130, 2, 1.0)
    clean = {name: (run(name, "rows_dot", w, x)[0], run(name, "weighted_row_sum", w, h)[0]) for name in BACKENDS}
    x[1, 71], h[1, 33] = bad, bad
    for name in BACKENDS:
        found = run(name, "rows_dot", w, x), run(name, "weighted_row_sum", w, h)
        for y, before, expected in zip(found, clean[name], (bad * dense[:, 71], bad * dense[33]), strict=True):
            np.testing.assert_array_equal(y[1], expected)
            np.testing.assert_allclose(y[0], before, rtol=1e-5)
    if len(BACKENDS) > 1:
        native.use_instruction_set(INSTRUCTION_SETS[0])
    for k in (xla, native)[: len(BACKENDS)]:
        assert np.isnan(k.rows_matmul(w, np.where(np.isinf(x), np.nan, x))[1]).all()


@pytest.mark.parametrize("columns", [70_000, 140_000])
def test_sums_of_very_long_int8_rows_do_not_wrap_around(columns):
    w = Rows(np.ones((3, columns), np.int8), np.ones(3, np.float32))
    for name in BACKENDS:
        np.testing.assert_allclose(run(name, "rows_dot", w, np.ones((1, columns), np.float32)), columns, rtol=1e-4)


def test_sums_over_very_many_int8_rows_do_not_wrap_around():
    w = Rows(np.full((70_000, 65), -128, np.int8), np.ones(70_000, np.float32))
    for name in BACKENDS:
        y = run(name, "weighted_row_sum", w, np.ones((1, 70_000), np.float32))
        np.testing.assert_allclose(y, -128 * 70_000, rtol=1e-4)


def products_on(name: str):
    """Both products, on "xla" or on a forced instruction set."""
    if name == "xla":
        return xla.rows_matmul, xla.weighted_rows_matmul
    native.use_instruction_set(name)
    return native.rows_matmul, native.weighted_rows_matmul


def half_units(vectors: np.ndarray) -> np.ndarray:
    """The most that rounding every 1,024 numbers of a vector to int8 may change one of them."""
    N, K = vectors.shape
    runs = np.pad(np.abs(vectors), ((0, 0), (0, -K % 1024))).reshape(N, -(-K // 1024), 1024).max(axis=-1)
    return 1.01 * np.repeat(runs, 1024, axis=1)[:, :K] / 2 / 127


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("M", "D", "T"), [(550, 2112, 83), (2, 64, 1), (37, 131, 20)])
def test_products_with_many_vectors_match_plain_arithmetic(format, M, D, T):
    """Those in int8 are the same bits on every instruction set: integer sums are exact."""
    w, dense, _, _, x, h = draw_case(0, format, M, D, T, 1.0)
    scale = np.asarray(w.scale, np.float64) if format == "int8" else np.ones(M)
    first: dict[int, np.ndarray] = {}
    for name in ("xla", *PRODUCT_SETS[: len(PRODUCT_SETS) if INSTRUCTION_SETS else 0]):
        for transposed, (a, b) in enumerate(((x, dense.T), (h, dense))):
            product = products_on(name)[transposed]
            own = name != "xla" and native._has_product(w, bool(transposed))
            if name != "xla" and not own:
                continue
            in_int8 = own and (format == "int8" or (format == "int4" and not transposed))
            for count in (None, 0, T // 2) if own else (None,):
                y = np.asarray(product(w, a, count))
                assert np.isfinite(y).all()
                wanted = a[:count]
                # of vectors, and of int4 rows, to bf16; or of both to int8
                rounding = {"bf16": 2**-9, "int8": 2**-9, "int4": 2**-7}.get(format, 4e-5) * (
                    np.abs(wanted) @ np.abs(b)
                )
                if in_int8:
                    units = half_units(wanted * scale) / scale if transposed else half_units(wanted)
                    rounding = units @ np.abs(b) + 2**-9 * (np.abs(wanted) @ np.abs(b))
                if in_int8 and format == "int4":
                    highest = np.abs(dense).max(axis=1) if not transposed else 0
                    rounding += 1.01 * np.abs(wanted).sum(axis=1, keepdims=True) * highest / 2 / 80
                np.testing.assert_array_less(np.abs(y[: len(wanted)] - wanted @ b), rounding + 1e-6)
                if in_int8 and count is None:
                    np.testing.assert_array_equal(y, first.setdefault(transposed, y))


def test_products_of_no_vectors_are_empty():
    for format in ("f32", "bf16"):
        w = quantise(np.ones((6, 64), np.float32), format)
        for k in (xla, native)[: len(BACKENDS)]:
            assert k.rows_matmul(w, np.zeros((2, 0, 64), np.float32)).shape == (2, 0, 6)
            assert k.weighted_rows_matmul(w, np.zeros((0, 6), np.float32)).shape == (0, 64)


def scores_of_few_values(rng, B: int, F: int) -> np.ndarray:
    return rng.choice(np.array([-2, -0.0, 0, 0.5, 1, 1.5, np.inf, -np.inf, np.nan], np.float32), (B, F))


def scores_close_together(rng, B: int, F: int) -> np.ndarray:
    """Alike in their leading bits, each of them several times."""
    return (1 + rng.integers(0, F // 3, (B, F)) * 2.0**-23).astype(np.float32)


def scores_all_different(rng, B: int, F: int) -> np.ndarray:
    return rng.permuted(np.tile(np.linspace(-3, 3, F, dtype=np.float32), (B, 1)), axis=1)


@pytest.mark.parametrize("draw", [scores_of_few_values, scores_close_together, scores_all_different])
@pytest.mark.parametrize(("B", "F"), [(1, 12), (1, 1003), (3, 4001)])
def test_select_takes_each_sequences_highest_and_of_equals_the_lowest(draw, B, F):
    rng = np.random.default_rng(F)
    for threshold in (-np.inf, 0.0, 0.5, np.inf):
        for budget in (0, 1, F // 5, F // 2, F + 2):
            score = draw(rng, B, F)
            wanted = [
                sorted(sorted(np.flatnonzero(of >= threshold), key=lambda f: (-of[f], f))[:budget]) for of in score
            ]
            union = sorted(set().union(*wanted))
            for name in BACKENDS:
                index, count, chosen = run(name, "select", score, np.float32(threshold), np.int32(budget))
                assert int(count) == len(union)
                assert index.tolist() == union + [F] * (F - len(union))
                for b, of in enumerate(wanted):
                    assert np.asarray(index)[np.asarray(chosen[b])].tolist() == of


@pytest.mark.parametrize("format", get_args(CacheFormat))
@pytest.mark.parametrize(
    ("S", "H", "G", "biased"), [(7, 16, 1, True), (300, 64, 19, False), (65, 10, 3, True), (2100, 8, 2, True)]
)
def test_attention_reads_the_valid_part_only(format, S, H, G, biased):
    """Also of more positions than a part has, and alike for a token among many others: bit for bit."""
    rng = np.random.default_rng(S)
    B, T, K = 3, 2, 2
    length = np.array([[1, 3], [S // 2 + 1, 1], [S - 1, S]], np.int32)
    q = rng.normal(size=(B, T, K, G, H)).astype(np.float32)
    slots = np.broadcast_to(np.arange(S), (B, S))
    keys, values = (
        empty_cache((B, S, K, H), format).written(slots, rng.normal(size=(B, S, K, H)).astype(np.float32))
        for _ in range(2)
    )
    bias = rng.normal(size=(K * G, S)).astype(np.float32) if biased else None
    unseen = np.arange(S) >= length[..., None]
    never = unseen.all(axis=1)
    score = np.einsum("btkgh,bskh->btkgs", q, np.asarray(keys.wide())) / np.sqrt(H)
    score += 0 if bias is None else bias.reshape(1, 1, K, G, S)
    weight = np.exp(np.where(unseen[:, :, None, None], -np.inf, score))
    expected = np.einsum("btkgs,bskh->btkgh", weight / weight.sum(-1, keepdims=True), np.asarray(values.wide()))

    def poisoned(cache: Cache) -> Cache:
        return jax.tree.map(lambda a: jnp.where(never.reshape(B, S, *[1] * (a.ndim - 2)), 77, a).astype(a.dtype), cache)

    keys, values = poisoned(keys), poisoned(values)
    for name in BACKENDS:
        found = run(name, "attend", q, keys, values, length, bias)
        np.testing.assert_allclose(found, expected, atol=2e-5)
    if len(BACKENDS) > 1:
        many, lengths = (np.repeat(a[:, -1:], 19, axis=1) for a in (q, length))
        many[:, 1:], lengths[:, 1:] = rng.normal(size=many[:, 1:].shape), 1 + rng.integers(0, length[:, -1:], (B, 18))
        for name in BACKENDS[1:]:
            among = run(name, "attend", many, keys, values, lengths, bias)
            alone = run(name, "attend", q[:, -1:], keys, values, length[:, -1:], bias)
            np.testing.assert_array_equal(among[:, :1], alone)


def test_int8_caches_hold_each_position_within_half_a_step():
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 16)).astype(np.float32)
    x[1, 2] = 0
    cache = empty_cache((2, 6, 3, 16), "int8").written(np.array([[0, 1, 2, 3, 6], [5, 4, 3, 2, 1]]), x)
    step = np.abs(x).max(-1, keepdims=True) / 127
    assert (np.abs(cache.wide()[0, :4] - x[0, :4]) <= 0.501 * step[0, :4]).all()
    assert (np.abs(cache.wide()[1, 5:0:-1] - x[1]) <= 0.501 * step[1]).all()
    assert not cache.wide()[0, 4:].any()  # slot 6 is past the end


@pytest.mark.parametrize("format", FORMATS)
def test_quantisation_error_is_bounded(format):
    x = np.random.default_rng(0).normal(size=(50, 33)).astype(np.float32)
    x[7] = 0
    error = np.abs(np.asarray(widen(quantise(x, format))) - x)
    step = {
        "f32": 0,
        "bf16": np.abs(x) * 2**-8,
        "f16": np.abs(x) * 2**-11 + 2**-25,
        "int8": np.abs(x).max(1, keepdims=True) / 254,
        "int4": np.abs(x).max(1, keepdims=True) / 8,
    }
    assert (error <= step[format] * 1.001).all()


@pytest.mark.parametrize("group", [32, 64])
def test_int4_rows_hold_what_other_quantisers_gave(group):
    """Evenly spaced levels, such as those of Q4_0, and groups of 64 columns, which have no quantiser here."""
    rng = np.random.default_rng(group)
    M, D, B = 40, 1090, 3
    codes = rng.integers(0, 16, (M, D)).astype(np.uint8)
    scales = rng.uniform(-0.1, 0.1, (M, -(-D // group))).astype(np.float16)
    w = Rows(pack_int4(codes, scales, group), np.array(EVEN_LEVELS, np.float32), D, group)
    dense = (codes.astype(np.float32) - 8) * np.repeat(scales.astype(np.float32), group, axis=1)[:, :D]
    np.testing.assert_array_equal(widen(w), dense)
    index = np.sort(rng.choice(M, M // 2, replace=False)).astype(np.int32)
    x, h = (rng.normal(size=(B, n)).astype(np.float32) for n in (D, M))
    index = np.concatenate([index, np.full(M - len(index), M, np.int32)])
    compare_with_plain_arithmetic("int4", w, dense.astype(np.float64), index, np.int32(M // 2), x, h)


def test_what_does_not_fit_a_format_is_refused():
    with pytest.raises(FalconError, match="not finite"):
        quantise(np.array([[np.nan]], np.float32), "bf16")
    with pytest.raises(FalconError, match="too large for f16"):
        quantise(np.array([[1e6]], np.float32), "f16")


needs_native = pytest.mark.skipif(native.missing() is not None, reason="native kernels not built")


@needs_native
@pytest.mark.parametrize("format", FORMATS)
def test_results_are_the_same_bits_again_and_beside_other_vectors(format):
    """Sums in several parts, over rows of which each vector of a batch needs others, on every instruction set."""
    w, *_, x, h = draw_case(0, format, 2300, 1090, 5, 0.5)
    rng = np.random.default_rng(1)
    h = np.where(rng.random(h.shape) < np.array([[0.02], [0.1], [0.3], [0.6], [0.95]]), h, 0).astype(np.float32)
    every = np.arange(len(h[0]), dtype=np.int32)
    for name in INSTRUCTION_SETS:
        calls = [
            lambda rows, name=name: run(name, "rows_dot", w, x[rows]),
            lambda rows, name=name: run(name, "weighted_row_sum", w, h[rows]),
            lambda rows, name=name: run(name, "weighted_row_sum", w, h[rows], every, np.int32(len(every)), True),
        ]
        for call in calls:
            together = call(slice(None))
            for _ in range(3):
                np.testing.assert_array_equal(call(slice(None)), together)
            for b in range(len(h)):
                np.testing.assert_array_equal(call(slice(b, b + 1))[0], together[b])


@needs_native
def test_a_forced_instruction_set_binds_the_products_of_a_prefill():
    w, _, _, _, x, _ = draw_case(0, "bf16", 64, 64, 3, 1.0)
    product = jax.jit(native.rows_matmul)
    for name in INSTRUCTION_SETS:
        native.use_instruction_set(name)
        own = name in ("amx", "avx512_bf16")
        assert native.has_product("bf16") == own
        assert native.has_product("int8") == (name in PRODUCT_SETS)
        program = jax.jit(lambda w, x: native.rows_matmul(w, x)).lower(w, x).as_text()
        assert ("falcon_rows_product" in program) == own
    if native.instruction_sets()[0] in ("amx", "avx512_bf16"):
        native.use_instruction_set(native.instruction_sets()[0])
        product(w, x).block_until_ready()
        native.use_instruction_set("plain")
        with pytest.raises(
            (jax.errors.JaxRuntimeError, ValueError), match="that the instruction set chosen since does not have"
        ):
            product(w, x).block_until_ready()


@needs_native
def test_bad_buffers_are_refused_and_nothing_crashes():
    w, _, index, _, x, _ = draw_case(0, "bf16", 40, 64, 1, 1.0)
    index[3] = 40
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"an index is 40, the matrix has 40 rows"):
        native.gathered_rows_dot(w, index, np.int32(40), x).block_until_ready()
    with pytest.raises(jax.errors.JaxRuntimeError, match="count 41 of 40"):
        native.gathered_rows_dot(w, index, np.int32(41), x).block_until_ready()
    with pytest.raises(jax.errors.JaxRuntimeError, match="differ in width"):
        native.rows_dot(w, x[:, :-1]).block_until_ready()
    with pytest.raises(jax.errors.JaxRuntimeError, match="0 scales for 4 rows of int8"):
        native.rows_dot(Rows(np.zeros((4, 64), np.int8)), x).block_until_ready()
    int4 = quantise(np.ones((4, 64), np.float32), "int4")
    with pytest.raises(jax.errors.JaxRuntimeError, match="no int4 row of 600 columns"):
        native.rows_dot(dataclasses.replace(int4, columns=600), np.zeros((1, 600), np.float32)).block_until_ready()
    with pytest.raises(jax.errors.JaxRuntimeError, match="whole numbers from -128 to 127"):
        native.rows_dot(dataclasses.replace(int4, scale=int4.scale + 0.5), x).block_until_ready()
    q, cache = np.zeros((1, 1, 1, 1, 4), np.float32), np.zeros((1, 8, 1, 4), np.float32)
    with pytest.raises(jax.errors.JaxRuntimeError, match="length 9 in a cache of 8"):
        native.attend(q, Cache(cache), Cache(cache), np.array([[9]], np.int32)).block_until_ready()


@needs_native
def test_an_instruction_set_that_is_not_there_is_refused():
    with pytest.raises(FalconError, match="no native kernels for 'mmx'"):
        native.use_instruction_set("mmx")


def test_the_backend_can_be_forced_and_asked_for():
    assert kernels.backend("xla") is xla
    assert kernels.describe(xla) == "xla"
    if native.missing() is None:
        assert kernels.backend() is native
        assert kernels.describe(native) == f"native ({native.instruction_sets()[0]})"


def test_without_the_native_library_xla_is_used_and_native_says_why(monkeypatch):
    monkeypatch.setattr(native, "missing", lambda: "they were not built")
    assert kernels.backend("auto") is xla
    with pytest.raises(FalconError, match="they were not built"):
        kernels.backend("native")
