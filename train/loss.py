"""Next-token loss plus distillation, a chunk of positions at a time.

With 65,024 vocabulary entries the logits of student and teacher must not exist at full size. Each chunk of the
sequence goes through both heads, and since the gradient of the loss with respect to logits has a closed form, it is
turned into the gradients of hidden states and head in the same pass: four head-sized products a chunk (two forward, two
backward), where rematerialisation would take six.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """loss = lm_weight * CE(student, next token) + kd_weight * temperature^2 * KL(teacher_T || student_T).

    Attributes:
      lm_weight: weight of the cross-entropy.
      kd_weight: weight of the distillation; 0 trains without a teacher (Hinton et al., arXiv:1503.02531).
      temperature: T, divides both models' logits in the distillation term.
      chunk: positions of each row whose logits exist at a time; they take B x chunk x V floats a model.
    """

    lm_weight: float = 1.0
    kd_weight: float = 0.0
    temperature: float = 1.0
    chunk: int = 256

    def __post_init__(self) -> None:
        if self.lm_weight < 0 or self.kd_weight < 0 or self.lm_weight + self.kd_weight == 0:
            raise ValueError(
                f"LossConfig needs lm_weight and kd_weight >= 0 and one above 0, got {self.lm_weight}, {self.kd_weight}"
            )
        if self.temperature <= 0:
            raise ValueError(f"LossConfig.temperature must be above 0, got {self.temperature}")
        if self.chunk < 1:
            raise ValueError(f"LossConfig.chunk must be at least 1, got {self.chunk}")


@struct.dataclass
class LossSums:
    """Sums over the counted positions, float32 scalars; divide by `count` for means.

    Attributes:
      loss: the weighted loss; the only one that gradients flow through.
      cross_entropy: nats, of the next token under the student.
      correct: positions whose likeliest token under the student is the next one.
      kl: nats, KL(teacher || student) at temperature 1; 0 without a teacher.
      agree: positions where student and teacher have the same likeliest token; 0 without a teacher.
      teacher_cross_entropy: nats, of the next token under the teacher; 0 without a teacher.
      teacher_correct: positions whose likeliest token under the teacher is the next one.
      count: positions that have a next token in their own segment.
    """

    loss: jax.Array
    cross_entropy: jax.Array
    correct: jax.Array
    kl: jax.Array
    agree: jax.Array
    teacher_cross_entropy: jax.Array
    teacher_correct: jax.Array
    count: jax.Array


def next_tokens(tokens_BxT: jax.Array, segment_ids_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Targets [B, T] int32 and mask [B, T] bool: the next token of the row, where it is of the same segment."""
    targets_BxT = jnp.roll(tokens_BxT, -1, axis=1)
    same_BxT = (segment_ids_BxT == jnp.roll(segment_ids_BxT, -1, axis=1)) & (segment_ids_BxT != 0)
    return targets_BxT, same_BxT.at[:, -1].set(False)


