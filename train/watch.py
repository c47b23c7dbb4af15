"""What a run reports while it trains: metrics in its log, a line on the console, sample texts, profiler traces."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from falcon_relu.errors import FalconError
from falcon_relu.generation import check_prompts, generate
from falcon_relu.model import Falcon, Params
from falcon_relu.sharding import param_shardings, working_copy
from falcon_relu.tokenizer import Tokenizer
from train.config import SamplesConfig, TrainConfig
from train.flops import peak_flops
from train.folder.log import TENSORBOARD, MetricValues, RunLog
from train.state import learning_rate_schedule
from train.step import Metrics


class Watch:
    """Reads a step's metrics on the host, logs them, and stops a run that has gone wrong.

    Args:
      config: the run.
      log: where the metrics are written.
      flops: model FLOPs of a step.
    """

    def __init__(self, config: TrainConfig, log: RunLog, flops: float):
        self._config, self._log, self._flops = config, log, flops
        self._tokens = config.data.batch_size * config.data.seq_len
        self._since: tuple[int, float] | None = None
        peak = peak_flops(jax.devices()[0].device_kind)
        self._peak = None if peak is None else peak * jax.device_count()
        # Computed beforehand: evaluating the schedule at every step would wait for the devices.
        schedule = learning_rate_schedule(config.optimizer, config.steps)
        self._learning_rates = np.asarray(jax.vmap(schedule)(np.arange(config.steps)))

    def read(self, step: int, metrics: Metrics) -> str | None:
        """Waits for a step's metrics; where they are due, logs them and returns a summary for the console.

        Raises:
          FalconError: too many steps in a row were not finite.
        """
        bad = int(jax.device_get(metrics["bad_steps"]))
        if bad >= self._config.max_bad_steps:
            raise FalconError(
                f"{self._config.out}: the loss or gradient of {bad} steps in a row, up to step {step}, was not finite; "
                "their updates were skipped. Lower the learning rate and start anew, or remove the newest checkpoints "
                "and run the same command again"
            )
        now = time.perf_counter()
        if step % self._config.log_every and step != self._config.steps:
            self._since = self._since or (step, now)  # the first step of a process compiles
            return None
        values = to_host(metrics)
        values["learning_rate"] = float(self._learning_rates[max(step - 1 - values["skipped"], 0)])
        values |= self._speed(step, now)
        self._since = (step, now)
        self._log.steps(step, values)
        kl = f" kl {values['kl']:.3f}" if "kl" in values else ""
        skipped = f" skipped {values['skipped']}" if values["skipped"] else ""
        return f"loss {values['cross_entropy']:.3f}{kl} zeros {np.mean(values['zeros']):.0%}{skipped}"

    def _speed(self, step: int, now: float) -> MetricValues:
        if self._since is None or step == self._since[0]:
            return {}
        steps_per_second = (step - self._since[0]) / (now - self._since[1])
        flops = steps_per_second * self._flops
        values = {"tokens_per_second": steps_per_second * self._tokens, "model_flops_per_second": flops}
        return values if self._peak is None else values | {"mfu": flops / self._peak}


def to_host(metrics: Metrics) -> MetricValues:
    """Metrics as values that JSON can hold."""
    return {name: np.asarray(value).tolist() for name, value in jax.device_get(metrics).items()}


class Samples:
    """Continuations of the config's prompts; every process takes part.

    Args:
      config: what to continue and how.
      model: the student.
      mesh: devices of the run.

    Raises:
      FalconError: the tokenizer cannot be read or does not fit the model, or a prompt cannot be continued.
    """

    def __init__(self, config: SamplesConfig, model: Falcon, mesh: Mesh):
        assert config.tokenizer is not None
        self._config, self._model = config, model
        self._tokenizer = Tokenizer(config.tokenizer)
        self._tokenizer.check_fits(model.config.vocab_size)
        prompts = [self._tokenizer.encode(prompt) for prompt in config.prompts]
        if [] in prompts:
            raise FalconError(f"samples: the prompt {config.prompts[prompts.index([])]!r} has no tokens")
        check_prompts(prompts, model.config.vocab_size, model.config.max_positions, config.sampling.max_new_tokens)
        self._prompts, self._copy = repeated(prompts, mesh), sampling_copy(model, mesh)

    def texts(self, params: Params) -> dict[str, str]:
        """Continuations under `params`, by their prompts."""
        ids = generate(self._model, self._copy(params), self._prompts, self._config.sampling)
        # not strict: drops the repeated prompts
        return dict(zip(self._config.prompts, map(self._tokenizer.decode, ids), strict=False))


def sampling_copy(model: Falcon, mesh: Mesh) -> Any:
    """The jitted (parameters) -> the copy that texts are generated with.

    Generation reads all layers for every token, so they are not sharded over `data`.
    """
    shardings = param_shardings(model.config, mesh)
    return jax.jit(functools.partial(working_copy, model.config, dtype=model.dtype), out_shardings=shardings)


def repeated(prompts: list[Any], mesh: Mesh) -> list[Any]:
    """The prompts, and the first ones again until the devices that share a batch have as many each."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    return (prompts * parts)[: -(-len(prompts) // parts) * parts]


class Trace:
    """A profiler trace of some steps, of process 0's devices, in the run's TensorBoard folder.

    Args:
      out: folder of the run.
      span: (first, last) step to trace, counted from this process's first step.
    """

    def __init__(self, out: Path, span: tuple[int, int] | None):
        self._folder = str(out / TENSORBOARD)
        self._first, self._last = span if span is not None and jax.process_index() == 0 else (0, 0)
        self._on = False

    def before(self, number: int) -> None:
        """To be called before the `number`-th step is dispatched."""
        if number == self._first:
            jax.profiler.start_trace(self._folder)
            self._on = True

    def after(self, number: int, metrics: Metrics) -> None:
        """To be called after the `number`-th step was dispatched; the last one of a trace is waited for."""
        if self._on and number >= self._last:
            jax.block_until_ready(metrics)
            self._stop()

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *_: object) -> None:
        if self._on:  # the run ended before the last step of the trace
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._on = False
