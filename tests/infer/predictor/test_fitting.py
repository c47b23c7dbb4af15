from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from falcon_relu.config import family
from falcon_relu.errors import FalconError
from infer.predictor.calibration import measure
from infer.predictor.fitting import FitConfig, choose_rank, fit_layer, fit_predictor, linear_start, up_rows
from infer.predictor.predictor import score
from infer.predictor.recording import record_activations
from tests.conftest import random_params
from tests.infer.predictor.planted import planted_layer, random_batch, write_recording

HOW = FitConfig(epochs=6, batch=256)


def nearest_map(x_NxD: np.ndarray, c_NxF: np.ndarray) -> jnp.ndarray:
    """The best linear guess of the contributions, in the place of W_up."""
    return jnp.asarray(np.linalg.lstsq(x_NxD, c_NxF - c_NxF.mean(0), rcond=None)[0].T)


def test_planted_pattern_is_found_and_the_start_is_beaten(tmp_path: Path) -> None:
    x_NxD, c_NxF = planted_layer(np.random.default_rng(0), 20_000)
    recording, up_FxD = write_recording(tmp_path / "r", [(x_NxD, c_NxF)]), nearest_map(x_NxD, c_NxF)
    curve = measure(fit_layer(recording, 0, up_FxD, 32, HOW), recording, 0)
    start = measure(linear_start(x_NxD, up_FxD, 32), recording, 0)
    reads = 1.1 * curve.fired
    assert curve.recall_P[curve.reading(reads)] > 0.95
    assert curve.energy_P[curve.reading(reads)] > 0.995
    assert start.recall_P[start.reading(reads)] < 0.9


def test_logit_zero_is_where_the_expected_contribution_is_worth_the_price(tmp_path: Path) -> None:
    # Neurons fire half of the time where the first input is +1, hardly ever where it is -1; the others tell nothing.
    rng = np.random.default_rng(0)
    N, D, F = 40_000, 8, 16
    x_NxD = rng.normal(size=(N, D))
    x_NxD[:, 0], x_NxD[:, 1] = rng.choice([-1.0, 1.0], N), 1
    worth_F = np.linspace(0.2, 2.0, F)  # expected contribution at x = +1
    fires_NxF = rng.random((N, F)) < np.where(x_NxD[:, :1] > 0, 0.5, 0.01)
    recording = write_recording(tmp_path / "r", [(x_NxD, fires_NxF * worth_F * 2)])
    up_FxD = jnp.asarray(rng.normal(size=(F, D)), jnp.float32)
    layer = fit_layer(recording, 0, up_FxD, 16, FitConfig(price=1.0, epochs=6, batch=256))
    z_F = score(layer, jnp.asarray(x_NxD[:2000][x_NxD[:2000, 0] > 0], jnp.float32)).mean(0)
    price = (fires_NxF * worth_F * 2).mean()  # price 1 is the mean contribution
    np.testing.assert_allclose(z_F, np.log(worth_F / price), atol=0.25)


def test_fit_is_deterministic_and_stops_without_gain(tmp_path: Path) -> None:
    recording = write_recording(tmp_path / "r", [planted_layer(np.random.default_rng(0), 6000)])
    up_FxD = jnp.asarray(np.random.default_rng(1).normal(size=(128, 32)), jnp.float32)
    layers = [fit_layer(recording, 0, up_FxD, 8, FitConfig(epochs=2, batch=256)) for _ in range(2)]
    np.testing.assert_array_equal(layers[0].fc2_FxR, layers[1].fc2_FxR)

    epochs: list[int] = []
    how = FitConfig(epochs=50, batch=256, learning_rate=1e-12, patience=1)
    fit_layer(recording, 0, up_FxD, 8, how, epochs.append)
    assert sum(epochs) == 50
    assert len(epochs) < 50


def test_model_is_fitted_and_the_untrained_start_is_reported(tmp_path: Path) -> None:
    config = family("tiny-40b").with_activation("relu")
    params = random_params(config)
    batches = [random_batch(seed, config.vocab_size, 8, 64) for seed in range(8)]
    for input in ("block_input", "mlp_input"):
        recording = record_activations(config, params, batches, tmp_path / input, tokens=3500, input=input)
        predictor = fit_predictor(recording, config, params, (16, 32), FitConfig(epochs=12, batch=64))
        assert predictor.ranks == (16, 32)
        assert predictor.input == input
        for figures in predictor.measured:
            assert figures["read"] <= figures["fired"]
            assert figures["recall"] > figures["start_recall"]
            assert figures["energy"] > figures["start_energy"] > 0.6


def test_full_rank_start_at_the_mlp_input_is_exact(tmp_path: Path) -> None:
    config = family("tiny-7b").with_activation("relu")
    params = random_params(config)
    batches = [random_batch(seed, config.vocab_size) for seed in range(4)]
    recording = record_activations(config, params, batches, tmp_path / "r", tokens=400, input="mlp_input")
    x_NxD, c_NxF = (np.asarray(a, np.float32) for a in recording.layer(1))
    start = linear_start(x_NxD, up_rows(config, params, 1, "mlp_input"), 2 * config.d_model)
    fires = c_NxF > 0
    assert ((score(start, jnp.asarray(x_NxD)) > 0) == fires).mean() > 0.99  # inputs are rounded to bfloat16


def test_cheapest_rank_follows_the_pattern(tmp_path: Path) -> None:
    x_NxD, c_NxF = planted_layer(np.random.default_rng(0), 10_000)
    recording = write_recording(tmp_path / "r", [(x_NxD, c_NxF)])
    rank, tried = choose_rank(recording, 0, nearest_map(x_NxD, c_NxF), (2, 16, 64), energy=0.99, how=HOW)
    assert rank == 16
    assert [row["rank"] for row in tried] == [2, 16, 64]
    assert all(row["weights"] == row["rank"] * 160 + 64 * row["read"] for row in tried)


def test_what_cannot_be_fitted_is_refused(tmp_path: Path) -> None:
    x_NxD, c_NxF = planted_layer(np.random.default_rng(0), 3000)
    recording, up_FxD = write_recording(tmp_path / "r", [(x_NxD, c_NxF)]), jnp.ones((128, 32))
    with pytest.raises(FalconError, match="too short"):
        fit_layer(recording, 0, up_FxD, 8, FitConfig(batch=512))
    with pytest.raises(FalconError, match="even"):
        fit_layer(recording, 0, up_FxD, 7, FitConfig(batch=64))
    with pytest.raises(FalconError, match="price"):
        FitConfig(price=0)
    silent = write_recording(tmp_path / "s", [(x_NxD, 0 * c_NxF)])
    with pytest.raises(FalconError, match="fires"):
        fit_layer(silent, 0, up_FxD, 8, FitConfig(batch=64))
