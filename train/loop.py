"""One training run: from its config, or its newest checkpoint, through all steps to the finished weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
from jax.sharding import Mesh

from falcon_relu.checkpoints.load import load_config, load_model
from falcon_relu.checkpoints.native import save_params
from falcon_relu.config import family
from falcon_relu.errors import FalconError
from falcon_relu.model import Params
from falcon_relu.progress import progress
from falcon_relu.sharding import init_params, make_mesh, use_mesh
from train.config import TrainConfig, deciding_settings
from train.data.batches import Batch, Manifests, read_manifests, train_batches, validation_batches
from train.data.rows import Rows
from train.distributed import StopVote, reached, wait_for_all
from train.folder.checkpoints import Checkpoints, writing
from train.folder.claim import claim, finish, finished_metrics, held, note_start, read_architecture, write_architecture
from train.folder.log import MetricValues, RunLog
from train.job import Job, make_job
from train.processes import signals
from train.processes.signals import Stopped
from train.state import TrainState, init_state, teacher_copy
from train.step import Metrics
from train.validation import run_validation
from train.watch import Samples, Trace, Watch


def run(config: TrainConfig, on_log: Callable[[MetricValues], None] | None = None) -> MetricValues:
    """Runs `config` to its end, resuming where an earlier process stopped; a finished run returns at once.

    Every process of a run calls it (see `train.distributed.joined`). Leaves in `config.out`:

      config.json        the settings of the latest start
      architecture.json  the student's config
      starts.jsonl       a line for each start: step, time, processes, mesh, device
      log.jsonl          a line every `log_every` steps, and for each validation and each set of samples
      tensorboard/       the same for TensorBoard, and profiler traces
      checkpoints/       a folder for each checkpoint, named by its step
      weights/           the finished student, native, float32
      metrics.json       the last validation, or the last step where there are no validation rows

    SIGTERM and Ctrl-C to any process save a checkpoint and stop all of them after the same step. In `falcon-relu train`
    they end the processes at once, in whatever they are, before this start's first step: there is nothing to save yet.

    Args:
      config: the run.
      on_log: called in process 0 with each line of the log once it is written, for example to draw curves.

    Returns:
      The content of `metrics.json`.

    Raises:
      FalconError: an input is missing, was changed or does not fit the model; `out` holds another run or cannot be
        written; or the loss or a gradient was not finite for too many steps in a row. The run can be resumed after
        that is fixed.
      Stopped: a signal came; the run can be resumed.
    """
    with signals.stop_signals() as asked, held(config.out):
        metrics = finished_metrics(config)
        if metrics is not None:
            return metrics
        mesh = make_mesh(config.mesh)
        with use_mesh(mesh):
            prepared = _prepare(config, mesh)
            claim(config)
            with Checkpoints(config.out / "checkpoints", config.keep_checkpoints, config.keep_every) as saved:
                return _train(prepared, saved, StopVote(asked, mesh), on_log)


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """All that a run needs except the parameters, which take most of the memory and are loaded last.

    Attributes:
      job: models, functions and shardings of the run.
      manifests: manifests of the data.
      rows: which rows of a training batch this process reads.
      validation_rows: the same for a batch of validation rows.
      batches: the training batches; resuming moves them to where the checkpoint was written.
      samples: generates sample texts; None if the run has none.
      resumes: whether the run starts from a checkpoint.
    """

    job: Job
    manifests: Manifests
    rows: Rows
    validation_rows: Rows
    batches: grain.DatasetIterator[Batch]
    samples: Samples | None
    resumes: bool


def _prepare(config: TrainConfig, mesh: Mesh) -> _Prepared:
    """Reads the configs and manifests; raises FalconError if model, data and devices do not fit each other."""
    manifests = read_manifests(config.data)
    resumes = Checkpoints.exist(config.out / "checkpoints")
    job = make_job(
        config,
        mesh,
        lambda source, activation: load_config(source, activation=activation),
        manifests=manifests,
        student=read_architecture(config.out) if resumes else None,
    )
    rows = Rows(mesh, config.data.batch_size)
    return _Prepared(
        job=job,
        manifests=manifests,
        rows=rows,
        validation_rows=Rows(mesh, job.microbatch),
        batches=train_batches(config.data, rows.own, manifests),
        samples=Samples(config.samples, job.student, mesh) if config.samples.every else None,
        resumes=resumes,
    )


def _train(
    prepared: _Prepared, saved: Checkpoints, vote: StopVote, on_log: Callable[[MetricValues], None] | None
) -> MetricValues:
    job, config = prepared.job, prepared.job.config
    reached("the start of the student", together=False)
    state, teacher_params = (_restored(prepared, saved), None) if prepared.resumes else _fresh(job)
    reached("the loading of the teacher", together=False)
    if teacher_params is None:
        teacher_params = _load_teacher(job)
    if vote.at_once():
        raise Stopped  # there is nothing to save yet
    first = int(jax.device_get(state.step))
    note_start(config, first, job.mesh)
    with RunLog(config.out, first, on_log) as log:
        loop = _Loop(prepared, teacher_params, saved, log, vote)
        state = loop.steps(state)
        metrics = loop.validate(state, config.steps) if prepared.manifests.rows("validation") else log.last
    reached("the weights at the end", together=False)
    with writing(f"the weights to {config.out}"):
        save_params(config.out / "weights", job.student.config, state.params, replace=True)
        finish(config.out, metrics)
    return metrics


class _Loop:
    """The steps of a run, with logging, validation and saving between them.

    Args:
      prepared: the run and its data.
      teacher_params: parameters of the teacher; None if there is none, or its predictions are cached.
      saved: the run's checkpoints.
      log: the run's log.
      vote: tells after every step whether a signal came to any process, so that all stop after the same step.
    """

    def __init__(self, prepared: _Prepared, teacher_params: Params, saved: Checkpoints, log: RunLog, vote: StopVote):
        self._prepared, self._job, self._teacher_params = prepared, prepared.job, teacher_params
        self._saved, self._log, self._vote = saved, log, vote
        self._validation_fn = prepared.job.validation_step()

    def steps(self, state: TrainState) -> TrainState:
        """Runs the remaining steps; saves, logs and validates as the config asks, and stops at a signal."""
        config, rows = self._job.config, self._prepared.rows
        first = int(jax.device_get(state.step))
        watch, trace = Watch(config, self._log, self._job.flops), Trace(config.out, config.profile)
        pending: tuple[int, Metrics] | None = None
        update: Any = None
        tokens = config.data.batch_size * config.data.seq_len
        if self._validates_after(first) and first not in self._log.validated:
            self.validate(state, first)  # the run was stopped during this validation
        with progress(config.out.name, config.steps, "tokens", scale=tokens, done=first) as advance, trace:
            for step in range(first + 1, config.steps + 1):
                reached(f"step {step}")
                batch = rows.to_global(next(self._prepared.batches))
                update = update or self._compiled(state, batch)
                trace.before(step - first)
                with jax.transfer_guard("disallow"):
                    state, metrics = update(state, batch, self._teacher_params)
                trace.after(step - first, metrics)
                if pending is not None:  # read the previous step's metrics while the devices compute this one
                    advance(1, watch.read(*pending))
                pending = (step, metrics)
                stopping, last = self._vote(), step == config.steps
                saving = stopping or last or _due(step, config.checkpoint_every)
                if saving or self._validates_after(step):
                    advance(1, watch.read(*pending))  # a checkpoint of a step implies that it was logged
                    pending = None
                if saving:
                    self._save(step, state)
                self._saved.check()
                if stopping:
                    raise Stopped
                if self._validates_after(step):
                    self.validate(state, step)
                if self._prepared.samples is not None and _due(step, config.samples.every):
                    reached(f"the samples after step {step}")
                    self._log.samples(step, self._prepared.samples.texts(state.params))
        return state

    def _compiled(self, state: TrainState, batch: Batch) -> Any:
        """The training step; first compiled by all processes, as devices do not wait long for each other at first."""
        program: Any = self._job.train_step()
        compiled = program.lower(state, batch, self._teacher_params).compile()
        wait_for_all("the compiling of the training step")
        signals.keep()  # from here on there is work to save
        return compiled

    def validate(self, state: TrainState, step: int) -> MetricValues:
        """Measures and logs the means of the metrics over all validation rows.

        Raises:
          Stopped: a signal came; the state was saved.
        """
        config = self._job.config
        data = dataclasses.replace(config.data, batch_size=self._job.microbatch)
        rows = self._prepared.validation_rows

        def batches() -> Iterator[Batch]:
            for batch in validation_batches(data, rows.own, self._prepared.manifests):
                reached(f"the validation after step {step}")
                if self._vote():
                    self._save(step, state)
                    raise Stopped
                yield batch

        params = state.params, self._teacher_params
        metrics = run_validation(self._validation_fn, self._job.student, *params, batches(), rows)
        self._log.validation(step, metrics)
        return metrics

    def _validates_after(self, step: int) -> bool:
        """Whether validation is due after `step`; the last step is always validated, by the caller."""
        config = self._job.config
        has_rows = self._prepared.manifests.rows("validation") > 0
        return has_rows and 0 < step < config.steps and _due(step, config.validate_every)

    def _save(self, step: int, state: TrainState) -> None:
        reached(f"the checkpoint of step {step}")
        self._saved.save(step, state, _facts(self._prepared) | {"position": self._prepared.batches.get_state()})


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


# --- the state that a run starts from ---


def _facts(prepared: _Prepared) -> dict[str, Any]:
    """What is stored in a checkpoint to be compared when the run is resumed: data, architecture and settings.

    No random state is among them, since training draws nothing at random: all seeds are settings.
    """
    return {
        "data": prepared.manifests.digests(),
        "architecture": dataclasses.asdict(prepared.job.student.config),
        "settings": deciding_settings(prepared.job.config.as_json()),
    }


def _fresh(job: Job) -> tuple[TrainState, Params]:
    """The state before the first step; and the teacher's parameters, where they are what the student starts from."""
    params = [_first_params(job)]
    teacher = None
    if job.teacher is not None and job.starts_from_teacher:  # whose weights are not read again
        teacher = teacher_copy(params[0], job.teacher.dtype)
    state = init_state(job.student.config, job.optimizer, params.pop(), job.shardings)  # which frees them on its way
    write_architecture(job.config.out, job.student.config)
    return state, teacher


