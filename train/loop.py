"""A run from its config to finished weights: load or resume, step, show, validate, save."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import grain
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from falcon_relu.checkpoints.load import load_model
from falcon_relu.checkpoints.native import save_params
from falcon_relu.config import FalconConfig, family
from falcon_relu.errors import FalconError
from falcon_relu.model import Falcon, Params
from falcon_relu.progress import progress
from falcon_relu.sharding import init_params, make_mesh, use_mesh
from train.checkpoints import Checkpoints, writing
from train.config import TrainConfig
from train.data.batches import Batch, data_digests, read_manifests, read_teachers, train_batches, validation_batches
from train.distributed import Rows, Stopped, StopVote, stop_signals
from train.flops import model_flops
from train.folder import claim, finish, note_start, read_architecture, write_architecture
from train.state import TrainState, abstract_state, init_state, make_optimizer, state_shardings
from train.step import Metrics, make_train_step, make_validation_step
from train.validation import run_validation
from train.watch import Figures, RunLog, Samples, Trace, Watch


def run(config: TrainConfig, on_log: Callable[[Figures], None] | None = None) -> Figures:
    """Runs `config` to its end, or goes on with it where an earlier process stopped; a finished run returns at once.

    Every process of a run calls it (see `train.distributed.joined`). Leaves in `config.out`:

      config.json        the settings of the latest start
      architecture.json  what the student is
      starts.jsonl       a line each start: step, time, processes, mesh, device
      log.jsonl          a line each `log_every` steps, each validation, each set of samples
      tensorboard/       the same for TensorBoard, and traces
      checkpoints/       one folder a step
      weights/           the finished student, native, float32
      figures.json       the last validation, or the last step where there are no validation rows

    SIGTERM and Ctrl-C to any process save a checkpoint and stop all of them after the same step.

    Args:
      config: the run.
      on_log: called in process 0 with every line of the log as it is written, to draw curves, say.

    Returns:
      The content of `figures.json`.

    Raises:
      FalconError: an input is missing, changed or does not fit, `out` holds another run or cannot be written, or too
        many steps in a row were not finite. The run can go on once that is mended.
      Stopped: a signal came; the run can go on.
    """
    figures = claim(config)
    if figures is not None:
        return figures
    mesh = make_mesh(config.mesh)
    with (
        use_mesh(mesh),
        stop_signals() as asked,
        Checkpoints(config.out / "checkpoints", config.keep_checkpoints, config.keep_every) as saved,
    ):
        job, state, batches = _set_up(config, mesh, saved)
        first = int(jax.device_get(state.step))
        note_start(config, first, mesh)
        with RunLog(config.out, first, on_log) as log:
            state = _run_steps(job, state, batches, saved, log, StopVote(asked, mesh))
            figures = job.validate(state, config.steps, log) if job.has_validation else log.last
        with writing(f"the weights to {config.out}"):
            save_params(config.out / "weights", job.student.config, state.params, replace=True)
            finish(config.out, figures)
    return figures


@dataclasses.dataclass(frozen=True)
class _Job:
    """What stays the same from step to step."""

    config: TrainConfig
    rows: Rows
    data: dict[str, str]  # hashes of what the folders of the data hold
    has_validation: bool
    student: Falcon
    teacher: Falcon | None
    teacher_params: Params
    step_fn: Any
    validation_fn: Any

    def validate(self, state: TrainState, step: int, log: RunLog) -> Figures:
        """Means over the validation rows, logged."""
        rows, params = validation_batches(self.config.data, self.rows.own), (state.params, self.teacher_params)
        figures = run_validation(self.validation_fn, self.student, *params, rows, self.rows)
        log.validation(step, figures)
        return figures

    def facts(self, batches: grain.DatasetIterator[Batch]) -> dict[str, Any]:
        """What a checkpoint keeps beside the state. Nothing is drawn at random on the way: the seeds are settings."""
        return {"position": batches.get_state(), "data": self.data}

    def flops(self) -> float:
        """Model FLOPs of a step."""
        teacher = None if self.teacher is None else self.teacher.config
        return model_flops(self.student.config, teacher, self.config.data.batch_size, self.config.data.seq_len)


def _run_steps(
    job: _Job,
    state: TrainState,
    batches: grain.DatasetIterator[Batch],
    saved: Checkpoints,
    log: RunLog,
    vote: StopVote,
) -> TrainState:
    config, first = job.config, int(jax.device_get(state.step))
    watch, trace = Watch(config, log, job.flops()), Trace(config.out, config.profile)
    samples = Samples(config.samples, job.student, log, job.rows.parts) if config.samples.every else None
    pending: tuple[int, Metrics] | None = None
    tokens = config.data.batch_size * config.data.seq_len
    with progress(config.out.name, config.steps, "tokens", scale=tokens, done=first) as advance, trace:
        for step in range(first + 1, config.steps + 1):
            batch = job.rows.to_global(next(batches))
            trace.before(step - first)
            with jax.transfer_guard("disallow"):
                state, metrics = job.step_fn(state, batch, job.teacher_params)
            trace.after(step - first, metrics)
            if pending is not None:  # while this step runs, the one before is read
                advance(1, watch.read(*pending))
            pending = (step, metrics)
            stopping, last = vote(), step == config.steps
            if stopping or last or _due(step, config.checkpoint_every):
                advance(1, watch.read(*pending))  # so that the log has every step that a checkpoint holds
                pending = None
                saved.save(step, state, job.facts(batches))
            saved.check()
            if stopping:
                raise Stopped
            if job.has_validation and not last and _due(step, config.validate_every):
                job.validate(state, step, log)
            if samples is not None and _due(step, config.samples.every):
                samples.write(step, state.params)
    return state


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


# --- where a run starts ---


def _set_up(
    config: TrainConfig, mesh: Mesh, saved: Checkpoints
) -> tuple[_Job, TrainState, grain.DatasetIterator[Batch]]:
    manifests, data = read_manifests(config.data), data_digests(config.data)
    rows = Rows(mesh, config.data.batch_size)
    batches = train_batches(config.data, rows.own)
    optimizer = make_optimizer(config.optimizer, config.steps)
    architecture, state = _begin_or_go_on(config, mesh, optimizer, saved, batches, data)
    teacher, teacher_params = _teacher(config, mesh)
    _check_vocabularies(architecture, teacher, max(manifest.vocab_size for manifest in manifests))
    _check_cached_teacher(config, architecture)
    student = Falcon(
        architecture,
        jnp.dtype(config.compute_dtype),
        config.remat,
        config.query_chunk,
        start_activation=config.start_activation,
        attention=config.attention,
    )
    job = _Job(
        config=config,
        rows=rows,
        data=data,
        has_validation=any(manifest.splits["validation"].rows for manifest in manifests),
        student=student,
        teacher=teacher,
        teacher_params=teacher_params,
        step_fn=make_train_step(
            config.loss, student, teacher, optimizer, mesh, config.microbatches, config.activation_ramp
        ),
        validation_fn=make_validation_step(config.loss, student, teacher),
    )
    return job, state, batches


def _teacher(config: TrainConfig, mesh: Mesh) -> tuple[Falcon | None, Params]:
    if config.teacher is None:
        return None, None
    dtype = jnp.dtype(config.teacher_dtype)
    architecture, params = load_model(config.teacher, activation=config.teacher_activation, dtype=dtype, mesh=mesh)
    return Falcon(architecture, dtype, query_chunk=config.query_chunk, attention=config.attention), params


def _begin_or_go_on(
    config: TrainConfig,
    mesh: Mesh,
    optimizer: Any,
    saved: Checkpoints,
    batches: grain.DatasetIterator[Batch],
    data: dict[str, str],
) -> tuple[FalconConfig, TrainState]:
    """What the student is, and the state to go on from; moves `batches` to where that state stopped."""
    if not saved.steps():
        architecture, params = _initial_model(config, mesh)
        write_architecture(config.out, architecture)
        shardings = state_shardings(architecture, optimizer, mesh)
        return architecture, init_state(architecture, optimizer, params, shardings)
    architecture = read_architecture(config.out)
    shardings = state_shardings(architecture, optimizer, mesh)
    state, facts = saved.restore(abstract_state(architecture, optimizer, shardings))
    changed = [name for name in data | facts["data"] if data.get(name) != facts["data"].get(name)]
    if changed:
        raise FalconError(
            f"{config.out} began with other rows than are there now in: {', '.join(changed)}. They were prepared again "
            "or exchanged: bring the old ones back, or start a new run under another --out"
        )
    batches.set_state(facts["position"])
    return architecture, state


def _initial_model(config: TrainConfig, mesh: Mesh) -> tuple[FalconConfig, Params]:
    if config.model is not None:
        architecture = family(config.model)
        params = init_params(architecture, config.seed, mesh)
    else:
        assert config.init_from is not None
        architecture, params = load_model(config.init_from, activation=config.init_activation, mesh=mesh)
    if config.activation is not None:
        architecture = architecture.with_activation(config.activation, config.activation_shift)
    return architecture, params


def _check_vocabularies(student: FalconConfig, teacher: Falcon | None, data: int) -> None:
    if data > student.vocab_size:
        raise FalconError(f"the data's tokenizer has {data} entries, the model's vocabulary {student.vocab_size}")
    if teacher is not None and teacher.config.vocab_size != student.vocab_size:
        raise FalconError(f"vocabularies differ: teacher {teacher.config.vocab_size}, student {student.vocab_size}")


def _check_cached_teacher(config: TrainConfig, student: FalconConfig) -> None:
    for teacher in read_teachers(config.data)[:1]:
        if teacher.vocab_size != student.vocab_size:
            raise FalconError(f"vocabularies differ: cached teacher {teacher.vocab_size}, student {student.vocab_size}")
        if config.loss.kd_weight and config.loss.temperature not in (1, teacher.temperature):
            raise FalconError(
                f"the teacher's cache {config.data.teacher_cache} was written for the temperatures 1 and "
                f"{teacher.temperature}, the loss wants {config.loss.temperature}: change --loss.temperature, or write "
                "the cache again with that --temperature"
            )
