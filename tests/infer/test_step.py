from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from falcon_relu.config import family
from falcon_relu.errors import FalconError
from falcon_relu.generation import Sampling, generate
from falcon_relu.model import Falcon
from infer.kernels import matmul, native, xla
from infer.predictor.predictor import LayerPredictor, uncalibrated
from infer.step import DecodeState, check_mode, decode_step, prefill, prefill_bytes, step_bytes, unembed
from infer.weights.layout import Formats, weights_from_params
from tests.conftest import random_params, same_but_for_ties

BACKENDS = ("xla", "native") if native.missing() is None else ("xla",)
CONTEXT = 40


def relu_model(name: str, activation: str = "relu"):
    config = family(name).with_activation(activation, 0.1 if activation == "shifted_relu" else 0.0)
    return config, random_params(config)


def covering_predictor(config, R: int = 8):
    """Chooses every neuron: its logits are never below 0."""
    D, F, L = config.d_model, config.d_ff, config.n_layers
    maps = np.random.default_rng(3).normal(size=(R, D)).astype(np.float32)
    return uncalibrated([LayerPredictor(jnp.asarray(maps), jnp.ones((F, R)))] * L, "block_input")


def flax_logits(config, params, tokens_BxT):
    return Falcon(config).apply({"params": params}, jnp.asarray(tokens_BxT, jnp.int32))


def decode(weights, tokens_BxT, mode="dense", backend="xla"):
    """Logits [B, T, V] of feeding the tokens one by one, and the last step's reads."""
    check_mode(weights, mode)
    B, T = tokens_BxT.shape
    state = DecodeState.empty(weights.config, B, CONTEXT, "f32")
    out = []
    for t in range(T):
        logits, state, reads = decode_step(weights, state, jnp.asarray(tokens_BxT[:, t]), mode=mode, backend=backend)
        out.append(logits)
    return np.stack(out, 1), reads


