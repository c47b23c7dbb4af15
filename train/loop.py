"""A run from its config to finished weights: load, resume, step, log, validate, save."""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from falcon_relu.checkpoint import load_model
from falcon_relu.config import Activation, FalconConfig, family
from falcon_relu.errors import FalconError
from falcon_relu.files import read_json, write_json
from falcon_relu.model import Falcon, Params
from falcon_relu.native import save_params
from falcon_relu.progress import progress
from falcon_relu.sharding import batch_sharding, init_params, make_mesh, use_mesh
from train.checkpoints import Checkpoints
from train.config import TrainConfig
from train.data import Batch, DataConfig, read_manifests, train_batches, validation_batches
from train.loss import LossConfig
from train.state import abstract_state, init_state, make_optimizer, state_shardings
from train.step import Metrics, make_train_step, make_validation_step, means

Figures = dict[str, Any]


def train(config: TrainConfig) -> Figures:
    """Runs `config` to its end, or goes on with it where an earlier process stopped; a finished run returns at once.

    Leaves in `config.out`: `config.json`, `log.jsonl` (a line each `log_every` steps and each validation), `weights/`
    (native, float32) and `figures.json` (the last validation, or the last step where there are no validation rows).
    SIGTERM and Ctrl-C save a checkpoint after the step under way.

    Returns:
      The content of `figures.json`.

    Raises:
      FalconError: an input is missing or does not fit, `out` holds another run, or too many steps in a row were not
        finite.
      KeyboardInterrupt: SIGTERM or Ctrl-C came; the run can go on.
    """
    _claim(config)
    finished = config.out / "figures.json"
    if finished.exists():
        return read_json(finished)
    manifests = read_manifests(config.data)
    mesh = make_mesh(config.mesh)
    dtype, teacher_dtype = jnp.dtype(config.compute_dtype), jnp.dtype(config.teacher_dtype)
    with (
        use_mesh(mesh),
        stop_signals() as stopped,
        Checkpoints(config.out / "checkpoints", config.keep_checkpoints) as saved,
    ):
        architecture, params = _start(config, mesh)
        teacher, teacher_params = None, None
        if config.teacher is not None:
            teacher_config, teacher_params = load_model(
                config.teacher, activation=config.teacher_activation, dtype=teacher_dtype, mesh=mesh
            )
            teacher = Falcon(teacher_config, teacher_dtype, query_chunk=config.query_chunk)
        _check_vocabularies(
            architecture, teacher.config if teacher else None, max(manifest.vocab_size for manifest in manifests)
        )
        student = Falcon(architecture, dtype, config.remat, config.query_chunk)

        optimizer = make_optimizer(config.optimizer, config.steps)
        shardings = state_shardings(architecture, optimizer, mesh)
        batches = train_batches(config.data, jax.process_index(), jax.process_count())
        if saved.latest is None:
            state = init_state(architecture, optimizer, params, shardings)
        else:
            del params
            state, position = saved.restore(abstract_state(architecture, optimizer, shardings))
            batches.set_state(position)
        step_fn = make_train_step(config.loss, student, teacher, optimizer, mesh, config.microbatches)
        validation_fn = make_validation_step(config.loss, student, teacher)

        def validated(step: int) -> Figures:
            rows = validation_batches(config.data, jax.process_index(), jax.process_count())
            figures = run_validation(validation_fn, student, teacher, state.params, teacher_params, rows, mesh)
            _log(config.out, {"step": step, "validation": figures})
            return figures

        first = int(state.step)
        has_validation = any(manifest.splits["validation"].rows for manifest in manifests)
        pending: tuple[int, Metrics] | None = None
        tokens_per_step = config.data.batch_size * config.data.seq_len
        watch = _Watch(config, tokens_per_step)
        with progress(config.out.name, config.steps, "tokens", scale=tokens_per_step, done=first) as advance:
            for step in range(first + 1, config.steps + 1):
                batch = _to_global(next(batches), mesh)
                state, metrics = step_fn(state, batch, teacher_params)
                if pending is not None:  # while this step runs, the one before is read
                    advance(1, watch.read(*pending))
                pending = (step, metrics)
                last = step == config.steps
                if stopped() or last or (config.checkpoint_every and step % config.checkpoint_every == 0):
                    saved.save(step, state, batches.get_state())
                if stopped():
                    raise KeyboardInterrupt
                if has_validation and config.validate_every and step % config.validate_every == 0 and not last:
                    validated(step)
            if pending is not None:
                advance(1, watch.read(*pending))
        figures = validated(config.steps) if has_validation else dict(watch.last)
        save_params(config.out / "weights", architecture, state.params, replace=True)
    write_json(finished, figures)
    return figures


