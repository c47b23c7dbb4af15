"""The config of a training run. `configs/` holds named ones; the command line can change every field."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from falcon_relu.attention import Attend
from falcon_relu.config import FAMILY, Activation
from falcon_relu.errors import FalconError, check_number, check_seed
from falcon_relu.generation import Sampling
from falcon_relu.model import Remat, largest_divisor
from train.data.batches import DataConfig
from train.loss import LossConfig

Dtype = Literal["float32", "bfloat16"]


def _check_int(name: str, value: object, low: int) -> None:
    check_number(name, value, low=low)
    if not isinstance(value, int):
        raise FalconError(f"{name} must be an integer, got {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (arXiv:1711.05101) with linear warm-up, cosine decay and clipping by the global norm.

    Attributes:
      learning_rate: the peak, reached after the warm-up.
      final_learning_rate: the learning rate at the end of the cosine.
      warmup_steps: number of steps from 0 to the peak.
      b1: decay of the first moment.
      b2: decay of the second moment.
      epsilon: added to the square root of the second moment.
      weight_decay: of matrices; norms and biases are not decayed.
      clip_norm: global gradient norm above which gradients are scaled down.

    Raises:
      FalconError: a field is out of range; the message names it.
    """

    learning_rate: float = 3e-5
    final_learning_rate: float = 0.0
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        check_number("OptimizerConfig.learning_rate", self.learning_rate, above=0)
        check_number("OptimizerConfig.final_learning_rate", self.final_learning_rate, low=0, high=self.learning_rate)
        _check_int("OptimizerConfig.warmup_steps", self.warmup_steps, low=0)
        for name in ("b1", "b2"):
            check_number(f"OptimizerConfig.{name}", getattr(self, name), low=0, high=1 - 1e-9)
        check_number("OptimizerConfig.epsilon", self.epsilon, above=0)
        check_number("OptimizerConfig.weight_decay", self.weight_decay, low=0)
        check_number("OptimizerConfig.clip_norm", self.clip_norm, above=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """Sample texts generated during training; off by default.

    Attributes:
      every: steps between samples; 0 for none.
      prompts: texts to continue.
      tokenizer: a tokenizer.json or a folder with one; the one that the data was prepared with.
      sampling: how the prompts are continued.

    Raises:
      FalconError: a field is out of range or missing; the message names it.
    """

    every: int = 0
    prompts: tuple[str, ...] = ()
    tokenizer: Path | None = None
    sampling: Sampling = dataclasses.field(default_factory=Sampling)

    def __post_init__(self) -> None:
        _check_int("SamplesConfig.every", self.every, low=0)
        if self.every and not (self.prompts and self.tokenizer):
            raise FalconError("SamplesConfig.every is above 0: it needs prompts and a tokenizer")
        if not all(self.prompts):
            raise FalconError("SamplesConfig.prompts has an empty text, which cannot be continued")


# Fields that do not change the result beyond rounding: a run may be resumed with other values.
_MAY_CHANGE = {
    "out",
    "microbatches",
    "mesh",
    "remat",
    "attention",
    "query_chunk",
    "log_every",
    "validate_every",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_every",
    "max_bad_steps",
    "samples",
    "profile",
}
_DATA_MAY_CHANGE = {"threads", "prefetch"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run: the student's initial weights, the teacher, the data, the optimisation and the output.

    Attributes:
      out: folder of the run: its settings, log, checkpoints and finished weights; on a disk that all processes share.
      model: member of the family to train from random parameters; exactly one of `model` and `init_from` is given.
      init_from: native weights, Hugging Face folder or hub id to start from.
      init_activation: the activation that `init_from` was trained with, if its config does not state it.
      activation: activation to train the student with; None keeps its own.
      activation_shift: shift of "shifted_relu".
      start_activation: activation to start with and to blend into `activation` by `activation_ramp`; None for none.
      activation_ramp: (begin, end): up to step `begin` the student has `start_activation`, from `end` on `activation`,
        between them a linear blend; the same step twice switches at once. Validation always uses `activation`.
      teacher: native weights, Hugging Face folder or hub id to distil from; None where `data.teacher_cache` is used.
      teacher_activation: the teacher's activation, if its config does not state it.
      data: token shards, row length, batch and order.
      loss: weights, temperature and chunk of the loss.
      optimizer: AdamW and its schedule.
      steps: number of optimizer updates.
      microbatches: number of pieces that a batch is split into, processed one after the other to save memory.
      mesh: devices along (data, fsdp, tensor); a -1 takes the devices that are left.
      compute_dtype: dtype of the student's products; its parameters and optimizer state are float32.
      teacher_dtype: dtype of the teacher's parameters and products.
      remat: what the backward pass computes again, instead of keeping it in memory: "none", nothing; "dots", the norms
        and activations; "mlp", these and the MLP's up-projection; "full", these and the attention.
      attention: the attention kernel: "chunked" and "xla" run everywhere, "cudnn" on NVIDIA GPUs, "splash" on TPUs;
        "auto" takes the platform's best.
      query_chunk: queries that "chunked" attention processes at a time; None for all.
      seed: of random initial parameters.
      log_every: steps between lines of the log.
      validate_every: steps between passes over the validation rows; 0 for the end only.
      checkpoint_every: steps between checkpoints; 0 for the end only.
      keep_checkpoints: how many of the newest checkpoints are kept.
      keep_every: steps between checkpoints that are kept permanently, a multiple of `checkpoint_every`; 0 for none.
      max_bad_steps: how many updates in a row may be skipped because the loss or a gradient is not finite.
      samples: sample texts generated during training.
      profile: (first, last) step to trace with the profiler, counted from this process's first step; None for none.

    Raises:
      FalconError: a field is out of range or two contradict each other; the message names them.
    """

    out: Path
    data: DataConfig
    model: str | None = None
    init_from: str | None = None
    init_activation: Activation | None = None
    activation: Activation | None = None
    activation_shift: float = 0.0
    start_activation: Activation | None = None
    activation_ramp: tuple[int, int] = (0, 0)
    teacher: str | None = None
    teacher_activation: Activation | None = None
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    steps: int = 1000
    microbatches: int = 1
    mesh: tuple[int, int, int] = (1, -1, 1)
    compute_dtype: Dtype = "bfloat16"
    teacher_dtype: Dtype = "bfloat16"
    remat: Remat = "none"
    attention: Attend = "auto"
    query_chunk: int | None = None
    seed: int = 0
    log_every: int = 10
    validate_every: int = 0
    checkpoint_every: int = 100
    keep_checkpoints: int = 3
    keep_every: int = 0
    max_bad_steps: int = 10
    samples: SamplesConfig = dataclasses.field(default_factory=SamplesConfig)
    profile: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if (self.model is None) == (self.init_from is None):
            raise FalconError("TrainConfig needs exactly one of model (start fresh) and init_from (start from weights)")
        if self.model is not None and self.model not in FAMILY:
            raise FalconError(f"TrainConfig.model {self.model!r} is unknown; known: {', '.join(FAMILY)}")
        if self.teacher is not None and self.data.teacher_cache is not None:
            raise FalconError("TrainConfig has both a teacher and a data.teacher_cache: give one of them")
        if self.loss.kd_weight and self.teacher is None and self.data.teacher_cache is None:
            raise FalconError("TrainConfig.loss.kd_weight is above 0 but no teacher or data.teacher_cache is given")
        for name in ("steps", "microbatches", "log_every", "keep_checkpoints", "max_bad_steps"):
            _check_int(f"TrainConfig.{name}", getattr(self, name), low=1)
        for name in ("validate_every", "checkpoint_every", "keep_every"):
            _check_int(f"TrainConfig.{name}", getattr(self, name), low=0)
        check_seed("TrainConfig.seed", self.seed)
        check_number("TrainConfig.activation_shift", self.activation_shift)
        if any(size < 1 and size != -1 for size in self.mesh) or self.mesh.count(-1) > 1:
            raise FalconError(f"TrainConfig.mesh must be sizes from 1, one of them -1 at the most, got {self.mesh}")
        begin, end = self.activation_ramp
        if not 0 <= begin <= end <= self.steps:
            raise FalconError(f"TrainConfig.activation_ramp must be two ascending steps of the run, got {begin} {end}")
        if (self.start_activation is None) != (end == 0):
            raise FalconError("TrainConfig.start_activation and activation_ramp need each other")
        if self.keep_every and (not self.checkpoint_every or self.keep_every % self.checkpoint_every):
            raise FalconError(
                f"TrainConfig.keep_every ({self.keep_every}) must be a multiple of checkpoint_every "
                f"({self.checkpoint_every})"
            )
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1]:
            raise FalconError(f"TrainConfig.profile must be a first and a last step, from 1, got {self.profile}")
        if self.data.batch_size % self.microbatches:
            raise FalconError(
                f"TrainConfig.data.batch_size ({self.data.batch_size}) must be a multiple of microbatches "
                f"({self.microbatches})"
            )
        if self.optimizer.warmup_steps >= self.steps:
            raise FalconError(
                f"TrainConfig.optimizer.warmup_steps ({self.optimizer.warmup_steps}) must be below steps ({self.steps})"
            )
        if self.query_chunk is not None and (self.query_chunk < 1 or self.data.seq_len % self.query_chunk):
            raise FalconError(
                f"TrainConfig.query_chunk ({self.query_chunk}) must divide data.seq_len ({self.data.seq_len})"
            )
        T, chunk = self.data.seq_len, self.loss.chunk
        if 1 == largest_divisor(T, chunk) < min(T, chunk):
            raise FalconError(
                f"TrainConfig.data.seq_len ({T}) has no divisor from 2 to loss.chunk ({chunk}), so that the loss would "
                "be worked out one position at a time: choose another seq_len"
            )

    def as_json(self) -> dict[str, Any]:
        """The config as values that JSON can hold."""

        def plain(value: Any) -> Any:
            match value:
                case dict():
                    return {key: plain(item) for key, item in value.items()}
                case tuple() | list():
                    return [plain(item) for item in value]
                case Path():
                    return str(value)
            return value

        return plain(dataclasses.asdict(self))


def deciding_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config, as JSON, that a resumed run must have unchanged, by name.

    The paths of the data are not among them: a checkpoint stores hashes of the data.
    """
    kept = {name: value for name, value in config.items() if name not in _MAY_CHANGE | {"data"}}
    data = {name: value for name, value in config["data"].items() if name not in _DATA_MAY_CHANGE}
    data["sources"] = [source["weight"] for source in data["sources"]]
    return kept | {f"data.{name}": value for name, value in data.items()}
