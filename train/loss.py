"""Next-token loss plus distillation, a chunk of positions at a time.

With 65,024 vocabulary entries the logits of student and teacher are too large to hold for a whole batch. Each chunk of
the sequence goes through both heads. The gradient of the loss with respect to the logits has a closed form, so the same
pass computes the gradients of hidden states and head too: four head-sized products a chunk (two forward, two
backward), where rematerialisation would take six.

The teacher's distribution is computed from its hidden states and head, or read from a cache that
`train.teacher_cache` wrote.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from falcon_relu.errors import FalconError, check_number
from falcon_relu.model import join_chunks, largest_divisor, split_chunks
from falcon_relu.sharding import batch_shards

# Stands for log 0; finite, so that 0 * log 0 is 0 and not NaN.
_NEVER = -1e30


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """loss = lm_weight * CE(student, next token) + kd_weight * temperature^2 * KL(teacher_T || student_T).

    Attributes:
      lm_weight: weight of the cross-entropy.
      kd_weight: weight of the distillation; 0 trains without a teacher (Hinton et al., arXiv:1503.02531).
      temperature: T, divides both models' logits in the distillation term.
      chunk: positions of each row whose logits are computed at a time; they take B x chunk x V float32 a model.
      l1_stages: (last step, weight) of each stage of an L1 term on the MLPs' activations; none by default. See
        `l1_weight`.

    Raises:
      FalconError: a field is out of range; the message names it.
    """

    lm_weight: float = 1.0
    kd_weight: float = 0.0
    temperature: float = 1.0
    chunk: int = 256
    l1_stages: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        for name in ("lm_weight", "kd_weight"):
            check_number(f"LossConfig.{name}", getattr(self, name), low=0)
        if self.lm_weight + self.kd_weight == 0:
            raise FalconError("LossConfig needs an lm_weight or a kd_weight above 0")
        check_number("LossConfig.temperature", self.temperature, above=0)
        if not isinstance(self.chunk, int) or self.chunk < 1:
            raise FalconError(f"LossConfig.chunk must be an integer from 1, got {self.chunk}")
        steps = [0, *(step for step, _ in self.l1_stages)]
        if any(later <= earlier for earlier, later in itertools.pairwise(steps)):
            raise FalconError(f"LossConfig.l1_stages must have ascending steps above 0, got {self.l1_stages}")
        for step, weight in self.l1_stages:
            check_number(f"LossConfig.l1_stages: the weight of the stage up to step {step}", weight, low=0)


def l1_weight(stages: tuple[tuple[int, float], ...], step: jax.Array) -> jax.Array:
    """The weight of the L1 term at a step, float32 scalar: ProSparse's progressive regularisation (arXiv:2402.13516).

    Through the first stage the weight is constant; in every later stage it moves from the previous stage's weight to
    its own along half a cosine; after the last stage it stays.

    Args:
      stages: (last step, weight) of each stage, at least one, steps ascending.
      step: number of updates done so far.
    """
    (first, weight), *later = stages
    begin, value = first, jnp.float32(weight)
    for end, target in later:
        share = jnp.clip((step - begin) / (end - begin), 0, 1)
        value += (target - weight) * 0.5 * (1 - jnp.cos(jnp.pi * share))
        begin, weight = end, target
    return value


@struct.dataclass
class LossSums:
    """Sums over the positions of the mask, float32 scalars; divide by `count` for means.

    Attributes:
      loss: the weighted loss; the only field that gradients flow through.
      cross_entropy: of the next token under the student, nats.
      correct: positions whose likeliest token under the student is the next one.
      count: positions that have a next token in their own segment.
      kl: KL(teacher || student) at temperature 1, nats; None without a teacher, like the next three.
      agree: positions where student and teacher have the same likeliest token.
      teacher_cross_entropy: of the next token under the teacher, nats.
      teacher_correct: positions whose likeliest token under the teacher is the next one.
      l1: mean absolute activation over layers and neurons; None where the loss has no L1 term.
    """

    loss: jax.Array
    cross_entropy: jax.Array
    correct: jax.Array
    count: jax.Array
    kl: jax.Array | None = None
    agree: jax.Array | None = None
    teacher_cross_entropy: jax.Array | None = None
    teacher_correct: jax.Array | None = None
    l1: jax.Array | None = None


@struct.dataclass
class OnlineTeacher:
    """A teacher run in the same step: its final hidden states [B, T, D'] and its head [V, D']."""

    hidden_BxTxD: jax.Array
    head_VxD: jax.Array


@struct.dataclass
class CachedTeacher:
    """A teacher's distribution at each position, stored earlier: its k likeliest tokens and the mass of all others.

    All other tokens are one bucket: the loss is the KL divergence between distributions over k + 1 outcomes. The
    student is still pushed down outside the top k, but how it distributes its mass there is free.

    Attributes:
      ids_BxTxk: the k likeliest tokens, likeliest first.
      log_probs_BxTxk: their log-probabilities at temperature 1.
      log_rest_BxTx2: logs of two sums over all other tokens: of p and of p^(1/T), where p is at temperature 1 and T is
        the temperature that the cache was written for; -inf where there are no other tokens.
      log_next_BxT: log-probability of the next token, whether or not it is among the k.
    """

    ids_BxTxk: jax.Array
    log_probs_BxTxk: jax.Array
    log_rest_BxTx2: jax.Array
    log_next_BxT: jax.Array


Teacher = OnlineTeacher | CachedTeacher


def distillation_loss(
    config: LossConfig,
    hidden_BxTxD: jax.Array,
    head_VxD: jax.Array,
    targets_BxT: jax.Array,
    mask_BxT: jax.Array,
    teacher: Teacher | None = None,
) -> LossSums:
    """Loss and metrics, summed over the positions of the mask; `loss` is differentiable in hidden states and head.

    Products are in the dtype of the hidden states, softmax and sums in float32; the head's gradient is accumulated in
    float32.

    Args:
      config: weights, temperature and chunk.
      hidden_BxTxD: final hidden states of the student.
      head_VxD: its vocabulary head.
      targets_BxT: next tokens.
      mask_BxT: positions that the sums run over.
      teacher: the model to distil from, which gets no gradient. A cached one must have been written for the config's
        temperature, unless that is 1.

    Raises:
      ValueError: the loss distils but there is no teacher.
    """
    if config.kd_weight and teacher is None:
        raise ValueError("kd_weight is above 0 but there is no teacher")
    if teacher is not None:
        teacher = jax.lax.stop_gradient(teacher)
    return _loss(config, hidden_BxTxD, head_VxD, (targets_BxT, mask_BxT, teacher))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(config: LossConfig, hidden_BxTxD: jax.Array, head_VxD: jax.Array, constants: Any) -> LossSums:
    return _scan_chunks(config, hidden_BxTxD, head_VxD, constants, with_gradient=False)[0]


def _loss_forward(config: LossConfig, hidden_BxTxD: jax.Array, head_VxD: jax.Array, constants: Any) -> Any:
    return _scan_chunks(config, hidden_BxTxD, head_VxD, constants, with_gradient=True)


def _loss_backward(config: LossConfig, gradients: tuple[jax.Array, jax.Array], cotangent: LossSums) -> Any:
    d_hidden_BxTxD, d_head_VxD = gradients
    scale = cotangent.loss
    return scale.astype(d_hidden_BxTxD.dtype) * d_hidden_BxTxD, scale.astype(d_head_VxD.dtype) * d_head_VxD, None


_loss.defvjp(_loss_forward, _loss_backward)


def _scan_chunks(
    config: LossConfig, hidden_BxTxD: jax.Array, head_VxD: jax.Array, constants: Any, with_gradient: bool
) -> tuple[LossSums, tuple[jax.Array, jax.Array] | None]:
    """Sums and, if asked for, d loss / d (hidden states, head) in the dtypes of the inputs."""
    targets_BxT, mask_BxT, teacher = constants
    dtype = hidden_BxTxD.dtype
    # Gathered over fsdp here, before the scan, or each chunk would gather it again.
    head = nn.with_logical_constraint(head_VxD.astype(dtype), ("vocab", None))
    t_head, teacher_part = None, teacher
    if isinstance(teacher, OnlineTeacher):
        teacher_part = teacher.hidden_BxTxD
        t_head = nn.with_logical_constraint(teacher.head_VxD.astype(teacher_part.dtype), ("vocab", None))

    # Each batch shard accumulates its own head gradient, so that devices all-reduce once and not once a chunk.
    shards = math.gcd(batch_shards(), hidden_BxTxD.shape[0])

    def chunk_step(d_head_NxVxD: Any, chunk: tuple) -> tuple[Any, tuple[LossSums, Any]]:
        h_BxCxD, targets_BxC, mask_BxC, teacher_part = chunk
        s_BxCxV = jnp.einsum("bcd,vd->bcv", h_BxCxD, head, preferred_element_type=jnp.float32)
        soft = None
        if t_head is not None:
            soft = _SoftTargets(jnp.einsum("bcd,vd->bcv", teacher_part, t_head, preferred_element_type=jnp.float32))
        elif teacher_part is not None:
            soft = _SoftTargets(_spread(teacher_part, s_BxCxV.shape[-1]), teacher_part)
        sums, d_logits_BxCxV = _chunk_loss(config, s_BxCxV, soft, targets_BxC, mask_BxC, with_gradient)
        if d_logits_BxCxV is None:
            return None, (sums, None)
        d_logits_BxCxV = d_logits_BxCxV.astype(dtype)
        d_hidden_BxCxD = jnp.einsum("bcv,vd->bcd", d_logits_BxCxV, head)
        pieces = (x.reshape(shards, -1, *x.shape[1:]) for x in (d_logits_BxCxV, h_BxCxD))
        d_head_NxVxD += jnp.einsum("nbcv,nbcd->nvd", *pieces, preferred_element_type=jnp.float32)
        d_head_NxVxD = nn.with_logical_constraint(d_head_NxVxD, ("batch", "vocab", None))
        return d_head_NxVxD, (sums, d_hidden_BxCxD)

    T = hidden_BxTxD.shape[1]
    size = largest_divisor(T, config.chunk)
    carry = jnp.zeros((shards, *head_VxD.shape), jnp.float32) if with_gradient else None
    pieces = (hidden_BxTxD, targets_BxT, mask_BxT, teacher_part)
    if size == T:
        d_head_NxVxD, (sums, d_hidden_BxTxD) = chunk_step(carry, pieces)
    else:
        d_head_NxVxD, (sums, d_hidden) = jax.lax.scan(chunk_step, carry, split_chunks(pieces, size))
        sums = jax.tree.map(lambda x: x.sum(0), sums)
        d_hidden_BxTxD = join_chunks(d_hidden)
    if not with_gradient:
        return sums, None
    d_head_VxD = nn.with_logical_constraint(d_head_NxVxD.sum(0), ("vocab", "embed"))
    return sums, (d_hidden_BxTxD, d_head_VxD.astype(head_VxD.dtype))


class _SoftTargets(NamedTuple):
    """The teacher's distribution at a chunk of positions, the soft targets of distillation.

    Attributes:
      scores_BxCxV: its logits; for a cached teacher the log-probabilities of the top k, and `_NEVER` elsewhere.
      cached: the cached teacher that they come from, None for an online one.
    """

    scores_BxCxV: jax.Array
    cached: CachedTeacher | None = None

    def probs(self, temperature: float, log_q_BxCxV: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Probabilities and their logs [B, C, V] at a temperature, against the student's `log_q_BxCxV`.

        A cached teacher's mass outside the top k is distributed in proportion to the student's. The KL divergence over
        V tokens then has the value and gradient of the one over the k tokens and the bucket of all others: with p_r and
        q_r the bucket's mass under teacher and student, sum q_j / q_r * p_r * log(p_r / q_r) = p_r * log(p_r / q_r),
        and d/ds_j = q_j - p_r * q_j / q_r.
        """
        scaled_BxCxV = self.scores_BxCxV / temperature
        if self.cached is None:
            return _softmax(scaled_BxCxV)
        log_rest_BxC = jnp.maximum(self.cached.log_rest_BxTx2[..., 0 if temperature == 1 else 1], _NEVER)
        top_BxC = _logsumexp(self.cached.log_probs_BxTxk.astype(jnp.float32) / temperature)
        total_BxC = jnp.logaddexp(top_BxC, log_rest_BxC)
        is_top_BxCxV = self.scores_BxCxV != _NEVER
        log_q_rest_BxC = _logsumexp(jnp.where(is_top_BxCxV, _NEVER, log_q_BxCxV))
        spread_BxCxV = log_q_BxCxV + (log_rest_BxC - total_BxC - log_q_rest_BxC)[..., None]
        log_p_BxCxV = jnp.where(is_top_BxCxV, scaled_BxCxV - total_BxC[..., None], spread_BxCxV)
        return jnp.exp(log_p_BxCxV), log_p_BxCxV


