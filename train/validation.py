"""Metrics on held-out rows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from falcon_relu.checkpoints.load import load_model
from falcon_relu.config import Activation, FalconConfig
from falcon_relu.errors import FalconError
from falcon_relu.model import Falcon, Params
from falcon_relu.sharding import make_mesh, use_mesh
from train.data.batches import Batch, DataConfig, Manifests, validation_batches
from train.data.rows import Rows
from train.folder.log import MetricValues
from train.loss import LossConfig
from train.step import make_validation_step, means
from train.watch import to_host


def run_validation(
    validation_fn: Any,
    student: Falcon,
    params: Params,
    teacher_params: Params,
    batches: Iterable[Batch],
    rows: Rows,
) -> MetricValues:
    """Means over all rows of `batches`, as `train.step.means` names them."""
    total: Any = None
    pending: Any = None
    for batch in batches:
        sums = validation_fn(params, rows.to_global(batch), teacher_params)
        total = _added(total, pending)  # while this batch runs, the one before is read
        pending = sums
    sums, active_L = _added(total, pending)
    return to_host(means(sums, active_L, student.config.d_ff))


def _added(total: Any, sums: Any) -> Any:
    """The total on the host; None stands for nothing yet."""
    if sums is None:
        return total
    sums = jax.device_get(sums)
    return sums if total is None else jax.tree.map(np.add, total, sums)


def validate(
    source: str | Path,
    data: DataConfig,
    *,
    source_activation: Activation | None = None,
    activation: Activation | None = None,
    teacher: str | Path | None = None,
    teacher_activation: Activation | None = None,
    loss: LossConfig | None = None,
    mesh: Mesh | None = None,
) -> MetricValues:
    """Held-out metrics of a stored model in float32; see `run_validation`.

    Args:
      source: the model, as for `load_model`.
      data: its validation rows are read.
      source_activation: the activation that it was trained with, where its Hugging Face config does not state it.
      activation: run it under another activation: the swapped but untuned student.
      teacher: model to compare with.
      teacher_activation: as `source_activation`, of the teacher.
      loss: what "loss" is; cross-entropy alone by default.
      mesh: devices; all of them along fsdp by default.

    Raises:
      FalconError: as `load_model`, or the two models do not share a vocabulary.
    """
    mesh = mesh or make_mesh()
    with use_mesh(mesh):
        student, params = _open(source, source_activation, activation, mesh)
        taught = None if teacher is None else _open(teacher, teacher_activation, None, mesh)
        return measure_held_out(student, params, data, teacher=taught, loss=loss, mesh=mesh)


def _open(
    source: str | Path, stated: Activation | None, activation: Activation | None, mesh: Mesh
) -> tuple[Falcon, Params]:
    config, params = load_model(source, activation=stated, mesh=mesh)
    return Falcon(config if activation is None else config.with_activation(activation)), params


def measure_held_out(
    student: Falcon,
    params: Params,
    data: DataConfig,
    *,
    mesh: Mesh,
    teacher: tuple[Falcon, Params] | None = None,
    loss: LossConfig | None = None,
    manifests: Manifests | None = None,
) -> MetricValues:
    """Held-out metrics of a model, computed in its dtype, on a mesh, which is the current one; see `run_validation`.

    Args:
      student: the model.
      params: its parameters.
      data: its validation rows are read.
      mesh: the devices.
      teacher: model to compare with, and its parameters.
      loss: what "loss" is; cross-entropy alone by default.
      manifests: `read_manifests(data)`, if the caller has it.

    Raises:
      FalconError: the two models do not share a vocabulary, or the batch cannot be divided among the devices.
    """
    teacher_model, teacher_params = teacher or (None, None)
    if teacher_model is not None:
        check_same_vocabulary(teacher_model.config, student.config)
    rows = Rows(mesh, data.batch_size)
    step = make_validation_step(loss or LossConfig(), student, teacher_model)
    batches = validation_batches(data, rows.own, manifests)
    return run_validation(step, student, params, teacher_params, batches, rows)


def check_same_vocabulary(teacher: FalconConfig, student: FalconConfig) -> None:
    """Refuses a teacher that cannot be compared with the model, token by token.

    Raises:
      FalconError: the sizes of their vocabularies differ.
    """
    if teacher.vocab_size != student.vocab_size:
        raise FalconError(
            f"the teacher has a vocabulary of {teacher.vocab_size:,}, the model one of {student.vocab_size:,}: a "
            "teacher must share its student's tokens"
        )
