from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from falcon_relu.errors import FalconError
from falcon_relu.model import next_tokens
from train.loss import LossConfig, OnlineTeacher, distillation_loss, l1_weight
from train.teacher_cache import top_k_targets

B, T, D, V = 2, 12, 8, 37


def _inputs(seed: int):
    keys = jax.random.split(jax.random.key(seed), 6)
    hidden, teacher_hidden = jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (B, T, D + 3))
    head, teacher_head = jax.random.normal(keys[2], (V, D)), jax.random.normal(keys[3], (V, D + 3))
    tokens = jax.random.randint(keys[4], (B, T), 0, V)
    targets, mask = next_tokens(tokens, jnp.sort(jax.random.randint(keys[5], (B, T), 0, 4), axis=1))
    return hidden, head, targets, mask, OnlineTeacher(teacher_hidden, teacher_head)


def _plain(config, hidden, head, targets, mask, teacher):
    """The loss as its definition says, every logit at once."""
    s, t = hidden @ head.T, teacher.hidden_BxTxD @ teacher.head_VxD.T
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


@settings(max_examples=12)
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


def _gradients(config, hidden, head, targets, mask, teacher):
    def loss(hidden, head):
        sums = distillation_loss(config, hidden, head, targets, mask, teacher)
        return sums.loss, sums

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(hidden, head)


def _cached(teacher, targets, k, temperature):
    said, total = top_k_targets(
        teacher.hidden_BxTxD, teacher.head_VxD, targets, top_k=k, temperature=temperature, chunk=5
    )
    logits = teacher.hidden_BxTxD @ teacher.head_VxD.T
    np.testing.assert_allclose(total, jax.nn.logsumexp(logits, -1), rtol=1e-6)
    return said


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
def test_a_cache_of_the_whole_vocabulary_gives_the_online_loss(temperature):
    """To rounding in float32; in bfloat16 a log-probability is off by 0.4 % at most, and the loss by about as much."""
    config = LossConfig(lm_weight=0.3, kd_weight=1.0, temperature=temperature, chunk=4)
    hidden, head, targets, mask, teacher = _inputs(1)
    (value, sums), gradients = _gradients(config, hidden, head, targets, mask, teacher)
    said = _cached(teacher, targets, V, temperature)
    (cached_value, cached_sums), cached_gradients = _gradients(config, hidden, head, targets, mask, said)
    np.testing.assert_allclose(cached_value, value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), cached_sums, sums)
    for mine, theirs in zip(cached_gradients, gradients, strict=True):
        assert np.linalg.norm(mine - theirs) <= 1e-6 * np.linalg.norm(theirs)

    rounded = said.replace(log_probs_BxTxk=said.log_probs_BxTxk.astype(jnp.bfloat16))
    (rounded_value, _), rounded_gradients = _gradients(config, hidden, head, targets, mask, rounded)
    np.testing.assert_allclose(rounded_value, value, rtol=4e-3)
    for mine, theirs in zip(rounded_gradients, gradients, strict=True):
        assert np.linalg.norm(mine - theirs) <= 1e-2 * np.linalg.norm(theirs)


@settings(max_examples=5)
@given(k=st.integers(1, V - 1), temperature=st.sampled_from([1.0, 2.0, 0.7]), seed=st.integers(0, 1000))
def test_a_cached_teacher_is_distilled_over_its_top_k_and_the_rest(k, temperature, seed):
    config = LossConfig(lm_weight=0.5, kd_weight=2.0, temperature=temperature, chunk=4)
    hidden, head, targets, mask, teacher = _inputs(seed)
    t = teacher.hidden_BxTxD @ teacher.head_VxD.T
    _, ids = jax.lax.top_k(t, k)

    def buckets(logits):  # log-probabilities of the top k and of all others together
        p = jax.nn.softmax(logits, -1)
        top = jnp.take_along_axis(p, ids, -1)
        others = jax.nn.one_hot(ids, V).sum(-2) == 0
        return jnp.log(jnp.concatenate([top, jnp.sum(p * others, -1, keepdims=True)], -1))

    def kl(s, temperature):
        p, q = buckets(t / temperature), buckets(s / temperature)
        return jnp.sum(jnp.exp(p) * (p - q), -1)

    def plain(hidden, head):
        s = hidden @ head.T
        ce = -jnp.take_along_axis(jax.nn.log_softmax(s), targets[..., None], -1)[..., 0]
        loss = 0.5 * ce + 2.0 * temperature**2 * kl(s, temperature)
        return jnp.sum(loss * mask), jnp.sum(kl(s, 1.0) * mask)

    (expected, expected_kl), expected_gradients = jax.value_and_grad(plain, (0, 1), has_aux=True)(hidden, head)
    (value, sums), gradients = _gradients(
        config, hidden, head, targets, mask, _cached(teacher, targets, k, temperature)
    )
    (_, online), _ = _gradients(config, hidden, head, targets, mask, teacher)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(sums.kl, expected_kl, rtol=1e-4, atol=1e-5)
    assert sums.kl <= online.kl * (1 + 1e-5) + 1e-5  # what is told apart less differs less
    for name in ("agree", "teacher_cross_entropy", "teacher_correct"):
        np.testing.assert_allclose(getattr(sums, name), getattr(online, name), rtol=1e-5)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        assert np.linalg.norm(mine - theirs) <= 1e-4 * np.linalg.norm(theirs)


def test_l1_weight_holds_then_rises_along_half_sine_waves():
    stages = ((10, 1.0), (20, 3.0), (40, 4.0))
    steps = jnp.array([0, 10, 15, 20, 30, 40, 99])
    np.testing.assert_allclose(l1_weight(stages, steps), [1, 1, 2, 3, 3.5, 4, 4], rtol=1e-6)
    early, late = (float(value) for value in l1_weight(stages, jnp.array([11, 19])))
    assert early - 1 == pytest.approx(3 - late, rel=1e-4)
    assert early - 1 < 0.06  # slow at either end, unlike a straight line


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
    assert all(float(jnp.abs(g).max()) == 0 for g in jax.tree.leaves(grad(hidden, head, teacher)[2]))
    said = _cached(teacher, targets, 3, 1.0)
    text = jax.jit(lambda *a: _gradients(config, *a)).lower(hidden, head, targets, mask, said).compile().as_text()
    assert f"[{B},4,{V}]" in text
    assert f"[{B},{T},{V}]" not in text


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
    for wrong in (
        {"lm_weight": 0.0},
        {"temperature": 0.0},
        {"chunk": 0},
        {"kd_weight": -1.0},
        {"l1_stages": ((5, 1.0), (5, 2.0))},
    ):
        with pytest.raises(FalconError, match=next(iter(wrong))):
            LossConfig(**wrong)
