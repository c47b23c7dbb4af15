from __future__ import annotations

import numpy as np
import pytest

from falcon_relu.errors import FalconError
from falcon_relu.generate import Sampling
from falcon_relu.generate import generate as flax_generate
from falcon_relu.model import Falcon
from infer.generate import Figures, generate, stream
from infer.weights import Formats, from_params
from tests.infer.test_step import BACKENDS, covering_predictor, relu_model


@pytest.fixture(scope="module")
def model():
    config, params = relu_model("tiny-40b")
    return config, params, from_params(params, config, Formats.all("f32"), covering_predictor(config))


def prompts(config) -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, config.vocab_size, n).tolist() for n in (3, 37, 17)]


@pytest.mark.parametrize(
    "sampling", [Sampling(max_new_tokens=24), Sampling(max_new_tokens=24, temperature=0.8, top_k=50, seed=4)]
)
def test_tokens_equal_the_flax_models_in_every_mode(model, sampling):
    config, params, weights = model
    expected = flax_generate(Falcon(config), params, prompts(config), sampling)
    for mode in ("dense", "exact", "sparse"):
        assert generate(weights, prompts(config), sampling, mode=mode, backend=BACKENDS[-1]) == expected


def test_a_sequence_ends_at_its_stop_token_and_the_others_go_on(model):
    config, _, weights = model
    free = generate(weights, prompts(config), Sampling(max_new_tokens=8))
    stop = free[0][3]
    stopped = generate(weights, prompts(config), Sampling(max_new_tokens=8, stop_tokens=(stop,)))
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in free]


def test_figures_say_what_was_done(model):
    config, _, weights = model
    figures = Figures()
    generate(weights, prompts(config), Sampling(max_new_tokens=5), mode="sparse", figures=figures)
    assert figures.prompt_tokens == 57
    assert figures.tokens == 15
    assert figures.steps == 4
    assert figures.neurons_read == 1
    assert 0 < figures.step_bytes < weights.nbytes
    assert figures.bytes_per_second > 0


def test_unusable_prompts_are_refused_before_anything_runs(model):
    weights = model[2]
    with pytest.raises(FalconError, match="context of 256"):
        stream(weights, [[1] * 250], Sampling(max_new_tokens=8))
    with pytest.raises(FalconError, match="prompt 1 is empty"):
        stream(weights, [[1], []], Sampling(max_new_tokens=8))