def _spread(cached: CachedTeacher, vocab_size: int) -> jax.Array:
    """The top k log-probabilities scattered to their token ids, [B, C, V] float32, `_NEVER` elsewhere."""
    nowhere_BxCxV = jnp.full((*cached.ids_BxTxk.shape[:2], vocab_size), _NEVER, jnp.float32)
    nowhere_BxCxV = nn.with_logical_constraint(nowhere_BxCxV, ("batch", None, "vocab"))

    def place(row_V: jax.Array, ids_k: jax.Array, values_k: jax.Array) -> jax.Array:
        return row_V.at[ids_k].set(values_k, unique_indices=True, mode="promise_in_bounds")

    values_BxCxk = cached.log_probs_BxTxk.astype(jnp.float32)
    return jax.vmap(jax.vmap(place))(nowhere_BxCxV, cached.ids_BxTxk.astype(jnp.int32), values_BxCxk)


def _chunk_loss(
    config: LossConfig,
    s_BxCxV: jax.Array,
    soft: _SoftTargets | None,
    targets_BxC: jax.Array,
    mask_BxC: jax.Array,
    with_gradient: bool,
) -> tuple[LossSums, jax.Array | None]:
    """Sums over a chunk and the gradient of the loss with respect to the student's logits."""
    mask = mask_BxC.astype(jnp.float32)
    T = config.temperature

    def total(x_BxC: jax.Array) -> jax.Array:
        return jnp.sum(x_BxC * mask)

    def of_target(x_BxCxV: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x_BxCxV, targets_BxC[..., None], axis=-1)[..., 0]

    # Likeliest tokens are compared by their logit: an argmax is many times slower than a max on a CPU.
    s_max_BxC, s_target_BxC, (q_BxCxV, log_q_BxCxV) = s_BxCxV.max(-1), of_target(s_BxCxV), _softmax(s_BxCxV)
    ce_BxC = -of_target(log_q_BxCxV)
    loss_BxC = config.lm_weight * ce_BxC
    sums = LossSums(
        loss=total(loss_BxC),
        cross_entropy=total(ce_BxC),
        correct=total(s_target_BxC == s_max_BxC),
        count=mask.sum(),
    )
    if soft is not None:
        t_BxCxV, (p_BxCxV, log_p_BxCxV) = soft.scores_BxCxV, soft.probs(1, log_q_BxCxV)
        t_max_BxC = t_BxCxV.max(-1)
        both_best_BxCxV = (s_BxCxV == s_max_BxC[..., None]) & (t_BxCxV == t_max_BxC[..., None])
        log_next_BxC = of_target(log_p_BxCxV) if soft.cached is None else soft.cached.log_next_BxT
        kl_BxC = _kl(p_BxCxV, log_p_BxCxV, log_q_BxCxV)
        sums = dataclasses.replace(
            sums,
            kl=total(kl_BxC),
            agree=total(jnp.any(both_best_BxCxV, axis=-1)),
            teacher_cross_entropy=total(-log_next_BxC),
            teacher_correct=total(of_target(t_BxCxV) == t_max_BxC),
        )
    if config.kd_weight:
        assert soft is not None
        if T == 1:
            hot_q_BxCxV, hot_p_BxCxV, hot_kl_BxC = q_BxCxV, p_BxCxV, kl_BxC
        else:
            hot_q_BxCxV, hot_log_q_BxCxV = _softmax(s_BxCxV / T)
            hot_p_BxCxV, hot_log_p_BxCxV = soft.probs(T, hot_log_q_BxCxV)
            hot_kl_BxC = _kl(hot_p_BxCxV, hot_log_p_BxCxV, hot_log_q_BxCxV)
        loss_BxC = loss_BxC + config.kd_weight * T**2 * hot_kl_BxC
        sums = dataclasses.replace(sums, loss=total(loss_BxC))
    if not with_gradient:
        return sums, None
    # d CE = softmax(s) - onehot; d (T^2 KL_T) = T (softmax(s / T) - p_T).
    onehot = targets_BxC[..., None] == jnp.arange(s_BxCxV.shape[-1])[None, None]
    d_BxCxV = config.lm_weight * (q_BxCxV - onehot)
    if config.kd_weight:
        d_BxCxV = d_BxCxV + config.kd_weight * T * (hot_q_BxCxV - hot_p_BxCxV)
    return sums, d_BxCxV * mask[..., None]