def _first_params(job: Job) -> Params:
    config, mesh = job.config, job.mesh
    if config.model is not None:
        return init_params(family(config.model), config.seed, mesh)
    assert config.init_from is not None
    return load_model(config.init_from, activation=config.init_activation, mesh=mesh)[1]


def _restored(prepared: _Prepared, saved: Checkpoints) -> TrainState:
    """The state of the newest whole checkpoint; moves the data to where it stopped."""
    out = prepared.job.config.out
    state, facts = saved.restore(prepared.job.abstract_state())
    before, now = facts["data"], _facts(prepared)
    changed = [name for name in now["data"] | before if now["data"].get(name) != before.get(name)]
    if changed:
        raise FalconError(
            f"{out} began with other rows than are there now in: {', '.join(changed)}. They were prepared again "
            "or replaced: bring the old ones back, or start a new run under another --out"
        )
    for name, file in (("architecture", "architecture.json"), ("settings", "config.json")):
        if changed := [key for key in now[name] | facts[name] if now[name].get(key) != facts[name].get(key)]:
            raise FalconError(
                f"{out / file} was changed since the run's checkpoint was written, in: {', '.join(changed)}. Bring the "
                "old file back, or start a new run under another --out"
            )
    prepared.batches.set_state(facts["position"])
    return state


def _load_teacher(job: Job) -> Params:
    config = job.config
    if job.teacher is None:
        return None
    assert config.teacher is not None
    activation, dtype = config.teacher_activation, job.teacher.dtype
    return load_model(config.teacher, activation=activation, dtype=dtype, mesh=job.mesh)[1]
