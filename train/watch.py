"""What a run shows while it goes: a log in JSON lines, TensorBoard, the console's line, sample texts, traces."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

from falcon_relu.errors import FalconError
from falcon_relu.files import write_aside
from falcon_relu.generation import generate
from falcon_relu.model import Falcon, Params
from falcon_relu.tokenizer import Tokenizer
from train.checkpoints import writing
from train.config import SamplesConfig, TrainConfig
from train.flops import PEAK_FLOPS
from train.state import learning_rate_schedule
from train.step import Metrics

Figures = dict[str, Any]

LOG = "log.jsonl"
TENSORBOARD = "tensorboard"


class RunLog:
    """`log.jsonl` and TensorBoard of a run, written by process 0; every step stands in them once.

    Args:
      out: folder of the run.
      first: steps that a checkpoint holds; later lines, of work that was lost, are dropped.
      on_line: called with every line that is written.
    """

    def __init__(self, out: Path, first: int, on_line: Callable[[Figures], None] | None = None):
        self._on_line = on_line or (lambda _: None)
        self._path = out / LOG
        self.last: Figures = {}
        self._board: SummaryWriter | None = None
        kept = [line for line in read_log(self._path) if line["step"] <= first]
        self.last = next((line for line in reversed(kept) if "loss" in line), {})
        if jax.process_index() == 0:
            with writing(str(self._path)), write_aside(self._path, replace=True) as aside:
                aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
            self._board = SummaryWriter(str(out / TENSORBOARD), purge_step=first + 1 if first else None)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            with contextlib.suppress(OSError):  # on a full disk: what stopped the run says more
                self._board.close()

    def steps(self, step: int, figures: Figures) -> None:
        """Logs the figures of a training step."""
        self.last = {"step": step} | figures
        self._write(self.last)
        self._show("train", step, figures)

    def validation(self, step: int, figures: Figures) -> None:
        """Logs the means over the validation rows."""
        self._write({"step": step, "validation": figures})
        self._show("validation", step, figures)

    def samples(self, step: int, texts: dict[str, str]) -> None:
        """Logs continuations by their prompts."""
        self._write({"step": step, "samples": texts})
        if self._board is not None:
            for number, (prompt, text) in enumerate(texts.items()):
                self._board.add_text(f"samples/{number}", f"**{prompt}**{text}", step)

    def _write(self, line: Figures) -> None:
        if jax.process_index() == 0:
            with writing(str(self._path)), self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            self._on_line(line)

    def _show(self, group: str, step: int, figures: Figures) -> None:
        if self._board is None:
            return
        for name, value in figures.items():
            if isinstance(value, list):
                self._board.add_scalar(f"{group}/{name}", float(np.mean(value)), step)
                for layer, item in enumerate(value):
                    self._board.add_scalar(f"{group}_{name}/layer_{layer:02d}", item, step)
            else:
                self._board.add_scalar(f"{group}/{name}", value, step)


def read_log(path: Path) -> list[Figures]:
    """The lines of a log; one that a killed process left half-written is passed over."""
    lines: list[Figures] = []
    if path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
    return lines


class Watch:
    """Reads a step's metrics on the host, logs them, and stops a run that has gone wrong.

    Args:
      config: the run.
      log: where the figures go.
      flops: model FLOPs of a step.
    """

    def __init__(self, config: TrainConfig, log: RunLog, flops: float):
        self._config, self._log, self._flops = config, log, flops
        self._tokens = config.data.batch_size * config.data.seq_len
        self._since: tuple[int, float] | None = None
        kind = jax.devices()[0].device_kind
        self._peak = PEAK_FLOPS[kind] * jax.device_count() if kind in PEAK_FLOPS else None
        # As a table: computing it on the way would wait for the devices.
        schedule = learning_rate_schedule(config.optimizer, config.steps)
        self._learning_rates = np.asarray(jax.vmap(schedule)(np.arange(config.steps)))

    def read(self, step: int, metrics: Metrics) -> str | None:
        """Waits for a step; returns the console's note on it, if it is one to log.

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
        figures = to_host(metrics)
        figures["learning_rate"] = float(self._learning_rates[max(step - 1 - figures["skipped"], 0)])
        figures |= self._speed(step, now)
        self._since = (step, now)
        self._log.steps(step, figures)
        kl = f" kl {figures['kl']:.3f}" if "kl" in figures else ""
        skipped = f" skipped {figures['skipped']}" if figures["skipped"] else ""
        return f"loss {figures['cross_entropy']:.3f}{kl} zeros {np.mean(figures['zeros']):.0%}{skipped}"

    def _speed(self, step: int, now: float) -> Figures:
        if self._since is None or step == self._since[0]:
            return {}
        steps_per_second = (step - self._since[0]) / (now - self._since[1])
        flops = steps_per_second * self._flops
        figures = {"tokens_per_second": steps_per_second * self._tokens, "model_flops_per_second": flops}
        return figures if self._peak is None else figures | {"mfu": flops / self._peak}


def to_host(metrics: Metrics) -> Figures:
    """Metrics as values that JSON can hold."""
    return {name: np.asarray(value).tolist() for name, value in jax.device_get(metrics).items()}


class Samples:
    """Continuations of the config's prompts; every process takes part, process 0 logs them.

    Args:
      config: what to continue and how.
      model: the student.
      log: where the texts go.
      multiple: prompts are repeated up to a multiple of it, the devices that share a batch.
    """

    def __init__(self, config: SamplesConfig, model: Falcon, log: RunLog, multiple: int):
        assert config.tokenizer is not None
        self._config, self._model, self._log = config, model, log
        self._tokenizer = Tokenizer(config.tokenizer)
        self._tokenizer.check_fits(model.config.vocab_size)
        prompts = [self._tokenizer.encode(prompt) for prompt in config.prompts]
        self._prompts = (prompts * multiple)[: -(-len(prompts) // multiple) * multiple]

    def write(self, step: int, params: Params) -> None:
        """Continues every prompt with `params`."""
        ids = generate(self._model, params, self._prompts, self._config.sampling)
        texts = zip(self._config.prompts, map(self._tokenizer.decode, ids), strict=False)  # without the repeated ones
        self._log.samples(step, dict(texts))


class Trace:
    """The profiler's trace of some steps, in the folder where TensorBoard finds it; process 0's devices only.

    Args:
      out: folder of the run.
      span: (first, last) step, counted from where this process starts.
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
        if self._on:  # the run's end cuts it short
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._on = False
