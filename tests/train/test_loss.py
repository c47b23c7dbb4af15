from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.loss import LossConfig, distillation_loss, next_tokens

B, T, D, V = 2, 12, 8, 37


def _inputs(seed: int):
    keys = jax.random.split(jax.random.key(seed), 6)
    hidden, teacher_hidden = jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (B, T, D + 3))
    head, teacher_head = jax.random.normal(keys[2], (V, D)), jax.random.normal(keys[3], (V, D + 3))
    targets = jax.random.randint(keys[4], (B, T), 0, V)
    mask = jax.random.bernoulli(keys[5], 0.7, (B, T))
    return hidden, head, targets, mask, (teacher_hidden, teacher_head)


def _plain(config, hidden, head, targets, mask, teacher):
    """The loss as its definition says, every logit at once."""
    s, t = hidden @ head.T, teacher[0] @ teacher[1].T
    ce = -jnp.take_along_axis(jax.nn.log_softmax(s), targets[..., None], -1)[..., 0]

    def kl(temperature):
        p, q = jax.nn.log_softmax(t / temperature), jax.nn.log_softmax(s / temperature)
        return jnp.sum(jnp.exp(p) * (p - q), -1)

    loss = config.lm_weight * ce + config.kd_weight * config.temperature**2 * kl(config.temperature)
    metrics = {
        "cross_entropy": ce,
        "kl": kl(1.0),
        "correct": s.argmax(-1) == targets,
        "agree": s.argmax(-1) == t.argmax(-1),
        "teacher_correct": t.argmax(-1) == targets,
        "count": jnp.ones_like(ce),
    }
    return jnp.sum(loss * mask), {name: jnp.sum(value * mask) for name, value in metrics.items()}


@settings(max_examples=12, deadline=None)
@given(
    chunk=st.sampled_from([1, 3, 5, 12, 100]),
    lm=st.sampled_from([0.0, 1.0, 0.3]),
    kd=st.sampled_from([0.0, 1.0, 2.5]),
    temperature=st.sampled_from([1.0, 2.0, 0.7]),
    seed=st.integers(0, 1000),
)
def test_chunked_loss_equals_the_plain_form_in_value_and_gradient(chunk, lm, kd, temperature, seed):
    if lm + kd == 0:
        return
    config = LossConfig(lm_weight=lm, kd_weight=kd, temperature=temperature, chunk=chunk)
    hidden, head, targets, mask, teacher = _inputs(seed)

    def ours(hidden, head):
        sums = distillation_loss(config, hidden, head, targets, mask, teacher)
        return 1.7 * sums.loss, sums  # a factor, so that the cotangent is used

    def plain(hidden, head):
        loss, metrics = _plain(config, hidden, head, targets, mask, teacher)
        return 1.7 * loss, metrics

    (value, sums), grads = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(hidden, head)
    (expected, metrics), expected_grads = jax.jit(jax.value_and_grad(plain, (0, 1), has_aux=True))(hidden, head)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for name, metric in metrics.items():
        np.testing.assert_allclose(getattr(sums, name), metric, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, expected_grads)
    np.testing.assert_allclose(
        distillation_loss(config, hidden, head, targets, mask, teacher).loss, sums.loss, rtol=1e-6
    )


def test_no_array_of_all_logits_exists_and_the_teacher_gets_no_gradient():
    config = LossConfig(kd_weight=1.0, chunk=4)
    hidden, head, targets, mask, teacher = _inputs(0)

    def loss(hidden, head, teacher):
        return distillation_loss(config, hidden, head, targets, mask, teacher).loss

    grad = jax.jit(jax.grad(loss, (0, 1, 2)))
    text = grad.lower(hidden, head, teacher).compile().as_text()
    assert f"[{B},4,{V}]" in text
    assert f"[{B},{T},{V}]" not in text
    assert f"[{B * T},{V}]" not in text
    assert all(float(jnp.abs(g).max()) == 0 for g in grad(hidden, head, teacher)[2])


def test_next_tokens_stay_within_segments():
    tokens = jnp.array([[3, 4, 5, 6, 7, 0, 0]])
    segments = jnp.array([[1, 1, 2, 2, 2, 0, 0]])
    targets, mask = next_tokens(tokens, segments)
    np.testing.assert_array_equal(mask, [[True, False, True, True, False, False, False]])
    np.testing.assert_array_equal(np.asarray(targets)[np.asarray(mask)], [4, 6, 7])


def test_a_loss_without_its_teacher_or_with_no_weight_is_refused():
    hidden, head, targets, mask, _ = _inputs(0)
    with pytest.raises(ValueError, match="teacher"):
        distillation_loss(LossConfig(kd_weight=1.0), hidden, head, targets, mask)
    for wrong in ({"lm_weight": 0.0}, {"temperature": 0.0}, {"chunk": 0}, {"kd_weight": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LossConfig(**wrong)