def tokens(config, B: int, T: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, config.vocab_size, (B, T)).astype(np.int32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_mode_equals_the_flax_model(tiny_name, backend):
    if len(BACKENDS) > 1 and backend == "xla" and tiny_name in ("tiny-7b", "tiny-11b"):
        pytest.skip("the same kernels as for the 40B; slow to compile")
    activation = {"tiny-40b": "relu", "tiny-7b": "relu2", "tiny-11b": "shifted_relu", "tiny-rw": "relu"}[tiny_name]
    config, params = relu_model(tiny_name, activation)
    weights = weights_from_params(params, config, Formats.all("f32"), covering_predictor(config))
    ids = tokens(config, 2, 6)
    expected = flax_logits(config, params, ids)
    for mode in ("dense", "exact", "sparse") if backend == "native" else ("dense", "sparse"):
        logits, reads = decode(weights, ids, mode, backend)
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        if mode == "dense":
            everything = step_bytes(weights, reads, mode)
            assert everything == weights.nbytes - rest_bytes(weights)
        else:
            assert (np.asarray(reads.up_L) == config.d_ff).all()
            assert (np.asarray(reads.down_L) < config.d_ff).all()


def rest_bytes(weights) -> int:
    """What a dense step does not read whole: predictors, norms, biases, an embedding that is not the head."""
    rows = [w for layer in weights.layers for w in (layer.qkv, layer.out, layer.up, layer.down)] + [weights.head_rows]
    return weights.nbytes - sum(w.nbytes for w in rows)


def test_dense_gelu_equals_the_flax_model_and_has_nothing_to_skip():
    config = family("tiny-40b")
    params = random_params(config)
    weights = weights_from_params(params, config, Formats.all("f32"))
    ids = tokens(config, 1, 4)
    np.testing.assert_allclose(
        decode(weights, ids, backend=BACKENDS[-1])[0], flax_logits(config, params, ids), atol=1e-4
    )
    with pytest.raises(FalconError, match="activation is gelu"):
        check_mode(weights, "exact")


@pytest.mark.parametrize("format", ["bf16", "f16", "int8", "int4"])
def test_number_formats_stay_near_the_f32_model(format):
    config, params = relu_model("tiny-40b")
    ids = tokens(config, 2, 6)
    expected = np.asarray(flax_logits(config, params, ids))
    logits, _ = decode(weights_from_params(params, config, Formats.all(format)), ids, backend=BACKENDS[-1])
    error = np.sqrt(np.mean((logits - expected) ** 2)) / np.std(expected)
    assert error < {"bf16": 0.02, "f16": 0.002, "int8": 0.05, "int4": 0.5}[format]


def test_sparse_reads_what_the_predictor_chooses_and_no_more():
    config, params = relu_model("tiny-40b")
    F = config.d_ff
    chosen = np.arange(F) % 5 == 2  # logits 8 |x| for these, negative for the rest
    maps = LayerPredictor(
        jnp.concatenate([jnp.eye(config.d_model), -jnp.eye(config.d_model)]),
        jnp.asarray(np.where(chosen[:, None], 8.0, -1.0) * np.ones((F, 2 * config.d_model)), jnp.float32),
    )
    predictor = uncalibrated([maps] * config.n_layers, "mlp_input")
    ids = tokens(config, 1, 4)
    masked = jax.tree.map(lambda x: x, params)
    masked["layers"]["mlp"]["up"] = jnp.where(chosen[None, :, None], params["layers"]["mlp"]["up"], 0)
    expected = flax_logits(config, masked, ids)
    weights = weights_from_params(params, config, Formats.all("f32"), predictor)
    for backend in BACKENDS:
        logits, reads = decode(weights, ids, "sparse", backend)
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        assert (np.asarray(reads.up_L) == chosen.sum()).all()
    budgeted = weights.with_predictor(predictor.replace(budgets=(7,) * config.n_layers), "f32")
    assert (np.asarray(decode(budgeted, ids, "sparse")[1].up_L) == 7).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("format", ["f32", "int8"])
def test_a_binding_budget_is_each_sequences_own(backend, format):
    """A sequence of a batch reads and computes what it would alone, though the rows read are those of all."""
    config, params = relu_model("tiny-40b")
    rng = np.random.default_rng(7)
    maps = [
        LayerPredictor(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((16, 64), (config.d_ff, 16))))
        for _ in range(config.n_layers)
    ]
    predictor = uncalibrated(maps, "block_input").replace(budgets=(40,) * config.n_layers)
    weights = weights_from_params(
        params, config, Formats(attention="f32", mlp=format, head="f32", predictor="f32"), predictor
    )
    ids = tokens(config, 3, 6)
    for name in native.instruction_sets() if backend == "native" else ("",):
        if name:
            native.use_instruction_set(name)
        together, reads = decode(weights, ids, "sparse", backend)
        assert (np.asarray(reads.up_L) > 60).all()
        for b in range(3):
            alone, own = decode(weights, ids[b : b + 1], "sparse", backend)
            assert (np.asarray(own.up_L) == 40).all()
            np.testing.assert_allclose(together[b : b + 1], alone, atol=1e-4)
    if backend == "native":
        native.use_instruction_set(native.instruction_sets()[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_past_the_end_of_the_cache_every_backend_ends_with_one_error(backend):
    config, params = relu_model("tiny-40b")
    weights = weights_from_params(params, config, Formats.all("f32"))
    state = DecodeState.empty(config, 2, 8)
    block = jnp.zeros((2, 8), jnp.int32)
    _, state = prefill(weights, state, block, jnp.asarray([5, 8]), backend=backend)  # full, and not overfull
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="9 tokens does not fit the 8 positions"):
        jax.block_until_ready(decode_step(weights, state, jnp.zeros(2, jnp.int32), backend=backend))
    state = dataclasses.replace(DecodeState.empty(config, 2, 8), length_B=jnp.asarray([3, 0], jnp.int32))
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="10 tokens does not fit the 8 positions"):
        jax.block_until_ready(prefill(weights, state, block, jnp.asarray([7, 8]), backend=backend))


def test_what_a_prefill_takes_is_counted():
    config, params = relu_model("tiny-40b")
    weights = weights_from_params(params, config, Formats.all("bf16"))
    for backend in BACKENDS:
        for B, T in ((1, 16), (3, 256)):
            state = DecodeState.empty(config, B, 256)
            args = weights, state, jnp.zeros((B, T), jnp.int32), jnp.zeros(B, jnp.int32)
            taken = prefill.lower(*args, backend=backend).compile().memory_analysis().temp_size_in_bytes
            assert taken <= prefill_bytes(config, B, T)