def run_validation(
    validation_fn: Any,
    student: Falcon,
    teacher: Falcon | None,
    params: Params,
    teacher_params: Params,
    batches: Iterable[Batch],
    mesh: Mesh,
) -> Figures:
    """Means over all rows of `batches`, as `train.step.means` names them."""
    each = (validation_fn(params, _to_global(batch, mesh), teacher_params) for batch in batches)
    sums, active_L = functools.reduce(functools.partial(jax.tree.map, jnp.add), each)
    return _host(means(sums, active_L, student.config.d_ff, teacher is not None))


def validate(
    source: str | Path,
    data: DataConfig,
    *,
    activation: Activation | None = None,
    teacher: str | Path | None = None,
    loss: LossConfig | None = None,
    mesh: Mesh | None = None,
) -> Figures:
    """Held-out figures of a stored model in float32; see `run_validation`.

    Args:
      source: the model, as for `load_model`.
      data: its validation rows are read.
      activation: run it under another activation: the swapped but untuned student.
      teacher: model to compare with.
      loss: what "loss" is; cross-entropy alone by default.
      mesh: devices; all of them along fsdp by default.
    """
    loss = loss or LossConfig()
    mesh = mesh or make_mesh()
    with use_mesh(mesh):
        config, params = load_model(source, mesh=mesh)
        student = Falcon(config if activation is None else config.with_activation(activation))
        teacher_model, teacher_params = None, None
        if teacher is not None:
            teacher_config, teacher_params = load_model(teacher, mesh=mesh)
            teacher_model = Falcon(teacher_config)
        step = make_validation_step(loss, student, teacher_model)
        rows = validation_batches(data, jax.process_index(), jax.process_count())
        return run_validation(step, student, teacher_model, params, teacher_params, rows, mesh)


@contextlib.contextmanager
def stop_signals() -> Iterator[Any]:
    """Yields a function that tells whether SIGTERM or Ctrl-C came; a second Ctrl-C stops at once."""
    came: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Watch:
    """Reads a step's metrics on the host, logs them, and stops a run that has gone wrong."""

    def __init__(self, config: TrainConfig, tokens_per_step: int):
        self.last: Figures = {}
        self._config = config
        self._tokens_per_step = tokens_per_step
        self._since = (0, time.perf_counter())

    def read(self, step: int, metrics: Metrics) -> str | None:
        bad = int(metrics["bad_steps"])
        if bad >= self._config.max_bad_steps:
            raise FalconError(
                f"{self._config.out}: the loss or gradient of {bad} steps in a row, up to step {step}, was not finite; "
                "lower the learning rate, or go back to an earlier checkpoint"
            )
        if step % self._config.log_every and step != self._config.steps:
            return None
        self.last = _host(metrics)
        before, then = self._since
        self._since = (step, time.perf_counter())
        rate = (step - before) * self._tokens_per_step / (self._since[1] - then)
        _log(self._config.out, {"step": step, "tokens_per_second": rate} | self.last)
        kl = f" kl {self.last['kl']:.3f}" if "kl" in self.last else ""
        return f"loss {self.last['cross_entropy']:.3f}{kl} zeros {np.mean(self.last['zeros']):.0%}"


def _start(config: TrainConfig, mesh: Mesh) -> tuple[FalconConfig, Params]:
    if config.model is not None:
        architecture = family(config.model)
        params = init_params(architecture, config.seed, mesh)
    else:
        assert config.init_from is not None
        architecture, params = load_model(config.init_from, activation=config.init_activation, mesh=mesh)
    if config.activation is not None:
        architecture = architecture.with_activation(config.activation, config.activation_shift)
    return architecture, params


def _claim(config: TrainConfig) -> None:
    """Makes the run's folder, or makes sure that it is this run's."""
    path, wanted = config.out / "config.json", config.as_json()
    if not path.exists():
        write_json(path, wanted)
        return
    found = read_json(path)
    changed = [name for name in wanted if found.get(name) != wanted[name]]
    if changed:
        raise FalconError(
            f"{config.out} holds a run with other settings ({', '.join(changed)}); choose another --out, or remove it"
        )


def _check_vocabularies(student: FalconConfig, teacher: FalconConfig | None, data: int) -> None:
    if data > student.vocab_size:
        raise FalconError(f"the data's tokenizer has {data} entries, the model's vocabulary {student.vocab_size}")
    if teacher is not None and teacher.vocab_size != student.vocab_size:
        raise FalconError(f"vocabularies differ: teacher {teacher.vocab_size}, student {student.vocab_size}")


def _to_global(batch: Batch, mesh: Mesh) -> Batch:
    """This process's rows as its part of global arrays over the mesh."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)


def _host(metrics: Metrics) -> Figures:
    return {name: np.asarray(value).tolist() for name, value in jax.device_get(metrics).items()}


def _log(out: Path, line: Figures) -> None:
    if jax.process_index() == 0:
        with (out / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
