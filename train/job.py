"""What a run consists of: its models, its programs and what these take. `train` runs it, `plan` compiles it.

Nothing here is of the model's size: arrays are shapes with shardings, until `train` brings real ones.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from falcon_relu.config import Activation, FalconConfig, family
from falcon_relu.errors import FalconError
from falcon_relu.model import Falcon, Params
from falcon_relu.sharding import MESH_AXES, MeshError, abstract_params, batch_sharding, param_shardings
from train.config import TrainConfig
from train.data.batches import Batch, Manifests
from train.data.teacher_shards import TeacherManifest
from train.flops import model_flops
from train.state import TrainState, abstract_state, make_optimizer, state_shardings
from train.step import make_train_step, make_validation_step

# (source of a model, the activation, if the user states it) -> its architecture; reads no weights.
ReadConfig = Callable[[str, Activation | None], FalconConfig]


@dataclasses.dataclass(frozen=True)
class Job:
    """A run on devices; made by `make_job`, which checks that its parts fit each other.

    Attributes:
      config: the run.
      mesh: its devices, which need not be there.
      student: the model that learns.
      teacher: the model that is run to teach it, if any.
      cached: what a cached teacher's shards hold, if it teaches.
      optimizer: of the student.
      shardings: of the state between steps.
    """

    config: TrainConfig
    mesh: Mesh
    student: Falcon
    teacher: Falcon | None
    cached: TeacherManifest | None
    optimizer: optax.GradientTransformation
    shardings: TrainState

    @property
    def microbatch(self) -> int:
        """Rows of all devices that are worked on at a time, in training and in validation."""
        return self.config.data.batch_size // self.config.microbatches

    @property
    def starts_from_teacher(self) -> bool:
        """Whether a fresh run's teacher is a copy of the parameters that its student starts from."""
        return self.config.teacher is not None and self.config.teacher == self.config.init_from

    @property
    def flops(self) -> float:
        """Model FLOPs of a training step."""
        teacher = None if self.teacher is None else self.teacher.config
        return model_flops(self.student.config, teacher, self.config.data.batch_size, self.config.data.seq_len)

    def train_step(self) -> Callable[..., Any]:
        """(state, batch, teacher's parameters) -> (state, metrics); see `make_train_step`."""
        config = self.config
        return make_train_step(
            config.loss,
            self.student,
            self.teacher,
            self.optimizer,
            self.mesh,
            config.microbatches,
            config.activation_ramp,
        )

    def validation_step(self) -> Callable[..., Any]:
        """(student's parameters, batch, teacher's parameters) -> sums; see `make_validation_step`."""
        return make_validation_step(self.config.loss, self.student, self.teacher)

    def abstract_state(self) -> TrainState:
        """Shape, dtype and sharding of every leaf of the state."""
        return abstract_state(self.student.config, self.optimizer, self.shardings)

    def abstract_teacher(self) -> Params:
        """The same of the parameters of the teacher that is run; None without one."""
        if self.teacher is None:
            return None
        dtype = self.teacher.dtype
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding),
            abstract_params(self.teacher.config),
            param_shardings(self.teacher.config, self.mesh),
        )

    def abstract_batch(self, rows: int) -> Batch:
        """The same of a batch of `rows` rows [rows, T], with what a cached teacher says of them."""

        def whole(shape: tuple[int, ...], dtype: Any) -> Any:
            return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=batch_sharding(self.mesh))

        T = self.config.data.seq_len
        batch: Any = {name: whole((T,), jnp.int32) for name in ("tokens_BxT", "segment_ids_BxT", "positions_BxT")}
        if self.cached is not None:
            targets: Any = self.cached.targets(1)
            batch["teacher"] = {name: whole(array.shape[1:], array.dtype) for name, array in targets.items()}
        return batch


