"""Shared by all tests: eight virtual CPU devices, strict ranks, randomised parameters."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from falcon_relu.config import FalconConfig
from falcon_relu.model import Params
from falcon_relu.sharding import abstract_params

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

TINY = ("tiny-40b", "tiny-7b", "tiny-11b", "tiny-rw")


def random_params(config: FalconConfig, seed: int = 0) -> Params:
    """Every parameter random, LayerNorms and biases included, with logits of order 1 to 10."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        centre = 1.0 if name == "scale" else 0.0
        std = 0.3 if name in ("scale", "bias") or name.endswith("_bias") else 1.5 / np.sqrt(config.d_model)
        return jax.numpy.asarray(rng.normal(centre, std, leaf.shape).astype(np.float32))

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config))


@pytest.fixture(params=TINY)
def tiny_name(request: pytest.FixtureRequest) -> str:
    """Each member of the tiny family in turn."""
    return request.param
