"""Metrics on held-out rows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from falcon_relu.checkpoints.load import load_model
from falcon_relu.config import Activation
from falcon_relu.errors import FalconError
from falcon_relu.model import Falcon, Params
from falcon_relu.sharding import make_mesh, use_mesh
from train.data.batches import Batch, DataConfig, validation_batches
from train.distributed import Rows
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
    loss = loss or LossConfig()
    mesh = mesh or make_mesh()
    rows = Rows(mesh, data.batch_size)
    with use_mesh(mesh):
        config, params = load_model(source, activation=source_activation, mesh=mesh)
        student = Falcon(config if activation is None else config.with_activation(activation))
        teacher_model, teacher_params = None, None
        if teacher is not None:
            teacher_config, teacher_params = load_model(teacher, activation=teacher_activation, mesh=mesh)
            if teacher_config.vocab_size != config.vocab_size:
                raise FalconError(
                    f"{teacher} has a vocabulary of {teacher_config.vocab_size:,}, {source} one of "
                    f"{config.vocab_size:,}: a teacher must share its student's tokens"
                )
            teacher_model = Falcon(teacher_config)
        step = make_validation_step(loss, student, teacher_model)
        batches = validation_batches(data, rows.own)
        return run_validation(step, student, params, teacher_params, batches, rows)