@pytest.mark.parametrize("name", ["tiny-40b", "tiny-rw"])
def test_prefill_in_blocks_of_unequal_prompts_equals_the_flax_model(name):
    config, params = relu_model(name)
    weights = weights_from_params(params, config, Formats.all("f32"))
    ids = tokens(config, 2, 12)
    lengths = np.array([12, 7])
    state = DecodeState.empty(config, 2, CONTEXT, "f32")
    hidden = jnp.zeros((2, config.d_model))
    for start in (0, 8):
        valid = np.clip(lengths - start, 0, 8).astype(np.int32)
        block = np.zeros((2, 8), np.int32)
        block[:, : min(8, 12 - start)] = ids[:, start : start + 8]
        new, state = prefill(weights, state, jnp.asarray(block), jnp.asarray(valid))
        hidden = jnp.where(valid[:, None] > 0, new, hidden)
    expected = np.asarray(flax_logits(config, params, ids))
    np.testing.assert_allclose(unembed(weights, hidden, backend="xla"), expected[np.arange(2), lengths - 1], atol=1e-4)
    assert state.length_B.tolist() == lengths.tolist()
    # The next token of the shorter prompt goes to its own slot and position.
    next_ids = np.array([3, ids[1, 7]], np.int32)
    logits, _, _ = decode_step(weights, state, jnp.asarray(next_ids), backend="xla")
    np.testing.assert_allclose(logits[1], expected[1, 7], atol=1e-4)


def test_greedy_tokens_equal_the_flax_models():
    config, params = relu_model("tiny-40b")
    weights = weights_from_params(params, config, Formats.all("f32"), covering_predictor(config))
    prompt = tokens(config, 1, 5)[0].tolist()
    expected = generate(Falcon(config), params, [prompt], Sampling(max_new_tokens=30))[0]
    for mode in ("dense", "sparse"):
        state = DecodeState.empty(config, 1, CONTEXT, "f32")
        hidden, state = prefill(weights, state, jnp.asarray([prompt]), jnp.asarray([5]))
        logits, found = unembed(weights, hidden, backend=BACKENDS[-1]), []
        for _ in range(30):
            token = jnp.argmax(logits, -1).astype(jnp.int32)
            found.append(int(token[0]))
            logits, state, _ = decode_step(weights, state, token, mode=mode, backend=BACKENDS[-1])
        assert same_but_for_ties(Falcon(config), params, prompt, found, expected)


@pytest.mark.parametrize("format", ["bf16", "int8"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_the_size_of_a_weight_is_copied_converted_or_sliced(format, backend, monkeypatch):
    """With blocks far smaller than the smallest weight, nothing in the program may be that large."""
    for module in (xla, matmul):
        monkeypatch.setattr(module, "_BLOCK_BYTES", 1 << 18)
    config = family("tiny-40b").replace(d_model=512, d_ff=4096, n_heads=8, n_kv_heads=2, vocab_size=3001)
    config = config.with_activation("relu")
    params = random_params(config)
    weights = weights_from_params(params, config, Formats.all(format), covering_predictor(config, R=600))
    state = DecodeState.empty(config, 1, 16)
    program = decode_step.lower(weights, state, jnp.zeros(1, jnp.int32), mode="sparse", backend=backend).compile()
    assert not large_results(program.as_text(), 200_000)
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < 2_000_000
    assert (
        memory.alias_size_in_bytes >= 2 * 2 * 16 * config.n_kv_heads * config.head_dim * 2
    )  # both caches of both layers
    tokens_BxT, valid_B = jnp.zeros((1, 4), jnp.int32), jnp.ones(1, jnp.int32)
    block = prefill.lower(weights, state, tokens_BxT, valid_B, backend=backend).compile()
    assert not large_results(block.as_text(), 200_000)


def large_results(text: str, elements: int) -> list[str]:
    """Instructions that write at least so many elements; plumbing and the inside of a fusion write none."""
    found, fused = [], False
    for line in text.splitlines():
        if line.endswith("{"):
            fused = "fused" in line.split()[0]
        match = re.match(r"\s*(?:ROOT )?\S+ = \w+\[([\d,]+)\]\S* ([\w-]+)\(", line)
        if fused or not match or match[2] in ("parameter", "get-tuple-element", "bitcast"):
            continue
        if np.prod([int(size) for size in match[1].split(",")]) >= elements:
            found.append(line.strip())
    return found


def test_a_predictor_of_other_widths_is_refused():
    config, params = relu_model("tiny-40b")
    wrong = covering_predictor(config.replace(d_ff=128))
    with pytest.raises(FalconError, match="layer 0 has maps of"):
        weights_from_params(params, config, predictor=wrong)
    with pytest.raises(FalconError, match="needs a predictor"):
        check_mode(weights_from_params(params, config), "sparse")
