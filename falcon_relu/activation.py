"""The MLP non-linearities: Falcon's own GELU and the ones that leave exact zeros."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from falcon_relu.config import FalconConfig


def activation_fn(config: FalconConfig) -> Callable[[jax.Array], jax.Array]:
    """The element-wise non-linearity of a config; keeps shape and dtype.

    "gelu" is the exact erf form. "shifted_relu" is max(x - shift, 0) (ReLU Strikes Back, arXiv:2310.04564) and
    "relu2" is max(x, 0)^2 (ReLU^2 Wins, arXiv:2402.03804).
    """
    match config.activation:
        case "gelu":
            return _gelu
        case "relu":
            return jax.nn.relu
        case "shifted_relu":
            return lambda x: jax.nn.relu(x - jnp.asarray(config.activation_shift, x.dtype))
        case "relu2":
            return lambda x: jnp.square(jax.nn.relu(x))


def _gelu(x: jax.Array) -> jax.Array:
    # Not jax.nn.gelu: its erfc takes several times as long on a CPU as erf.
    return 0.5 * x * (1 + jax.lax.erf(x * jnp.asarray(math.sqrt(0.5), x.dtype)))
