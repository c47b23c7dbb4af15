"""What a run carries from step to step: parameters, optimizer state, counters; and how they lie on a mesh."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from falcon_relu.config import FalconConfig
from falcon_relu.errors import FalconError
from falcon_relu.model import Params
from falcon_relu.sharding import abstract_params, param_shardings
from train.config import OptimizerConfig


@struct.dataclass
class TrainState:
    """The state of a run; also the shape of trees that say something of every leaf (shardings, shapes).

    Attributes:
      step: updates asked for so far, skipped ones included; int32 scalar.
      params: float32 parameters.
      opt_state: the optimizer's state, float32, sharded like the parameters.
      bad_steps: updates skipped in a row, because the loss or a gradient was not finite; int32 scalar.
      skipped: updates skipped in all; int32 scalar.
    """

    step: Any
    params: Params
    opt_state: Any
    bad_steps: Any
    skipped: Any


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then cosine decay over the rest of `steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup_steps else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=steps,
        end_value=config.final_learning_rate,
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping, then AdamW; norms and biases are not decayed."""

    def decayed(params: Params) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: path[-1].key != "scale" and not path[-1].key.endswith("bias"), params
        )

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate_schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )


def state_shardings(config: FalconConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The sharding of every leaf of a TrainState: moments like their parameters, counters on every device.

    Raises:
      FalconError: fsdp divides neither D nor F, so that nothing of it could be split.
    """
    n, D, F = mesh.shape["fsdp"], config.d_model, config.d_ff
    if D % n and F % n:
        raise FalconError(
            f"fsdp {n} divides neither D {D} nor F {F}: every device would hold all parameters; choose "
            f"{math.gcd(n, D)} along fsdp and {n // math.gcd(n, D)} times as many along data"
        )
    params = param_shardings(config, mesh, at_rest=True)
    everywhere = NamedSharding(mesh, PartitionSpec())
    opt_state = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, abstract_params(config)),
        params,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(everywhere, params, opt_state, everywhere, everywhere)


def init_state(
    config: FalconConfig, optimizer: optax.GradientTransformation, params: Params, shardings: TrainState
) -> TrainState:
    """The state before the first step, from float32 parameters that it takes over."""
    params = jax.device_put(params, shardings.params)
    opt_state = moments_program(optimizer, shardings)(params)
    zero = jax.jit(lambda: jnp.zeros((), jnp.int32), out_shardings=shardings.step)
    return TrainState(step=zero(), params=params, opt_state=opt_state, bad_steps=zero(), skipped=zero())


def moments_program(optimizer: optax.GradientTransformation, shardings: TrainState) -> Any:
    """The jitted (parameters) -> the optimizer's state before the first step."""
    return jax.jit(optimizer.init, out_shardings=shardings.opt_state)


@functools.partial(jax.jit, static_argnums=1)
def teacher_copy(params: Params, dtype: Any) -> Params:
    """The parameters in another dtype, in memory of their own: the student's are updated in place."""
    return jax.tree.map(lambda w: jnp.copy(w).astype(dtype), params)


def abstract_state(config: FalconConfig, optimizer: optax.GradientTransformation, shardings: TrainState) -> TrainState:
    """Shape, dtype and sharding of every leaf, for restoring a checkpoint or compiling ahead of time."""
    count = jax.ShapeDtypeStruct((), jnp.int32)
    params = abstract_params(config)
    shapes = TrainState(count, params, jax.eval_shape(optimizer.init, params), count, count)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )
