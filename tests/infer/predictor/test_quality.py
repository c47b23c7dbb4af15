from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from falcon_relu.config import FalconConfig, family
from falcon_relu.model import BATCH_KEYS, Falcon
from infer.choice import choose
from infer.predictor.predictor import EVERY, LayerPredictor, Predictor, score, uncalibrated
from infer.predictor.quality import _reading, compare_sparse, masked_forward, selector, sensitivity
from tests.conftest import random_params, sharded
from tests.infer.predictor.planted import random_batch

CONFIG = family("tiny-40b").with_activation("relu")


def random_predictor(config: FalconConfig, input: str) -> Predictor:
    rng = np.random.default_rng(0)
    D, F, R = config.d_model, config.d_ff, 8
    layers = [
        LayerPredictor(
            jnp.asarray(rng.normal(size=(R, D)), jnp.float32), jnp.asarray(rng.normal(size=(F, R)), jnp.float32)
        )
        for _ in range(config.n_layers)
    ]
    return uncalibrated(layers, input)


@pytest.mark.parametrize(
    ("name", "input"), [("tiny-40b", "block_input"), ("tiny-7b", "mlp_input"), ("tiny-rw", "block_input")]
)
def test_reading_everything_is_the_dense_model(name: str, input: str) -> None:
    config = family(name).with_activation("relu")
    params, batch = random_params(config), random_batch(0, config.vocab_size)
    arguments = [batch[k] for k in BATCH_KEYS]
    predictor = random_predictor(config, input)
    covering = predictor.replace(thresholds=(EVERY,) * config.n_layers)
    dense = jax.jit(Falcon(config).apply, static_argnames="method")({"params": params}, *arguments, method="hidden")
    forward = jax.jit(masked_forward, static_argnums=(0, 3))
    hidden, kept_LxBxT = forward(config, params, selector(covering), input, *arguments)
    np.testing.assert_allclose(hidden, dense, atol=1e-4)  # another program: sums may be rounded in another order
    assert (kept_LxBxT == config.d_ff).all()
    sparse, _ = forward(config, params, selector(predictor), input, *arguments)
    assert float(jnp.abs(sparse - dense).max()) > 0.1


def test_mask_is_the_predictors_choice_at_every_layer() -> None:
    params, batch = random_params(CONFIG), random_batch(0, CONFIG.vocab_size)
    arguments = [batch[k] for k in BATCH_KEYS]
    predictor = random_predictor(CONFIG, "block_input").replace(thresholds=(0.5, -0.5), budgets=(256, 40))
    model = Falcon(CONFIG, select=_reading("block_input"))
    variables = {"params": params, "selector": {"layers": {"layer": selector(predictor)}}}
    _, updates = model.apply(variables, *arguments, mutable=["activations", "statistics"])
    seen = updates["activations"]["layers"]
    for i, layer in enumerate(predictor.layers):
        logits = score(layer, seen["block_input"][i])
        chosen = choose(logits, predictor.thresholds[i], predictor.budgets[i])
        up_FxD = params["layers"]["mlp"]["up"][i]
        neurons = jax.nn.relu(jnp.einsum("btd,fd->btf", seen["mlp_input"][i], up_FxD))
        # A few scores may be within rounding of the threshold, or of the budget's last one.
        assert (~np.isclose(seen["mlp"]["neurons"][i], jnp.where(chosen, neurons, 0), atol=1e-4)).sum() <= 4
        assert np.abs(updates["statistics"]["layers"]["mlp"]["kept"][i] - chosen.sum(-1)).sum() <= 4
    assert (updates["statistics"]["layers"]["mlp"]["kept"][1] <= 40).all()


def test_comparison_counts_real_tokens_only() -> None:
    params = random_params(CONFIG)
    batches = [random_batch(seed, CONFIG.vocab_size) for seed in range(2)]
    predictor = random_predictor(CONFIG, "mlp_input")
    same = compare_sparse(CONFIG, params, predictor.replace(thresholds=(EVERY,) * 2), batches)
    assert same["kl"] == pytest.approx(0, abs=1e-6)
    assert same["agreement"] > 0.98  # two tokens may be equally likely within rounding
    assert same["read"] == 1
    assert same["dense_loss"] == pytest.approx(same["sparse_loss"], rel=1e-5)

    got = compare_sparse(CONFIG, params, predictor, batches)
    dense, sparse, targets, real = [], [], [], []
    for batch in batches:
        arguments = [batch[k] for k in BATCH_KEYS]
        hidden, _ = masked_forward(CONFIG, params, selector(predictor), "mlp_input", *arguments)
        dense.append(jax.nn.log_softmax(Falcon(CONFIG).apply({"params": params}, *arguments)))
        sparse.append(jax.nn.log_softmax(Falcon(CONFIG).apply({"params": params}, hidden, method="unembed")))
        segments, tokens = batch["segment_ids_BxT"], batch["tokens_BxT"]
        follows = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
        targets.append(np.where(np.pad(follows, ((0, 0), (0, 1))), np.roll(tokens, -1, axis=1), -1))
        real.append(segments != 0)
    p, q, target, is_real = (np.concatenate(x) for x in (dense, sparse, targets, real))
    np.testing.assert_allclose(got["kl"], (np.exp(p) * (p - q)).sum(-1)[is_real].mean(), rtol=1e-3)
    agreement = (p.argmax(-1) == q.argmax(-1))[is_real].mean()
    assert got["agreement"] == pytest.approx(agreement, abs=1.5 / is_real.sum())  # one token within rounding of a tie
    loss = -np.take_along_axis(q, np.maximum(target, 0)[..., None], -1)[..., 0][target >= 0].mean()
    np.testing.assert_allclose(got["sparse_loss"], loss, rtol=1e-4)

    with sharded(CONFIG, params) as placed:
        on_mesh = compare_sparse(CONFIG, placed, predictor, batches)
    for name, value in got.items():
        np.testing.assert_allclose(
            on_mesh[name], value, rtol=1e-5, atol=1.5 / is_real.sum() if name == "agreement" else 0
        )


def test_sensitivity_is_the_divergence_of_each_layer_alone() -> None:
    params = random_params(CONFIG)
    batches = [random_batch(0, CONFIG.vocab_size)]
    predictor = random_predictor(CONFIG, "mlp_input").replace(measured=({"energy": 0.5}, {"energy": 0.75}))
    weights = sensitivity(CONFIG, params, predictor, batches)
    alone = compare_sparse(CONFIG, params, predictor.replace(thresholds=(EVERY, 0.0)), batches)
    np.testing.assert_allclose(weights[1], alone["kl"] / 0.25, rtol=1e-5)
    assert weights[0] > 0
