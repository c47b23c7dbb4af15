from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from falcon_relu import generation
from falcon_relu.cli import main
from falcon_relu.config import family
from falcon_relu.errors import FalconError
from falcon_relu.generation import Sampling, generate, sample
from falcon_relu.model import Falcon
from tests.conftest import random_params

PROMPTS = [[5, 9, 200, 31], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]


def _recomputed(model, params, prompt, count):
    tokens = list(prompt)
    apply = jax.jit(lambda p, t: model.apply({"params": p}, t))
    for _ in range(count):
        padded = jnp.zeros((1, 64), jnp.int32).at[0, : len(tokens)].set(jnp.array(tokens))
        tokens.append(int(jnp.argmax(apply(params, padded)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


def test_cached_greedy_equals_uncached_recomputation_for_prompts_of_different_lengths(tiny_name):
    config = family(tiny_name)
    params, model = random_params(config), Falcon(config)
    out = generate(model, params, PROMPTS, Sampling(max_new_tokens=24))
    assert out == [_recomputed(model, params, prompt, 24) for prompt in PROMPTS]


def test_batch_does_not_change_a_sequence():
    config = family("tiny-40b")
    params, model = random_params(config), Falcon(config)
    together = generate(model, params, PROMPTS, Sampling(max_new_tokens=16))
    assert together == [generate(model, params, [prompt], Sampling(max_new_tokens=16))[0] for prompt in PROMPTS]


def test_stop_token_ends_a_sequence_and_is_not_returned():
    config = family("tiny-40b")
    params, model = random_params(config), Falcon(config)
    free = generate(model, params, PROMPTS, Sampling(max_new_tokens=16))
    stop = free[0][5]
    stopped = generate(model, params, PROMPTS, Sampling(max_new_tokens=16, stop_tokens=(stop,)))
    for whole, cut in zip(free, stopped, strict=True):
        assert cut == (whole[: whole.index(stop)] if stop in whole else whole)


def test_sampling_is_seeded():
    config = family("tiny-40b")
    params, model = random_params(config), Falcon(config)
    one, same, other = (
        generate(model, params, PROMPTS, Sampling(max_new_tokens=16, temperature=1.5, seed=seed)) for seed in (1, 1, 2)
    )
    assert one == same != other


@pytest.mark.parametrize(
    ("changes", "allowed"),
    [({"top_k": 2}, {0, 1}), ({"top_p": 0.6}, {0, 1}), ({"top_p": 0.1}, {0}), ({}, {0, 1, 2, 3})],
)
def test_sampled_frequencies(changes, allowed):
    probability = np.array([0.5, 0.3, 0.15, 0.05], np.float32)
    logits = jnp.broadcast_to(jnp.log(probability)[None], (4000, 4))
    tokens = np.asarray(sample(logits, jax.random.key(0), Sampling(temperature=1.0, **changes)))
    assert set(tokens) == allowed
    kept = np.where([i in allowed for i in range(4)], probability, 0)
    np.testing.assert_allclose(np.bincount(tokens, minlength=4) / 4000, kept / kept.sum(), atol=0.03)


def test_temperature_sharpens():
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.6, 0.4]))[None], (4000, 2))
    cold = np.asarray(sample(logits, jax.random.key(0), Sampling(temperature=0.5)))
    assert np.mean(cold == 0) == pytest.approx(0.36 / 0.52, abs=0.03)


@pytest.mark.parametrize("prompts", [[], [[]], [[512]], [[-1]], [[1] * 250]])
def test_unusable_prompts_are_refused(prompts):
    config = family("tiny-40b")
    with pytest.raises(FalconError, match="prompt"):
        generate(Falcon(config), None, prompts, Sampling(max_new_tokens=16))


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300])
def test_a_temperature_next_to_zero_takes_the_likeliest(temperature):
    """Quotients beyond float32 would make all tokens alike, or none the likeliest."""
    logits = jnp.asarray(np.random.default_rng(0).normal(-200, 50, (64, 30)), jnp.float32)
    tokens = sample(logits, jax.random.key(0), Sampling(temperature=temperature))
    np.testing.assert_array_equal(tokens, jnp.argmax(logits, axis=-1))


def test_another_seed_compiles_nothing():
    config = family("tiny-40b")
    params, model = random_params(config), Falcon(config)
    how = Sampling(max_new_tokens=3, temperature=1.5)
    generate(model, params, [[1]], how)
    programs = generation.add_tokens._cache_size(), generation.read_prompts._cache_size()
    generate(model, params, [[1]], dataclasses.replace(how, seed=7))
    assert programs == (generation.add_tokens._cache_size(), generation.read_prompts._cache_size())


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-1.0, math.nan, math.inf]),
        ("top_p", [0.0, 1.1, math.nan]),
        ("top_k", [-1]),
        ("max_new_tokens", [0, -5]),
        ("seed", [-1, 1 << 32, 1180591620717411303424]),
        ("stop_tokens", [(-1,), (1 << 31,)]),
    ],
)
def test_unusable_sampling_is_refused(field, values, capsys):
    for value in values:
        with pytest.raises(FalconError, match=f"(?i){field.replace('stop_tokens', 'stop token')} must be"):
            Sampling(**{field: value})
        if field != "stop_tokens":
            option = f"--{field.replace('_', '-')}={value}"
            for command in ("generate", "decode"):
                assert main([command, "no-model", "text", "--tokenizer", "none", option]) == 2
                error = capsys.readouterr().err
                assert field.replace("_", "") in error.replace("_", "").replace("-", "")
                assert "Traceback" not in error