def _softmax(logits_BxCxV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Probabilities and their logs [B, C, V]; the exponential is taken once."""
    above_BxCxV = logits_BxCxV - logits_BxCxV.max(-1, keepdims=True)
    exp_BxCxV = jnp.exp(above_BxCxV)
    total_BxCx1 = _row_sum(exp_BxCxV)[..., None]
    return exp_BxCxV / total_BxCx1, above_BxCxV - jnp.log(total_BxCx1)


def _logsumexp(x: jax.Array) -> jax.Array:
    top = x.max(-1, keepdims=True)
    return jnp.log(_row_sum(jnp.exp(x - top))) + top[..., 0]


def _kl(p_BxCxV: jax.Array, log_p_BxCxV: jax.Array, log_q_BxCxV: jax.Array) -> jax.Array:
    """KL(p || q) [B, C] in nats."""
    return _row_sum(p_BxCxV * (log_p_BxCxV - log_q_BxCxV))


def _row_sum(x: jax.Array) -> jax.Array:
    """The sum over the last axis, as a product with ones.

    XLA:CPU fuses `x` into a reduction and then computes it without SIMD; as the input of a product it is vectorised. On
    other platforms XLA turns the product back into a sum.
    """
    return jnp.einsum("...v,v->...", x, jnp.ones(x.shape[-1], x.dtype), precision=jax.lax.Precision.HIGHEST)
