"""The training step and the validation step: pure functions of (state, batch, teacher)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from falcon_relu.model import Falcon, Params, head_kernel, next_tokens
from falcon_relu.sharding import batch_sharding, param_shardings, working_copy
from train.data.batches import Batch
from train.loss import (
    CachedTeacher,
    LossConfig,
    LossSums,
    OnlineTeacher,
    Teacher,
    distillation_loss,
    l1_weight,
)
from train.state import TrainState, state_shardings

Metrics = dict[str, jax.Array]


def loss_and_sums(
    loss: LossConfig,
    student: Falcon,
    params: Params,
    batch: Batch,
    teacher: Falcon | None,
    teacher_params: Params,
    step: jax.Array | None = None,
    ramp: jax.Array | None = None,
) -> tuple[jax.Array, tuple[LossSums, jax.Array]]:
    """The summed loss of a batch, and (sums, active neurons of each layer summed over tokens [L] float32).

    Args:
      loss: weights, temperature, chunk.
      student: the model that learns.
      params: its parameters.
      batch: tokens, positions and segments, [B, T] each, and a cached teacher's targets, if there is one.
      teacher: the model to distil from, if any.
      teacher_params: its parameters.
      step: updates done so far, which the L1 term's weight depends on; without it that term is left out.
      ramp: weight of the student's own activation against its start activation, see `Falcon.hidden`.
    """
    rows: Any = batch
    tokens, positions, segments = rows["tokens_BxT"], rows["positions_BxT"], rows["segment_ids_BxT"]
    targets_BxT, mask_BxT = next_tokens(tokens, segments)
    weight = l1_weight(loss.l1_stages, step) if loss.l1_stages and step is not None else None
    hidden_BxTxD, sown = student.apply(
        {"params": params},
        tokens,
        positions,
        segments,
        activation_ramp=ramp,
        method="hidden",
        mutable=["statistics"] if weight is None else ["statistics", "magnitudes"],
    )
    soft: Teacher | None = None
    if teacher is not None:
        t_hidden: Any = teacher.apply({"params": teacher_params}, tokens, positions, segments, method="hidden")
        soft = OnlineTeacher(t_hidden, head_kernel(teacher.config, teacher_params))
    elif "teacher" in rows:
        soft = CachedTeacher(**rows["teacher"])
    sums = distillation_loss(loss, hidden_BxTxD, head_kernel(student.config, params), targets_BxT, mask_BxT, soft)
    if weight is not None:
        l1 = jnp.sum(sown["magnitudes"]["layers"]["mlp"]["mean"].mean(0) * mask_BxT)
        sums = dataclasses.replace(sums, loss=sums.loss + weight * l1, l1=l1)
    active_LxBxT = sown["statistics"]["layers"]["mlp"]["active"]
    active_L = jnp.sum(active_LxBxT * mask_BxT[None], axis=(1, 2), dtype=jnp.float32)
    return sums.loss, (sums, active_L)


def means(sums: LossSums, active_L: jax.Array, n_neurons: int) -> Metrics:
    """Metrics of a batch: the sums divided by their count; zeros [L] is the share of neurons that are zero."""
    named = {
        "loss": sums.loss,
        "cross_entropy": sums.cross_entropy,
        "accuracy": sums.correct,
        "kl": sums.kl,
        "agreement": sums.agree,
        "teacher_cross_entropy": sums.teacher_cross_entropy,
        "teacher_accuracy": sums.teacher_correct,
        "l1": sums.l1,
    }
    count = jnp.maximum(sums.count, 1)
    metrics = {name: value / count for name, value in named.items() if value is not None}
    return metrics | {"zeros": 1 - active_L / (count * n_neurons), "count": sums.count}


def make_train_step(
    loss: LossConfig,
    student: Falcon,
    teacher: Falcon | None,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    microbatches: int = 1,
    activation_ramp: tuple[int, int] = (0, 0),
) -> Callable[[TrainState, Batch, Params], tuple[TrainState, Metrics]]:
    """The jitted step (state, batch, teacher parameters) -> (state, metrics); the state is donated.

    The loss is the mean over the positions of the whole batch, whatever the number of microbatches. A step whose loss
    or gradient norm is not finite changes neither parameters nor optimizer state and is counted.

    Args:
      loss: weights, temperature, chunk, stages of the L1 term.
      student: the model that learns.
      teacher: the model to distil from, if it runs in the step; the targets of a cached teacher are in the batch.
      optimizer: applied to the mean gradient.
      mesh: devices.
      microbatches: number of pieces that a batch is split into, processed one after the other.
      activation_ramp: (begin, end): up to step `begin` the student has its `start_activation`, from `end` on its own,
        between them a linear blend.
    """

    def gradient(
        params: Params, batch: Batch, teacher_params: Params, step: jax.Array
    ) -> tuple[Params, tuple[LossSums, jax.Array]]:
        def objective(params: Params) -> Any:
            ramp = None if student.start_activation is None else _ramp(activation_ramp, step)
            return loss_and_sums(loss, student, params, batch, teacher, teacher_params, step, ramp)

        grads, sums = jax.grad(objective, has_aux=True)(params)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        return jax.lax.with_sharding_constraint(grads, shardings.params), sums

    def accumulated(params: Params, batch: Batch, teacher_params: Params, step: jax.Array) -> Any:
        if microbatches == 1:
            return gradient(params, batch, teacher_params, step)
        pieces = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)

        def add(total: Any, piece: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(params, piece, teacher_params, step)), None

        first = jax.tree.map(lambda x: x[0], pieces)
        shapes = jax.eval_shape(gradient, params, first, teacher_params, step)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.scan(add, zeros, pieces)[0]

    def step(state: TrainState, batch: Batch, teacher_params: Params) -> tuple[TrainState, Metrics]:
        copy = working_copy(student.config, state.params, student.dtype)
        grads, (sums, active_L) = accumulated(copy, batch, teacher_params, state.step)
        grads = jax.tree.map(lambda g: g / jnp.maximum(sums.count, 1), grads)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(norm) & jnp.isfinite(sums.loss)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

        def keep_if_bad(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)

        state = TrainState(
            step=state.step + 1,
            params=keep_if_bad(params, state.params),
            opt_state=keep_if_bad(opt_state, state.opt_state),
            bad_steps=jnp.where(good, 0, state.bad_steps + 1),
            skipped=state.skipped + ~good,
        )
        metrics = means(sums, active_L, student.config.d_ff)
        metrics |= {"gradient_norm": norm, "bad_steps": state.bad_steps, "skipped": state.skipped}
        return state, metrics

    shardings = state_shardings(student.config, optimizer, mesh)
    batch = batch_sharding(mesh)
    of_teacher = None if teacher is None else param_shardings(teacher.config, mesh)
    everywhere = shardings.step  # metrics can be read in every process
    return jax.jit(
        step, in_shardings=(shardings, batch, of_teacher), out_shardings=(shardings, everywhere), donate_argnums=0
    )


def make_validation_step(
    loss: LossConfig, student: Falcon, teacher: Falcon | None
) -> Callable[[Params, Batch, Params], tuple[LossSums, jax.Array]]:
    """The jitted (parameters, batch, teacher parameters) -> (sums, active neurons [L]), without gradients."""

    def step(params: Params, batch: Batch, teacher_params: Params) -> tuple[LossSums, jax.Array]:
        copy = working_copy(student.config, params, student.dtype)
        return loss_and_sums(loss, student, copy, batch, teacher, teacher_params)[1]

    return jax.jit(step)


def _ramp(between: tuple[int, int], step: jax.Array) -> jax.Array:
    """0 up to step `between[0]`, 1 from step `between[1]` on, linear between them; float32 scalar."""
    begin, end = between
    share = jnp.clip((step - begin) / (end - begin), 0, 1) if end > begin else step >= end
    return share.astype(jnp.float32)
