"""The log of a run: JSON lines and TensorBoard, written by process 0."""

from __future__ import annotations

import contextlib
import json
import logging
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from falcon_relu.files import regular_file, write_text
from train.folder.checkpoints import writing

MetricValues = dict[str, Any]

LOG = "log.jsonl"
TENSORBOARD = "tensorboard"


class RunLog:
    """`log.jsonl` and TensorBoard files of a run, written by process 0; no step is logged twice.

    Args:
      out: folder of the run.
      first: step of the checkpoint that the run resumes from, or 0; logged lines of later steps are removed.
      on_line: called with every line that is written.

    Attributes:
      last: the metrics of the last training step that was logged.
      validated: steps that have a validation in the log.
    """

    def __init__(self, out: Path, first: int, on_line: Callable[[MetricValues], None] | None = None):
        self._on_line = on_line or (lambda _: None)
        self._path = out / LOG
        self.last: MetricValues = {}
        self._board: _Board | None = None
        kept = [line for line in read_log(self._path) if line["step"] <= first]
        self.last = next((line for line in reversed(kept) if "loss" in line), {})
        self.validated = {line["step"] for line in kept if "validation" in line}
        if jax.process_index() == 0:
            with writing(str(self._path)):
                write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
            self._board = _Board(out / TENSORBOARD, first)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            self._board.close()

    def steps(self, step: int, metrics: MetricValues) -> None:
        """Logs the metrics of a training step."""
        self.last = {"step": step} | metrics
        self._write(self.last)
        self._show("train", step, metrics)

    def validation(self, step: int, metrics: MetricValues) -> None:
        """Logs the metrics of a validation, means over its rows."""
        self._write({"step": step, "validation": metrics})
        self._show("validation", step, metrics)

    def samples(self, step: int, texts: dict[str, str]) -> None:
        """Logs sampled continuations, by prompt."""
        self._write({"step": step, "samples": texts})
        if self._board is not None:
            # TensorBoard renders Markdown, in which indented lines are code and are shown unchanged.
            shown = [textwrap.indent(prompt + text, "    ", lambda _: True) for prompt, text in texts.items()]
            self._board.add(step, [summary.text(f"samples/{n}", text) for n, text in enumerate(shown)])

    def _write(self, line: MetricValues) -> None:
        if jax.process_index() == 0:
            with writing(str(self._path)), self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            self._on_line(line)

    def _show(self, group: str, step: int, metrics: MetricValues) -> None:
        if self._board is None:
            return
        scalars = {}
        for name, value in metrics.items():
            if isinstance(value, list):
                scalars[f"{group}/{name}"] = float(np.mean(value))
                scalars |= {f"{group}_{name}/layer_{layer:02d}": item for layer, item in enumerate(value)}
            else:
                scalars[f"{group}/{name}"] = value
        self._board.add(step, [summary.scalar(name, value) for name, value in scalars.items()])


class _Board:
    """TensorBoard's event file, written in the caller's thread.

    tensorboardX's own SummaryWriter writes in a thread that reads from a short queue; once that thread has failed (on a
    full disk, say), the queue fills up and the caller waits forever.
    """

    def __init__(self, folder: Path, first: int):
        self._folder = folder
        with writing(str(folder)):
            folder.mkdir(parents=True, exist_ok=True)
            self._events = EventsWriter(str(folder / "events"))
            if first:  # makes TensorBoard discard events of later steps
                self._events.write_event(Event(step=first + 1, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, summaries: list[Summary]) -> None:
        with writing(str(self._folder)):
            for one in summaries:
                self._events.write_event(Event(wall_time=time.time(), step=step, summary=one))
            self._events.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # on a full disk the run has failed already, with its own error
            self._events.close()


def read_log(path: Path) -> list[MetricValues]:
    """The lines of a log; a damaged line, as a killed process may leave it, is reported and skipped.

    Raises:
      FalconError: the log is not a regular file, or cannot be read.
    """
    if not path.exists() and not path.is_symlink():
        return []
    lines: list[MetricValues] = []
    for number, raw in enumerate(regular_file(path).read_bytes().splitlines(), 1):
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):  # not JSON, or not UTF-8
            line = None
        step = line.get("step") if isinstance(line, dict) else None
        if isinstance(step, int) and not isinstance(step, bool) and step >= 0:
            lines.append(line)
        else:
            logging.warning("%s:%d is not a line of a log, and is left out", path, number)
    return lines
