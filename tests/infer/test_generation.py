from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import infer.generation
from falcon_relu.errors import FalconError
from falcon_relu.generation import Sampling
from falcon_relu.generation import generate as flax_generate
from falcon_relu.model import Falcon
from infer import generation
from infer.generation import Conversation, DecodeStats, generate, stream
from infer.weights.layout import Formats, weights_from_params
from tests.infer.test_step import BACKENDS, covering_predictor, relu_model


@pytest.fixture(scope="module")
def model():
    config, params = relu_model("tiny-40b")
    return config, params, weights_from_params(params, config, Formats.all("f32"), covering_predictor(config))


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
        assert generate(weights, prompts(config), sampling, mode=mode, backend=BACKENDS[-1], cache="f32") == expected


def test_a_sequence_ends_at_its_stop_token_and_the_others_go_on(model):
    config, _, weights = model
    free = generate(weights, prompts(config), Sampling(max_new_tokens=8))
    stop = free[0][3]
    stopped = generate(weights, prompts(config), Sampling(max_new_tokens=8, stop_tokens=(stop,)))
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in free]


def test_another_seed_or_length_compiles_no_sampler(model):
    config, _, weights = model
    how = Sampling(max_new_tokens=2, temperature=0.8)
    generate(weights, prompts(config), how)
    programs = infer.generation._sample._cache_size()
    generate(weights, prompts(config), dataclasses.replace(how, seed=9, max_new_tokens=3))
    assert infer.generation._sample._cache_size() == programs


def test_figures_say_what_was_done(model, monkeypatch):
    """By a clock that only decode steps (2 s) and the noting of what they read (1 s) move on."""
    clock = [0.0]

    def taking(seconds, function):
        def timed(*args, **kwargs):
            clock[0] += seconds
            return function(*args, **kwargs)

        return timed

    monkeypatch.setattr(generation, "decode_step", taking(2, generation.decode_step))
    monkeypatch.setattr(generation, "_note", taking(1, generation._note))
    monkeypatch.setattr(generation.time, "perf_counter", lambda: clock[0])
    config, _, weights = model
    stats = DecodeStats()
    generate(weights, prompts(config), Sampling(max_new_tokens=5), mode="sparse", stats=stats)
    assert stats.prompt_tokens == 57
    assert stats.tokens == 15
    assert stats.steps == 4
    assert stats.neurons_read == 1
    assert 0 < stats.step_bytes < weights.nbytes
    assert (stats.timed_steps, stats.timed_tokens, stats.step_seconds) == (3, 9, 9)
    assert stats.tokens_per_second == 1
    assert stats.bytes_per_second == pytest.approx(stats.step_bytes / 3)


def test_unusable_prompts_are_refused_before_anything_runs(model):
    weights = model[2]
    with pytest.raises(FalconError, match="context of 256"):
        stream(weights, [[1] * 250], Sampling(max_new_tokens=8))
    with pytest.raises(FalconError, match="prompt 1 is empty"):
        stream(weights, [[1], []], Sampling(max_new_tokens=8))


def test_a_conversation_says_what_its_whole_text_would_bring(model):
    """Turn by turn from the cache as from the start; past the end of the context the older half is forgotten."""
    config, _, weights = model
    first, second, _ = prompts(config)
    sampling = Sampling(max_new_tokens=6)
    conversation, stats = Conversation(weights, mode="exact"), DecodeStats()
    text: list[int] = []
    for ids in (first, second):
        text += ids
        expected = generate(weights, [text], sampling, mode="exact")[0]
        assert list(conversation.reply(ids, sampling, stats)) == expected
        text += expected
    assert stats.prompt_tokens == len(first) + 1 + len(second)

    stop = Sampling(max_new_tokens=6, stop_tokens=(expected[2],))
    again = Conversation(weights, mode="exact")
    list(again.reply(text[: -len(expected)], stop))
    kept = text[: -len(expected)] + expected[: expected.index(expected[2])]
    assert list(again.reply(first, sampling)) == generate(weights, [kept + first], sampling, mode="exact")[0]

    while len(text) + len(second) + 6 <= config.max_positions:
        text += [*second, *conversation.reply(second, sampling)]
    text += second
    kept = text[-(config.max_positions - 6) // 2 :]
    assert list(conversation.reply(second, sampling)) == generate(weights, [kept], sampling, mode="exact")[0]
    with pytest.raises(FalconError, match="context of 256"):
        next(conversation.reply([1] * 251, sampling))
