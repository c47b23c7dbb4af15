from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from falcon_relu.config import family
from falcon_relu.model import Falcon
from falcon_relu.sharding import make_mesh, param_shardings, use_mesh
from tests.conftest import random_params
from train.config import OptimizerConfig
from train.loss import LossConfig
from train.state import init_state, learning_rate_schedule, make_optimizer, state_shardings
from train.step import make_train_step

CONFIG = family("tiny-40b").with_activation("relu")
TEACHER = family("tiny-40b")
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)
LOSS = LossConfig(kd_weight=0.7, temperature=2.0, chunk=4)


def _batch(rows: int = 8, T: int = 16):
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(1, 4, (rows, T)), axis=1).astype(np.int32)
    segments[0, -5:] = 0  # uneven counts of tokens, so that a mean of means would be wrong
    positions = np.array([[np.sum(row[:t] == row[t]) for t in range(T)] for row in segments], np.int32)
    return {
        "tokens_BxT": rng.integers(0, CONFIG.vocab_size, (rows, T)).astype(np.int32),
        "segment_ids_BxT": segments,
        "positions_BxT": positions,
    }


def _step(mesh_shape=(1, 1, 1), microbatches=1, batch=None, spoil=False):
    """Parameters and metrics after one step."""
    mesh = make_mesh(mesh_shape, jax.devices()[: int(np.prod(mesh_shape))])
    optimizer = make_optimizer(OPTIMIZER, 10)
    with use_mesh(mesh):
        params = jax.device_put(random_params(CONFIG), param_shardings(CONFIG, mesh))
        if spoil:
            params["final_norm"]["scale"] = params["final_norm"]["scale"].at[0].set(jnp.nan)
        before = jax.device_get(params)
        teacher = jax.device_put(random_params(TEACHER, seed=1), param_shardings(TEACHER, mesh))
        state = init_state(CONFIG, optimizer, params, state_shardings(CONFIG, optimizer, mesh))
        step = make_train_step(LOSS, Falcon(CONFIG), Falcon(TEACHER), optimizer, mesh, microbatches)
        state, metrics = step(state, batch or _batch(), teacher)
        return before, jax.device_get(state), jax.device_get(metrics)


@pytest.fixture(scope="module")
def alone():
    return _step()


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2)])
def test_a_sharded_step_equals_the_step_on_one_device(shape, alone):
    """The first moment after one step is 0.1 times the clipped gradient: every gradient is compared by it."""
    _, expected, metrics = alone
    _, state, sharded_metrics = _step(shape)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), sharded_metrics, metrics)
    moment = lambda s: s.opt_state[1][0].mu  # noqa: E731
    for mine, theirs in zip(jax.tree.leaves(moment(state)), jax.tree.leaves(moment(expected)), strict=True):
        assert np.linalg.norm(mine - theirs) <= 1e-5 * np.linalg.norm(theirs)


def test_microbatches_change_nothing_with_uneven_counts(alone):
    _, expected, metrics = alone
    _, state, pieces = _step(microbatches=4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), pieces, metrics)
    for mine, theirs in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(expected.opt_state), strict=True):
        assert np.linalg.norm(mine - theirs) <= 1e-5 * np.linalg.norm(theirs) + 1e-12


def test_a_step_moves_every_parameter_and_reports_what_it_should(alone):
    before, state, metrics = alone
    assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state.params), strict=True))
    assert int(state.step) == 1
    assert metrics["zeros"].shape == (CONFIG.n_layers,)
    assert 0.1 < metrics["zeros"].mean() < 0.9
    expected = metrics["cross_entropy"] + metrics["kl"]  # T^2 KL_T is of the order of KL_1
    assert metrics["loss"] == pytest.approx(expected, rel=0.5)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    before, state, metrics = _step(spoil=True)
    jax.tree.map(np.testing.assert_array_equal, state.params, before)
    assert not np.isfinite(metrics["loss"])
    assert (int(state.step), int(state.bad_steps), int(state.skipped)) == (1, 1, 1)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(state.opt_state))


def test_schedule_warms_up_then_falls_to_its_end():
    schedule = learning_rate_schedule(
        OptimizerConfig(learning_rate=1.0, final_learning_rate=0.1, warmup_steps=10), steps=110
    )
    values = [float(schedule(step)) for step in (0, 5, 10, 60, 110)]
    np.testing.assert_allclose(values, [0, 0.5, 1, 0.55, 0.1], atol=1e-6)


def test_norms_and_biases_are_not_decayed():
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1.0, weight_decay=0.1), 10)
    config = family("tiny-rw")
    params = random_params(config)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        name = path[-1].key
        assert (float(jnp.abs(update).max()) > 0) == (name in ("embedding", "qkv", "out", "up", "down")), name
