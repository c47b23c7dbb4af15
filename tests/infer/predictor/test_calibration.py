from __future__ import annotations

import itertools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from falcon_relu.errors import FalconError
from infer.predictor.calibration import allocate, calibrate_predictor, measure, neurons_for_bytes
from infer.predictor.predictor import LayerPredictor, Predictor, uncalibrated
from infer.predictor.recording import Recording
from tests.infer.predictor.planted import write_recording


def noisy_predictor(rng: np.random.Generator, folder: Path, noises: tuple[float, ...]) -> tuple[Predictor, Recording]:
    """Neurons that fire where a linear map says so, and predictors that know the map up to noise."""
    N, D, F = 4000, 16, 64
    layers, recorded = [], []
    for noise in noises:
        x_NxD, map_DxF = rng.normal(size=(N, D)), rng.normal(size=(D, F))
        recorded.append((x_NxD, np.maximum(x_NxD @ map_DxF - 4.0, 0)))
        guess_FxD = (map_DxF + noise * rng.normal(size=(D, F))).T
        fc1 = np.concatenate([np.eye(D), -np.eye(D)])
        layers.append(LayerPredictor(jnp.asarray(fc1), jnp.asarray(np.concatenate([guess_FxD, -guess_FxD], axis=1))))
    return uncalibrated(layers, "mlp_input"), write_recording(folder, recorded)


def counted(predictor: Predictor, recording: Recording, i: int) -> tuple[float, float, float]:
    """Neurons read and fired a token and share of the energy, counted plainly over the held-out tokens."""
    x_nxD, c_nxF = (np.asarray(a[recording.held_out.start :], np.float32) for a in recording.layer(i))
    fc1, fc2 = (np.asarray(w) for w in (predictor.layers[i].fc1_RxD, predictor.layers[i].fc2_FxR))
    selected = np.maximum(x_nxD @ fc1.T, 0) @ fc2.T >= predictor.thresholds[i]
    return selected.sum(1).mean(), (c_nxF > 0).sum(1).mean(), (c_nxF**2)[selected].sum() / (c_nxF**2).sum()


def test_figures_are_those_of_a_plain_count(tmp_path: Path) -> None:
    predictor, recording = noisy_predictor(np.random.default_rng(0), tmp_path / "r", (0.1, 0.5))
    calibrated = calibrate_predictor(predictor, recording, energy=0.97)
    for i, figures in enumerate(calibrated.measured):
        got = [figures[name] for name in ("read", "fired", "energy")]
        np.testing.assert_allclose(got, counted(calibrated, recording, i), rtol=1e-3)


@pytest.mark.parametrize("energy", [0.8, 0.95, 0.99, 1.0])
def test_target_energy_is_covered_with_little_to_spare(tmp_path: Path, energy: float) -> None:
    predictor, recording = noisy_predictor(np.random.default_rng(0), tmp_path / "r", (0.1, 0.5, 1.0))
    calibrated = calibrate_predictor(predictor, recording, energy=energy)
    covered = np.mean([figures["energy"] for figures in calibrated.measured])
    assert energy - 1e-9 <= covered <= energy + 0.02


def test_target_neurons_is_kept_and_weights_move_it(tmp_path: Path) -> None:
    predictor, recording = noisy_predictor(np.random.default_rng(0), tmp_path / "r", (0.3, 0.3))
    flat = calibrate_predictor(predictor, recording, neurons=16.0)
    tilted = calibrate_predictor(predictor, recording, neurons=16.0, sensitivity=[9.0, 1.0])
    for calibrated in (flat, tilted):
        assert 14.5 < sum(figures["read"] for figures in calibrated.measured) <= 16.0
    assert tilted.measured[0]["energy"] > flat.measured[0]["energy"]
    assert tilted.measured[1]["energy"] < flat.measured[1]["energy"]


