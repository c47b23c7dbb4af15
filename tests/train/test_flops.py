from __future__ import annotations

import pytest

from falcon_relu.config import family
from train.flops import forward_flops, model_flops


def test_a_step_of_40b_takes_what_its_parameter_count_says():
    """41.3e9 parameters: 6 N and 2 N a token, and attention on top (2.4 % at 2,048 tokens, half of it masked)."""
    config = family("falcon-40b")
    tokens = 1920 * 2048
    weights = 2 * config.n_params * tokens
    attention = 2 * 2 * 60 * 8192 * 1920 * 2048 * 2049 / 2
    assert forward_flops(config, 1920, 2048) == pytest.approx(weights + attention, rel=1e-4)  # norms are not counted
    assert model_flops(config, config, 1920, 2048) == pytest.approx(8 * tokens * config.n_params, rel=0.03)
    assert model_flops(config, None, 1920, 2048) * 4 == model_flops(config, config, 1920, 2048) * 3


def test_flops_are_those_that_xla_counts():
    """One layer, so that no loop hides work from XLA's own count; it counts the masked half of attention too."""
    import jax

    from falcon_relu.model import Falcon
    from falcon_relu.sharding import abstract_params

    config = family("tiny-40b").replace(n_layers=1, d_model=512, n_heads=8, d_ff=2048, vocab_size=4096)
    B, T = 2, 128
    tokens = jax.ShapeDtypeStruct((B, T), jax.numpy.int32)
    lowered = jax.jit(Falcon(config).apply).lower({"params": abstract_params(config)}, tokens)
    counted = lowered.compile().cost_analysis()["flops"]
    masked = 2 * B * config.n_heads * config.head_dim * T * (T - 1)
    assert counted == pytest.approx(forward_flops(config, B, T) + masked, rel=0.03)
