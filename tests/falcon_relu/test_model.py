from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from falcon_relu.attention import attend_chunked
from falcon_relu.config import FAMILY, FalconConfig, family
from falcon_relu.errors import FalconError
from falcon_relu.layers import activation_fn
from falcon_relu.model import Falcon
from falcon_relu.sharding import abstract_params, batch_sharding, make_mesh, param_shardings, use_mesh
from tests.conftest import random_params


@pytest.mark.parametrize("name", FAMILY)
def test_parameter_count_is_the_hand_count(name):
    config = family(name)
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config))) == config.n_params


@pytest.mark.parametrize(
    ("name", "billions"), [("falcon-40b", 41.3), ("falcon-180b", 178.6), ("falcon-7b", 6.92), ("falcon2-11b", 11.1)]
)
def test_family_sizes_are_the_published_ones(name, billions):
    assert family(name).n_params / 1e9 == pytest.approx(billions, rel=2e-3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"d_model": 0},
        {"n_kv_heads": 3},
        {"d_model": 63},
        {"activation": "swish"},
        {"activation_shift": 1.0},
        {"eos_token_id": 512},
        {"n_layers": 10**9},
        {"n_layers": 2.0},
        {"vocab_size": True},
        {"max_positions": 10**12},
        {"rope_theta": float("nan")},
        {"rope_theta": 0.0},
        {"norm_eps": -1.0},
        {"norm_eps": "1e-5"},
        {"use_bias": "false"},
    ],
)
def test_config_refuses_contradictions(wrong):
    with pytest.raises(FalconError, match=next(iter(wrong))):
        family("tiny-40b").replace(**wrong)


def test_logits_depend_on_earlier_tokens_only(tiny_name):
    """The gradient of a position's loss with respect to later inputs is exactly zero, and not to earlier ones."""
    config = family(tiny_name)
    params = random_params(config)
    tokens = jax.random.randint(jax.random.key(1), (1, 12), 0, config.vocab_size)
    offset = jnp.zeros((config.vocab_size, config.d_model))

    def loss_at(offset_TxD, position):  # each token is given an embedding row of its own, so inputs can be moved
        own = jnp.arange(12)[None]
        table = jnp.zeros_like(offset).at[:12].set(params["embed"]["embedding"][tokens[0]] + offset_TxD)
        head = params["embed"]["embedding"] if config.tied_embeddings else params["head"]["kernel"]
        moved = params | {"embed": {"embedding": table}}
        hidden = Falcon(config).apply({"params": moved}, own, method="hidden")
        return jax.nn.log_softmax(hidden[0, position] @ head.T)[3]

    gradient = jax.jit(jax.grad(loss_at))
    for position in (0, 5, 11):
        grad = gradient(jnp.zeros((12, config.d_model)), position)
        size = np.abs(np.asarray(grad)).max(axis=1)
        assert np.all(size[position + 1 :] == 0)
        assert np.all(size[: position + 1] > 0)


def test_packed_segments_do_not_see_each_other(tiny_name):
    config = family(tiny_name).with_activation("relu")
    params = random_params(config)
    forward = jax.jit(lambda *batch: Falcon(config).apply({"params": params}, *batch))
    tokens = jax.random.randint(jax.random.key(2), (1, 14), 0, config.vocab_size)
    segments = jnp.array([[1] * 5 + [2] * 6 + [0] * 3])
    positions = jnp.array([[*range(5), *range(6), 0, 0, 0]])
    packed = forward(tokens, positions, segments)
    first = forward(tokens[:, :5])
    second = forward(tokens[:, 5:11])
    np.testing.assert_allclose(packed[:, :5], first, atol=2e-5)
    np.testing.assert_allclose(packed[:, 5:11], second, atol=2e-5)
    other = forward(tokens.at[:, :5].set(7), positions, segments)
    np.testing.assert_array_equal(other[:, 5:11], packed[:, 5:11])


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("chunk", [1, 4])
def test_chunked_attention_equals_plain_in_value_and_gradient(chunk, alibi):
    T, keys = 8, jax.random.split(jax.random.key(chunk), 5)
    shapes = [(2, T, 2, 3, 8), (2, T, 2, 8), (2, T, 2, 8)]
    qkv = tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=False))
    segments = jnp.sort(jax.random.randint(keys[3], (2, T), 0, 3), axis=1)
    positions = jnp.broadcast_to(jnp.arange(T)[None], (2, T))
    weight = jax.random.normal(keys[4], shapes[0])

    def total(qkv, chunk):
        out = attend_chunked(
            *qkv,
            q_positions_BxT=positions,
            k_positions_BxS=positions,
            q_segments_BxT=segments,
            k_segments_BxS=segments,
            use_alibi=alibi,
            query_chunk=chunk,
        )
        return jnp.sum(out * weight)

    both = jax.jit(jax.value_and_grad(total), static_argnums=1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5), both(qkv, None), both(qkv, chunk))


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(remat):
    config = family("tiny-40b").with_activation("relu")
    params = random_params(config)
    tokens = jax.random.randint(jax.random.key(3), (2, 8), 0, config.vocab_size)

    def loss(params, remat):
        return jnp.mean(jnp.square(Falcon(config, remat=remat).apply({"params": params}, tokens)))

    plain, again = (jax.jit(jax.grad(loss), static_argnums=1)(params, kind) for kind in ("none", remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, again)
    compiled = [jax.jit(jax.grad(loss), static_argnums=1).lower(params, kind).as_text() for kind in ("none", remat)]
    assert compiled[0].count("dot_general") < compiled[1].count("dot_general")


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2)])
def test_sharded_equals_unsharded(shape):
    config = family("tiny-40b").with_activation("relu")
    params, model = random_params(config), Falcon(config)
    tokens = jax.random.randint(jax.random.key(4), (8, 16), 0, config.vocab_size)
    expected = model.apply({"params": params}, tokens)
    mesh = make_mesh(shape)
    with use_mesh(mesh):
        placed = jax.device_put(params, param_shardings(config, mesh))
        logits = jax.jit(lambda p, t: model.apply({"params": p}, t))(
            placed, jax.device_put(tokens, batch_sharding(mesh))
        )
    np.testing.assert_allclose(logits, expected, atol=2e-5)


