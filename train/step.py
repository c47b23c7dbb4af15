"""The training step and the validation step: pure functions of (state, batch, teacher)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from falcon_relu.model import Falcon, Params, head_kernel
from falcon_relu.sharding import batch_sharding, param_shardings
from train.data import Batch
from train.loss import LossConfig, LossSums, distillation_loss, next_tokens
from train.state import TrainState, state_shardings

Metrics = dict[str, jax.Array]


def loss_and_sums(
    loss: LossConfig, student: Falcon, params: Params, batch: Batch, teacher: Falcon | None, teacher_params: Params
) -> tuple[jax.Array, tuple[LossSums, jax.Array]]:
    """The summed loss of a batch, and (sums, active neurons of each layer summed over tokens [L] float32).

    Args:
      loss: weights, temperature, chunk.
      student: the model that learns.
      params: its parameters.
      batch: rows of tokens, [B, T] each.
      teacher: the model to distil from, if any.
      teacher_params: its parameters.
    """
    rows: Any = batch
    tokens, positions, segments = rows["tokens_BxT"], rows["positions_BxT"], rows["segment_ids_BxT"]
    targets_BxT, mask_BxT = next_tokens(tokens, segments)
    hidden_BxTxD, sown = student.apply(
        {"params": params}, tokens, positions, segments, method="hidden", mutable=["statistics"]
    )
    taught = None
    if teacher is not None:
        t_hidden: Any = teacher.apply({"params": teacher_params}, tokens, positions, segments, method="hidden")
        taught = (t_hidden, head_kernel(teacher.config, teacher_params))
    sums = distillation_loss(loss, hidden_BxTxD, head_kernel(student.config, params), targets_BxT, mask_BxT, taught)
    active_LxBxT = sown["statistics"]["layers"]["mlp"]["active"]
    active_L = jnp.sum(active_LxBxT * mask_BxT[None], axis=(1, 2), dtype=jnp.float32)
    return sums.loss, (sums, active_L)


def means(sums: LossSums, active_L: jax.Array, n_neurons: int, has_teacher: bool) -> Metrics:
    """Sums over positions as the means that people read; zeros [L] is the share of neurons that are zero."""
    count = jnp.maximum(sums.count, 1)
    metrics = {
        "loss": sums.loss / count,
        "cross_entropy": sums.cross_entropy / count,
        "accuracy": sums.correct / count,
        "zeros": 1 - active_L / (count * n_neurons),
        "count": sums.count,
    }
    if has_teacher:
        metrics |= {
            "kl": sums.kl / count,
            "agreement": sums.agree / count,
            "teacher_cross_entropy": sums.teacher_cross_entropy / count,
            "teacher_accuracy": sums.teacher_correct / count,
        }
    return metrics


def make_train_step(
    loss: LossConfig,
    student: Falcon,
    teacher: Falcon | None,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    microbatches: int = 1,
) -> Callable[[TrainState, Batch, Params], tuple[TrainState, Metrics]]:
    """The jitted step (state, batch, teacher parameters) -> (state, metrics); the state is donated.

    The loss is the mean over the positions of the whole batch, however many microbatches it is worked through in. A
    step whose loss or gradient norm is not finite changes neither parameters nor optimizer state and is counted.
    """

    def gradient(params: Params, batch: Batch, teacher_params: Params) -> tuple[Params, tuple[LossSums, jax.Array]]:
        def objective(params: Params) -> Any:
            return loss_and_sums(loss, student, params, batch, teacher, teacher_params)

        return jax.grad(objective, has_aux=True)(params)

    def accumulated(params: Params, batch: Batch, teacher_params: Params) -> Any:
        if microbatches == 1:
            return gradient(params, batch, teacher_params)
        pieces = jax.tree.map(lambda x: x.reshape(-1, microbatches, x.shape[1]).swapaxes(0, 1), batch)

        def add(total: Any, piece: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(params, piece, teacher_params)), None

        first = jax.tree.map(lambda x: x[0], pieces)
        shapes = jax.eval_shape(gradient, params, first, teacher_params)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.scan(add, zeros, pieces)[0]

    def step(state: TrainState, batch: Batch, teacher_params: Params) -> tuple[TrainState, Metrics]:
        grads, (sums, active_L) = accumulated(state.params, batch, teacher_params)
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
        metrics = means(sums, active_L, student.config.d_ff, teacher is not None)
        metrics |= {"gradient_norm": norm, "bad_steps": state.bad_steps, "skipped": state.skipped}
        return state, metrics

    shardings = state_shardings(student.config, optimizer, mesh)
    batch = batch_sharding(mesh)
    taught = None if teacher is None else param_shardings(teacher.config, mesh)
    return jax.jit(step, in_shardings=(shardings, batch, taught), out_shardings=(shardings, None), donate_argnums=0)


def make_validation_step(
    loss: LossConfig, student: Falcon, teacher: Falcon | None
) -> Callable[[Params, Batch, Params], tuple[LossSums, jax.Array]]:
    """The jitted (parameters, batch, teacher parameters) -> (sums, active neurons [L]), without gradients."""

    def step(params: Params, batch: Batch, teacher_params: Params) -> tuple[LossSums, jax.Array]:
        return loss_and_sums(loss, student, params, batch, teacher, teacher_params)[1]

    return jax.jit(step)
