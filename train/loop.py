"""A run from its config to finished weights: load or resume, step, show, validate, save."""

from __future__ import annotations

from typing import Any

import grain
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from falcon_relu.checkpoint import load_model
from falcon_relu.config import FalconConfig, family
from falcon_relu.errors import FalconError
from falcon_relu.model import Falcon, Params
from falcon_relu.native import save_params
from falcon_relu.progress import progress
from falcon_relu.sharding import init_params, make_mesh, use_mesh
from train.checkpoints import Checkpoints, writing
from train.config import TrainConfig
from train.data import Batch, DataConfig, read_manifests, read_teachers, train_batches, validation_batches
from train.distributed import Rows, Stopped, StopVote, stop_signals
from train.flops import model_flops
from train.folder import claim, finish, note_start, read_architecture, write_architecture
from train.shards import Manifest
from train.state import TrainState, abstract_state, init_state, make_optimizer, state_shardings
from train.step import Metrics, make_train_step, make_validation_step
from train.validation import run_validation
from train.watch import Figures, RunLog, Samples, Trace, Watch


def train(config: TrainConfig) -> Figures:
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
    manifests = read_manifests(config.data)
    mesh = make_mesh(config.mesh)
    rows = Rows(mesh, config.data.batch_size)
    with (
        use_mesh(mesh),
        stop_signals() as asked,
        Checkpoints(config.out / "checkpoints", config.keep_checkpoints, config.keep_every) as saved,
    ):
        teacher, teacher_params = _teacher(config, mesh)
        optimizer = make_optimizer(config.optimizer, config.steps)
        batches = train_batches(config.data, rows.own)
        architecture, state = _begin_or_go_on(config, mesh, optimizer, saved, batches, manifests)
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
        step_fn = make_train_step(
            config.loss, student, teacher, optimizer, mesh, config.microbatches, config.activation_ramp
        )
        validation_fn = make_validation_step(config.loss, student, teacher)
        has_validation = any(manifest.splits["validation"].rows for manifest in manifests)

        first = int(jax.device_get(state.step))
        note_start(config, first, mesh)
        data = config.data
        flops = model_flops(architecture, teacher.config if teacher else None, data.batch_size, data.seq_len)
        with RunLog(config.out, first) as log:
            watch = Watch(config, log, first, flops)
            samples = Samples(config.samples, student, log, rows.parts) if config.samples.every else None
            trace, vote = Trace(config.out, config.profile), StopVote(asked, mesh)

            def validated(step: int) -> Figures:
                held_out = validation_batches(config.data, rows.own)
                figures = run_validation(validation_fn, student, state.params, teacher_params, held_out, rows)
                log.validation(step, figures)
                return figures

            pending: tuple[int, Metrics] | None = None
            scale = data.batch_size * data.seq_len
            with progress(config.out.name, config.steps, "tokens", scale=scale, done=first) as advance:
                for step in range(first + 1, config.steps + 1):
                    batch = rows.to_global(next(batches))
                    trace.before(step - first)
                    with jax.transfer_guard("disallow"):
                        state, metrics = step_fn(state, batch, teacher_params)
                    trace.after(step - first, metrics)
                    if pending is not None:  # while this step runs, the one before is read
                        advance(1, watch.read(*pending))
                    pending = (step, metrics)
                    stopping, last = vote(), step == config.steps
                    if stopping or last or _due(step, config.checkpoint_every):
                        advance(1, watch.read(*pending))
                        pending = None
                        saved.save(step, state, _facts(batches, manifests))
                    saved.check()
                    if stopping:
                        raise Stopped
                    if has_validation and not last and _due(step, config.validate_every):
                        validated(step)
                    if samples is not None and _due(step, config.samples.every):
                        samples.write(step, state.params)
            trace.stop()
            figures = validated(config.steps) if has_validation else log.last
        with writing(f"the weights to {config.out}"):
            save_params(config.out / "weights", architecture, state.params, replace=True)
            finish(config.out, figures)
    return figures


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


# --- where a run starts ---


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
    manifests: list[Manifest],
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
    _check_same_data(config.data, manifests, facts["manifests"])
    batches.set_state(facts["data"])
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


def _facts(batches: grain.DatasetIterator[Batch], manifests: list[Manifest]) -> dict[str, Any]:
    """What a checkpoint keeps beside the state. Nothing is drawn at random on the way: the seeds are settings."""
    return {"data": batches.get_state(), "manifests": [manifest.digest() for manifest in manifests]}


def _check_same_data(data: DataConfig, manifests: list[Manifest], stored: list[str]) -> None:
    for source, manifest, digest in zip(data.sources, manifests, stored, strict=True):
        if manifest.digest() != digest:
            raise FalconError(
                f"{source.path} does not hold the rows that the run began with: it was prepared again or exchanged. "
                "Bring the old shards back, or start a new run under another --out"
            )


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
