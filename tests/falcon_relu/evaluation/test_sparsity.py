from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from falcon_relu.config import family
from falcon_relu.errors import FalconError
from falcon_relu.evaluation.sparsity import measure_sparsity, sparsity_sums
from falcon_relu.model import BATCH_KEYS, Falcon
from tests.conftest import random_params, sharded

FEW = 4  # neurons within rounding of 0, which may fire in one program and not in another, and on another CPU


def test_statistics_are_those_of_a_plain_count() -> None:
    config = family("tiny-40b").with_activation("relu")
    params = random_params(config)
    rng = np.random.default_rng(0)
    segments = np.array([[1] * 6 + [2] * 7 + [0] * 3, [1] * 16], np.int32)
    positions = np.array([[*range(6), *range(7), 0, 0, 0], [*range(16)]], np.int32)
    batches = [
        dict(zip(BATCH_KEYS, (rng.integers(0, config.vocab_size, (2, 16), np.int32), positions, segments), strict=True))
        for _ in range(2)
    ]
    got = measure_sparsity(config, params, batches)

    observe = jax.jit(lambda *batch: Falcon(config).apply({"params": params}, *batch, mutable=["activations"])[1])
    for i in range(config.n_layers):
        fired, again, later = [], 0, 0
        for batch in batches:
            seen = observe(*(batch[k] for k in BATCH_KEYS))
            fires = np.asarray(seen["activations"]["layers"]["mlp"]["neurons"][i]) != 0
            for b, t in np.argwhere(segments != 0):
                fired.append(fires[b, t])
                if t and segments[b, t] == segments[b, t - 1]:
                    again += (fires[b, t] & fires[b, t - 1]).sum()
                    later += fires[b, t].sum()
        rates = np.mean(fired, axis=0)
        tokens, F = len(fired), config.d_ff
        assert np.abs(got["rates_LxF"][i] - rates).sum() * tokens <= FEW
        expected = {"zeros": 1 - rates.mean(), "overlap": again / later}
        expected |= {"layer": i, "never": (rates == 0).mean(), "always": (rates == 1).mean()}
        hottest = np.sort(rates)[::-1]
        expected["hot"] = next(n for n in range(257) if hottest[:n].sum() >= 0.8 * rates.sum()) / config.d_ff
        assert got["layers"][i].keys() == expected.keys()
        near = dict.fromkeys(("never", "always", "hot"), FEW / F)
        near |= {"layer": 0, "zeros": FEW / (tokens * F), "overlap": 2 * FEW / later}
        for name, value in expected.items():
            np.testing.assert_allclose(got["layers"][i][name], value, atol=near[name], err_msg=name)
    np.testing.assert_allclose(got["zeros"], 1 - got["rates_LxF"].mean())

    assert [row["batch"] for row in got["union"]] == [1, 2]  # the batches have two rows
    np.testing.assert_allclose(got["union"][0]["fired"], 1 - got["zeros"])
    together = []
    for batch in batches:
        seen = observe(*(batch[k] for k in BATCH_KEYS))
        fires = np.asarray(seen["activations"]["layers"]["mlp"]["neurons"]) != 0
        together.append((fires[:, 0, :13] | fires[:, 1, :13]).mean((1, 2)))  # where both rows have a token
    np.testing.assert_allclose(got["union"][1]["layers"], np.mean(together, axis=0), atol=FEW / (26 * config.d_ff))

    with sharded(config, params, (1, 2, 4)) as placed:
        on_mesh = measure_sparsity(config, placed, batches)
    assert np.abs(on_mesh["rates_LxF"] - got["rates_LxF"]).sum() * tokens <= FEW
    for one, other in zip([*on_mesh["layers"], *on_mesh["union"]], [*got["layers"], *got["union"]], strict=True):
        for name, value in one.items():
            np.testing.assert_allclose(value, other[name], atol=near.get(name, 2 * FEW / (26 * config.d_ff)))


def test_the_activations_of_one_layer_at_a_time_are_kept() -> None:
    config = family("tiny-40b").with_activation("relu")
    batch = [np.ones((3, 17), np.int32)] * 3
    program = str(
        jax.make_jaxpr(lambda params: sparsity_sums(config, jnp.float32, params, *batch))(random_params(config))
    )
    assert f"[3,17,{config.d_ff}]" in program
    assert f"[{config.n_layers},3,17,{config.d_ff}]" not in program


def test_no_tokens_are_told() -> None:
    config = family("tiny-40b").with_activation("relu")
    with pytest.raises(FalconError, match="no tokens"):
        measure_sparsity(config, random_params(config), [])