def distillation_loss(
    config: LossConfig,
    hidden_BxTxD: jax.Array,
    head_VxD: jax.Array,
    targets_BxT: jax.Array,
    mask_BxT: jax.Array,
    teacher: tuple[jax.Array, jax.Array] | None = None,
) -> LossSums:
    """Loss and metrics, summed over the positions of the mask; `loss` is differentiable in hidden states and head.

    Products are in the dtype of the hidden states, softmax and sums in float32; the head's gradient is accumulated in
    float32.

    Args:
      config: weights, temperature and chunk.
      hidden_BxTxD: final hidden states of the student.
      head_VxD: its vocabulary head.
      targets_BxT: next tokens.
      mask_BxT: positions to count.
      teacher: hidden states [B, T, D'] and head [V, D'] of the teacher, which get no gradient.

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
    # Gathered over fsdp once, not once a chunk.
    head = nn.with_logical_constraint(head_VxD.astype(dtype), ("vocab", None))
    t_hidden, t_head = None, None
    if teacher is not None:
        t_hidden, t_head = teacher
        t_head = nn.with_logical_constraint(t_head.astype(t_hidden.dtype), ("vocab", None))

    def chunk_step(d_head_VxD: Any, chunk: tuple) -> tuple[Any, tuple[LossSums, Any]]:
        h_BxCxD, targets_BxC, mask_BxC, t_BxCxD = chunk
        s_BxCxV = jnp.einsum("bcd,vd->bcv", h_BxCxD, head, preferred_element_type=jnp.float32)
        t_BxCxV = None
        if t_BxCxD is not None:
            t_BxCxV = jnp.einsum("bcd,vd->bcv", t_BxCxD, t_head, preferred_element_type=jnp.float32)
        sums, d_logits_BxCxV = _chunk_loss(config, s_BxCxV, t_BxCxV, targets_BxC, mask_BxC, with_gradient)
        if d_logits_BxCxV is None:
            return None, (sums, None)
        d_logits_BxCxV = d_logits_BxCxV.astype(dtype)
        d_hidden_BxCxD = jnp.einsum("bcv,vd->bcd", d_logits_BxCxV, head)
        d_head_VxD += jnp.einsum("bcv,bcd->vd", d_logits_BxCxV, h_BxCxD, preferred_element_type=jnp.float32)
        d_head_VxD = nn.with_logical_constraint(d_head_VxD, ("vocab", "embed"))
        return d_head_VxD, (sums, d_hidden_BxCxD)

    T = hidden_BxTxD.shape[1]
    size = max(c for c in range(1, min(config.chunk, T) + 1) if T % c == 0)
    carry = jnp.zeros(head_VxD.shape, jnp.float32) if with_gradient else None
    pieces = (hidden_BxTxD, targets_BxT, mask_BxT, t_hidden)
    if size == T:
        d_head_VxD, (sums, d_hidden_BxTxD) = chunk_step(carry, pieces)
    else:
        xs = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0], T // size, size, *x.shape[2:]), 1, 0), pieces)
        d_head_VxD, (sums, d_hidden) = jax.lax.scan(chunk_step, carry, xs)
        sums = jax.tree.map(lambda x: x.sum(0), sums)
        d_hidden_BxTxD = d_hidden if d_hidden is None else jnp.moveaxis(d_hidden, 0, 1).reshape(hidden_BxTxD.shape)
    if not with_gradient:
        return sums, None
    return sums, (d_hidden_BxTxD, d_head_VxD.astype(head_VxD.dtype))


def _chunk_loss(
    config: LossConfig,
    s_BxCxV: jax.Array,
    t_BxCxV: jax.Array | None,
    targets_BxC: jax.Array,
    mask_BxC: jax.Array,
    with_gradient: bool,
) -> tuple[LossSums, jax.Array | None]:
    """Sums over a chunk and the gradient of the loss with respect to the student's logits."""
    mask = mask_BxC.astype(jnp.float32)
    T = config.temperature

    def total(x_BxC: jax.Array) -> jax.Array:
        return jnp.sum(x_BxC * mask)

    def target_logit(logits_BxCxV: jax.Array) -> jax.Array:
        return jnp.take_along_axis(logits_BxCxV, targets_BxC[..., None], axis=-1)[..., 0]

    # Best entries are compared by value: an argmax is many times slower than a max on a CPU.
    s_max_BxC, s_lse_BxC, s_target_BxC = s_BxCxV.max(-1), _logsumexp(s_BxCxV), target_logit(s_BxCxV)
    ce_BxC = s_lse_BxC - s_target_BxC
    loss_BxC = config.lm_weight * ce_BxC
    zero = jnp.zeros((), jnp.float32)
    kl, agree, teacher_ce, teacher_correct = zero, zero, zero, zero
    if t_BxCxV is not None:
        t_max_BxC, t_lse_BxC, t_target_BxC = t_BxCxV.max(-1), _logsumexp(t_BxCxV), target_logit(t_BxCxV)
        kl_BxC = _kl(t_BxCxV, t_lse_BxC, s_BxCxV, s_lse_BxC)
        both_best = (s_BxCxV == s_max_BxC[..., None]) & (t_BxCxV == t_max_BxC[..., None])
        kl, agree = total(kl_BxC), total(jnp.any(both_best, axis=-1))
        teacher_ce, teacher_correct = total(t_lse_BxC - t_target_BxC), total(t_target_BxC == t_max_BxC)
    if config.kd_weight:
        assert t_BxCxV is not None
        hot_s, hot_t = s_BxCxV / T, t_BxCxV / T
        hot_s_lse_BxC = s_lse_BxC if T == 1 else _logsumexp(hot_s)
        hot_t_lse_BxC = t_lse_BxC if T == 1 else _logsumexp(hot_t)
        hot_kl_BxC = kl_BxC if T == 1 else _kl(hot_t, hot_t_lse_BxC, hot_s, hot_s_lse_BxC)
        loss_BxC = loss_BxC + config.kd_weight * T**2 * hot_kl_BxC
    sums = LossSums(
        loss=total(loss_BxC),
        cross_entropy=total(ce_BxC),
        correct=total(s_target_BxC == s_max_BxC),
        kl=kl,
        agree=agree,
        teacher_cross_entropy=teacher_ce,
        teacher_correct=teacher_correct,
        count=mask.sum(),
    )
    if not with_gradient:
        return sums, None
    # d CE = softmax(s) - onehot; d (T^2 KL_T) = T (softmax(s / T) - softmax(t / T)).
    onehot = targets_BxC[..., None] == jnp.arange(s_BxCxV.shape[-1])[None, None]
    d_BxCxV = config.lm_weight * (jnp.exp(s_BxCxV - s_lse_BxC[..., None]) - onehot)
    if config.kd_weight:
        difference = jnp.exp(hot_s - hot_s_lse_BxC[..., None]) - jnp.exp(hot_t - hot_t_lse_BxC[..., None])
        d_BxCxV = d_BxCxV + config.kd_weight * T * difference
    return sums, d_BxCxV * mask[..., None]


def _logsumexp(logits_BxCxV: jax.Array) -> jax.Array:
    top_BxCx1 = logits_BxCxV.max(-1, keepdims=True)
    return jnp.log(jnp.exp(logits_BxCxV - top_BxCx1).sum(-1)) + top_BxCx1[..., 0]


def _kl(p_BxCxV: jax.Array, p_lse_BxC: jax.Array, q_BxCxV: jax.Array, q_lse_BxC: jax.Array) -> jax.Array:
    """KL(p || q) [B, C] in nats from logits and their logsumexp."""
    log_p = p_BxCxV - p_lse_BxC[..., None]
    return jnp.sum(jnp.exp(log_p) * (log_p - (q_BxCxV - q_lse_BxC[..., None])), axis=-1)