def make_job(
    config: TrainConfig,
    mesh: Mesh,
    read_config: ReadConfig,
    *,
    manifests: Manifests | None = None,
    student: FalconConfig | None = None,
    narrow: Any = jnp.bfloat16,
) -> Job:
    """The job of a run; no weights are read, nothing is placed on a device.

    Args:
      config: the run.
      mesh: its devices.
      read_config: reads the architecture of what the run starts from or is taught by.
      manifests: of the data; None where a plan is made without them: a cache is then as `teacher-cache` writes it.
      student: what the student is, if a checkpoint has settled it.
      narrow: the dtype where the config says bfloat16.

    Raises:
      FalconError: data, models, batch and devices do not fit each other; the message says what would.
    """
    if student is None:
        student = _student(config, read_config, manifests)
    teacher = None if config.teacher is None else read_config(config.teacher, config.teacher_activation)
    cached = None
    if config.data.teacher_cache is not None:
        cached = manifests.teachers[0] if manifests is not None else _usual_cache(config, student)
    _check_mesh(config, student, mesh)
    _check_vocabularies(student, teacher, cached, manifests)
    _check_temperature(config, cached)
    optimizer = make_optimizer(config.optimizer, config.steps)
    dtypes = {"bfloat16": jnp.dtype(narrow), "float32": jnp.dtype(jnp.float32)}
    how: dict[str, Any] = {"query_chunk": config.query_chunk, "attention": config.attention}
    learner = Falcon(
        student, dtypes[config.compute_dtype], config.remat, start_activation=config.start_activation, **how
    )
    return Job(
        config=config,
        mesh=mesh,
        student=learner,
        teacher=None if teacher is None else Falcon(teacher, dtypes[config.teacher_dtype], **how),
        cached=cached,
        optimizer=optimizer,
        shardings=state_shardings(student, optimizer, mesh),
    )


def _student(config: TrainConfig, read_config: ReadConfig, manifests: Manifests | None) -> FalconConfig:
    if config.model is not None:
        student = family(config.model)
        end = student.eos_token_id if manifests is None else manifests.tokens[0].eos_id
        if end < student.vocab_size:  # a model that starts fresh ends texts with its data's token
            student = student.replace(bos_token_id=end, eos_token_id=end)
    else:
        assert config.init_from is not None
        student = read_config(config.init_from, config.init_activation)
    if config.activation is not None:
        student = student.with_activation(config.activation, config.activation_shift)
    return student


def _usual_cache(config: TrainConfig, student: FalconConfig) -> TeacherManifest:
    return TeacherManifest(
        top_k=min(64, student.vocab_size),
        dtype="bfloat16",
        temperature=config.loss.temperature,
        seq_len=config.data.seq_len,
        vocab_size=student.vocab_size,
        teacher={"weights": ""},
        tokens="",
        splits={},
    )


# --- what does not fit is refused before anything is loaded ---


def _check_mesh(config: TrainConfig, student: FalconConfig, mesh: Mesh) -> None:
    """Every device must have as many rows of a microbatch, and as many layers of the state, as the others."""
    data, fsdp, tensor = (mesh.shape[axis] for axis in MESH_AXES)
    batch, pieces, parts = config.data.batch_size, config.microbatches, data * fsdp
    what, choose = [], []
    if batch // pieces % parts:
        what.append(
            f"a microbatch of {batch // pieces} rows (batch_size {batch} / microbatches {pieces}) by the {parts} "
            "devices along data and fsdp"
        )
        good = [n for n in range(1, batch + 1) if batch % (n * parts) == 0]
        nearest = min(good, key=lambda n: abs(n - pieces), default=None)
        choose.append("another --data.batch-size" if nearest is None else f"--microbatches {nearest}")
    if student.n_layers % data:
        what.append(f"{student.n_layers} layers of parameters and moments by the {data} devices along data")
        good_data = math.gcd(data, student.n_layers)
        choose.append(f"--mesh {good_data} {fsdp * data // good_data} {tensor}")
    if what:
        raise MeshError(f"cannot be shared evenly: {', and '.join(what)}", f"choose {' '.join(choose)}")


def _check_vocabularies(
    student: FalconConfig, teacher: FalconConfig | None, cached: TeacherManifest | None, manifests: Manifests | None
) -> None:
    if manifests is not None and manifests.vocab_size > student.vocab_size:
        raise FalconError(
            f"the data's tokenizer has {manifests.vocab_size} entries, the model's vocabulary {student.vocab_size}"
        )
    for name, size in (
        ("teacher", teacher and teacher.vocab_size),
        ("cached teacher", cached and cached.vocab_size),
    ):
        if size is not None and size != student.vocab_size:
            raise FalconError(f"vocabularies differ: {name} {size}, student {student.vocab_size}")


def _check_temperature(config: TrainConfig, cached: TeacherManifest | None) -> None:
    if cached is not None and config.loss.kd_weight and config.loss.temperature not in (1, cached.temperature):
        raise FalconError(
            f"the teacher's cache {config.data.teacher_cache} was written for the temperatures 1 and "
            f"{cached.temperature}, the loss wants {config.loss.temperature}: change --loss.temperature, or write the "
            "cache again with that --temperature"
        )
