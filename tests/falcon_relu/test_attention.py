from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from falcon_relu.attention import attend
from falcon_relu.config import family
from falcon_relu.model import Falcon
from falcon_relu.sharding import make_mesh, param_shardings, use_mesh
from tests.conftest import random_params

B, T, K, G, H = 2, 256, 2, 3, 64


def _packed(T: int, rows: int = B) -> tuple[jax.Array, jax.Array]:
    """Segments and positions of rows of several documents, the first row ending in padding."""
    segments = np.sort(np.random.default_rng(0).integers(1, 5, (rows, T)), axis=1).astype(np.int32)
    segments[0, -20:] = 0
    positions = np.array([[np.sum(row[:t] == row[t]) for t in range(T)] for row in segments], np.int32)
    return jnp.asarray(segments), jnp.asarray(positions)


@pytest.mark.parametrize("kind", ["xla", "splash"])
def test_kernels_agree_in_values_and_gradients(kind):
    """cuDNN is called by the same lines as "xla", with the same arguments; only a GPU can run it."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(B, T, K, G, H), (B, T, K, H), (B, T, K, H)]
    qkv = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=False)]
    segments, positions = _packed(T)
    weight = jax.random.normal(keys[3], shapes[0]) * (segments != 0)[:, :, None, None, None]

    def total(qkv, kind):
        out = attend(*qkv, positions_BxT=positions, segments_BxT=segments, kind=kind, query_chunk=64)
        return jnp.sum(out * weight), out

    both = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnums=1)
    (_, expected), expected_gradients = both(qkv, "chunked")
    (_, out), gradients = both(qkv, kind)
    seen = np.asarray(segments) != 0
    np.testing.assert_allclose(np.asarray(out)[seen], np.asarray(expected)[seen], atol=2e-5)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)


def test_a_sharded_model_on_splash_equals_one_device_on_chunks():
    """Two heads over tensor, two rows over data; also that remat may keep what the kernel leaves for its gradient."""
    config = family("tiny-40b").replace(d_model=256, n_layers=2)
    params = random_params(config)
    segments, positions = _packed(128, rows=4)
    tokens = jax.random.randint(jax.random.key(1), segments.shape, 1, config.vocab_size)

    def loss(params, model):
        logits = model.apply({"params": params}, tokens, positions, segments)
        return jnp.mean(jnp.square(logits) * (segments != 0)[..., None])

    expected = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, Falcon(config, attention="chunked"))
    mesh = make_mesh((2, 1, 2), jax.devices()[:4])
    with use_mesh(mesh):
        placed = jax.device_put(params, param_shardings(config, mesh))
        got = jax.jit(jax.value_and_grad(loss), static_argnums=1)(
            placed, Falcon(config, attention="splash", remat="mlp")
        )
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(mine - theirs) <= 1e-4 * np.linalg.norm(theirs)


@pytest.mark.parametrize("kind", ["xla", "cudnn", "splash"])
def test_kernels_refuse_what_they_cannot_do(kind):
    q, k = jnp.zeros((1, 100, 1, 1, 64)), jnp.zeros((1, 100, 1, 64))
    ones = jnp.ones((1, 100), jnp.int32)
    with pytest.raises(ValueError, match=kind):
        attend(q, k, k, positions_BxT=ones, segments_BxT=ones, kind=kind, use_alibi=True)


def test_splash_says_which_lengths_it_takes():
    q, k = jnp.zeros((1, 100, 1, 1, 64)), jnp.zeros((1, 100, 1, 64))
    ones = jnp.ones((1, 100), jnp.int32)
    with pytest.raises(ValueError, match="multiple of 128"):
        attend(q, k, k, positions_BxT=ones, segments_BxT=ones, kind="splash")