def test_activations_are_what_the_mlp_computes_and_cost_nothing_unasked():
    config = family("tiny-40b").with_activation("relu")
    params, model = random_params(config), Falcon(config)
    tokens = jax.random.randint(jax.random.key(5), (2, 6), 0, config.vocab_size)
    logits, sown = model.apply({"params": params}, tokens, mutable=["activations", "statistics"])
    np.testing.assert_array_equal(logits, model.apply({"params": params}, tokens))
    layers = sown["activations"]["layers"]
    neurons = jnp.maximum(jnp.einsum("lbtd,lfd->lbtf", layers["mlp_input"], params["layers"]["mlp"]["up"]), 0)
    np.testing.assert_allclose(layers["mlp"]["neurons"], neurons, atol=1e-5)
    active = sown["statistics"]["layers"]["mlp"]["active"]
    np.testing.assert_array_equal(active, np.count_nonzero(layers["mlp"]["neurons"], axis=-1))
    assert 0.1 < np.mean(active) / config.d_ff < 0.9
    # The stacked activations [L, B, T, F] are in the program only when asked for.
    asked = jax.jit(lambda p, t: model.apply({"params": p}, t, mutable=["activations"])).lower(params, tokens)
    unasked = jax.jit(lambda p, t: model.apply({"params": p}, t)).lower(params, tokens)
    assert "2x2x6x256xf32" in asked.as_text()
    assert "2x2x6x256xf32" not in unasked.as_text()


def test_activation_functions():
    x = jnp.array([[[-2.0, -0.1, 0.0, 0.3, 2.0]]])
    expected = {
        "gelu": [-0.0455003, -0.0460172, 0.0, 0.1853734, 1.9544997],
        "relu": [0, 0, 0, 0.3, 2.0],
        "shifted_relu": [0, 0, 0, 0, 1.5],
        "relu2": [0, 0, 0, 0.09, 4.0],
    }
    for name, values in expected.items():
        config = family("tiny-40b").with_activation(name, 0.5 if name == "shifted_relu" else 0.0)
        np.testing.assert_allclose(activation_fn(config)(x)[0, 0], values, atol=1e-6)


def test_bf16_compute_is_near_f32():
    config = family("tiny-40b")
    params = random_params(config)
    tokens = jax.random.randint(jax.random.key(6), (2, 16), 0, config.vocab_size)
    exact = Falcon(config).apply({"params": params}, tokens)
    rough = Falcon(config, dtype=jnp.bfloat16).apply({"params": params}, tokens)
    assert rough.dtype == jnp.float32
    assert 1 < float(jnp.std(exact)) < 10
    assert float(jnp.mean(jnp.abs(rough - exact))) < 0.05 * float(jnp.std(exact))


def test_every_parameter_matters(tiny_name):
    """No parameter is read in a place where it has no effect."""
    config: FalconConfig = family(tiny_name)
    params = random_params(config)
    tokens = jax.random.randint(jax.random.key(7), (2, 8), 0, config.vocab_size)
    grads = jax.grad(lambda p: jnp.sum(jnp.square(Falcon(config).apply({"params": p}, tokens))))(params)
    assert all(float(jnp.max(jnp.abs(g))) > 0 for g in jax.tree.leaves(grads))