def test_budget_leaves_all_but_a_thousandth_of_tokens_whole(tmp_path: Path) -> None:
    predictor, recording = noisy_predictor(np.random.default_rng(0), tmp_path / "r", (0.1,))
    calibrated = calibrate_predictor(predictor, recording, energy=0.9)
    x_nxD = recording.layer(0)[0][recording.held_out.start :].astype(np.float32)
    fc1, fc2 = (np.asarray(w) for w in (predictor.layers[0].fc1_RxD, predictor.layers[0].fc2_FxR))
    counts = (np.maximum(x_nxD @ fc1.T, 0) @ fc2.T >= calibrated.thresholds[0]).sum(1)
    assert (counts <= calibrated.budgets[0]).mean() >= 0.999
    assert calibrated.budgets[0] <= counts.max()


def test_expected_kl_is_the_weighted_loss(tmp_path: Path) -> None:
    predictor, recording = noisy_predictor(np.random.default_rng(0), tmp_path / "r", (0.1, 0.5))
    weights = np.array([0.5, 0.1])
    calibrated = calibrate_predictor(predictor, recording, kl=0.01, sensitivity=weights)
    expected = weights @ [1 - figures["energy"] for figures in calibrated.measured]
    assert 0.005 < expected <= 0.01


def test_targets_that_cannot_be_are_refused(tmp_path: Path) -> None:
    predictor, recording = noisy_predictor(np.random.default_rng(0), tmp_path / "r", (0.1,))
    for targets, wrong in (
        ({}, "one target"),
        ({"energy": 0.9, "neurons": 5.0}, "one target"),
        ({"kl": 0.01}, "sensitivity"),
        ({"kl": float("nan"), "sensitivity": [1.0]}, "kl must"),
        ({"energy": 2.0}, "energy must"),
        ({"recall": 0.0}, "recall must"),
        ({"neurons": -5.0}, "neurons must"),
    ):
        with pytest.raises(FalconError, match=wrong):
            calibrate_predictor(predictor, recording, **targets)
    with pytest.raises(FalconError, match="block_input"):
        calibrate_predictor(predictor.replace(input="block_input"), recording, energy=0.9)
    with pytest.raises(FalconError, match="alone read"):
        neurons_for_bytes(predictor, 100.0, 2.0)
    assert neurons_for_bytes(predictor, 2.0 * (32 * (16 + 64) + 2 * 16 * 7), 2.0) == 7.0


def test_curve_ends_where_everything_is_read(tmp_path: Path) -> None:
    predictor, recording = noisy_predictor(np.random.default_rng(0), tmp_path / "r", (2.0,))
    curve = measure(predictor.layers[0], recording, 0)
    assert curve.read_P[-1] == 64
    assert curve.recall_P[-1] == curve.energy_P[-1] == 1
    assert all((np.diff(values) >= 0).all() for values in (curve.read_P, curve.recall_P, curve.energy_P))
    assert curve.energy_P[curve.covering(0.9)] >= 0.9 > curve.energy_P[curve.covering(0.9) - 1]
    assert curve.read_P[curve.reading(5.0)] <= 5.0 < curve.read_P[curve.reading(5.0) + 1]


_curves = st.lists(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=5), min_size=1, max_size=3
)


def split(curves: list[list[tuple[int, int]]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    return [np.array([c for c, _ in x], float) for x in curves], [np.array([v for _, v in x], float) for x in curves]


def totals(values: list[np.ndarray], points) -> float:
    return float(sum(v[p] for v, p in zip(values, points, strict=True)))


@given(_curves, st.integers(0, 60), st.booleans())
def test_no_other_choice_loses_less_at_the_same_cost(curves, limit: int, by_cost: bool) -> None:
    costs, losses = split(curves)
    chosen = allocate(costs, losses, **{"max_cost" if by_cost else "max_loss": limit})
    cost, loss = totals(costs, chosen), totals(losses, chosen)
    every = list(itertools.product(*(range(len(c)) for c in costs)))
    assert not any(totals(costs, other) <= cost and totals(losses, other) < loss for other in every)
    reachable = min(totals(losses, other) for other in every)
    if by_cost:
        cheapest = min(totals(costs, other) for other in every)
        assert cost <= max(limit, cheapest)
    else:
        assert loss <= max(limit, reachable)
