"""The folder of a run: its lock, settings, list of starts, model config, and final metrics."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from falcon_relu.checkpoints.schema import parse, read_as, read_sealed, write_sealed
from falcon_relu.config import FalconConfig
from falcon_relu.errors import FalconError
from falcon_relu.files import check_output, lock, read_json, regular_file, write_json
from train.config import TrainConfig, deciding_settings
from train.distributed import all_agree, check_same, wait_for_all
from train.folder.checkpoints import Checkpoints, writing
from train.folder.log import LOG, TENSORBOARD

_CONFIG = "config.json"
_ARCHITECTURE = "architecture.json"
_STARTS = "starts.jsonl"
_METRICS = "metrics.json"
_DISK_SECONDS = 90


@contextlib.contextmanager
def held(out: Path) -> Iterator[None]:
    """A context in which no other run can write to the folder; process 0 holds its lock for all processes.

    Raises:
      FalconError: another run holds it, or the folder cannot be made; raised in every process.
    """
    check_output(out, folder=True, replace=True)
    with contextlib.ExitStack() as stack:
        problem = None
        if jax.process_index() == 0:
            try:
                stack.enter_context(lock(out))
            except (FalconError, OSError) as error:
                problem = error
        if not all_agree(problem is None, f"the lock of {out}"):
            raise FalconError(str(problem or f"{out}: process 0 could not lock the folder; see its error"))
        yield


def finished_metrics(config: TrainConfig) -> dict[str, Any] | None:
    """Checks that the folder is new or holds this run; returns its metrics if it is finished, else None.

    A finished run whose weights are gone is not finished: they are written again from its last checkpoint.

    Raises:
      FalconError: the folder holds a run with other settings that change the result, files that are not a run's, or a
        finished run without weights and checkpoints.
    """
    wanted = config.as_json()
    check_same(json.dumps(wanted, sort_keys=True), "settings")
    for name in (_CONFIG, _ARCHITECTURE, _STARTS, _METRICS, LOG):
        check_output(config.out / name, replace=True)
        if (config.out / name).exists():
            regular_file(config.out / name)
    for name in (TENSORBOARD, "checkpoints", "weights"):
        check_output(config.out / name, folder=True, replace=True)
    path = config.out / _CONFIG
    if path.exists():
        before, now = (deciding_settings(c.as_json()) for c in (read_as(TrainConfig, path), config))
        if changed := [name for name in before | now if before.get(name) != now.get(name)]:
            raise FalconError(
                f"{config.out} holds a run with other settings ({', '.join(changed)}); choose another --out, or remove "
                "it"
            )
    if not all_agree((config.out / _METRICS).exists(), f"a look at {config.out / _METRICS}"):
        return None
    metrics = _read_metrics(config.out / _METRICS)
    if all_agree((config.out / "weights").is_dir(), f"a look at {config.out / 'weights'}"):
        return metrics
    if not Checkpoints.exist(config.out / "checkpoints"):
        raise FalconError(
            f"{config.out} holds a finished run, but neither its weights nor a checkpoint to write them from: bring "
            f"{config.out / 'weights'} back, or remove {config.out} to train again"
        )
    return None


def _read_metrics(path: Path) -> dict[str, Any]:
    metrics = read_json(path)
    items = metrics.items() if isinstance(metrics, dict) else ()
    numbers = [value if isinstance(value, list) else [value] for _, value in items]
    if not numbers or not all(isinstance(number, int | float) for row in numbers for number in row):
        raise FalconError(f"{path} holds no metrics of a run; remove it and run the same command again")
    return metrics


def claim(config: TrainConfig) -> None:
    """Writes the run's settings into its folder.

    Raises:
      FalconError: the folder cannot be written, or is not on a disk that all processes share.
    """
    path = config.out / _CONFIG
    wait_for_all(f"a look at {config.out}")
    if jax.process_index() == 0:
        with writing(str(path)):
            write_json(path, config.as_json())
    wait_for_all(f"the settings in {config.out}")
    if not all_agree(_appears(path), f"a look at {path}"):
        raise FalconError(f"{config.out} is not on a disk that all {jax.process_count()} processes share")


def _appears(path: Path) -> bool:
    """Whether a file that process 0 has just written appears; a network disk may take a minute to show it."""
    end = time.monotonic() + _DISK_SECONDS
    while not path.exists():
        if jax.process_count() == 1 or time.monotonic() > end:
            return False
        time.sleep(1)
        with contextlib.suppress(OSError):
            list(path.parent.iterdir())  # makes the network disk refresh its cached listing
    return True


def finish(out: Path, metrics: dict[str, Any]) -> None:
    """Writes the final metrics, which mark the run as finished."""
    if jax.process_index() == 0:
        write_json(out / _METRICS, metrics)


def write_architecture(out: Path, architecture: FalconConfig) -> None:
    """Writes the student's config, so that resuming does not need the model that training started from."""
    if jax.process_index() == 0:
        write_sealed(out / _ARCHITECTURE, dataclasses.asdict(architecture))


def read_architecture(out: Path) -> FalconConfig:
    """The student's config.

    Raises:
      FalconError: the file is missing or damaged.
    """
    path = out / _ARCHITECTURE
    return parse(
        FalconConfig, read_sealed(path, "bring the old file back, or start a new run under another --out"), path
    )


def note_start(config: TrainConfig, step: int, mesh: jax.sharding.Mesh) -> None:
    """Adds a line to `starts.jsonl`: the step, time, number of processes, mesh and device."""
    if jax.process_index() == 0:
        line = {
            "step": step,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "processes": jax.process_count(),
            "mesh": dict(mesh.shape),
            "device": jax.devices()[0].device_kind,
        }
        path = config.out / _STARTS
        with writing(str(path)), path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                torn = file.read(1) != b"\n"  # a killed process may have left an incomplete line
                file.write(b"\n" if torn else b"")
            file.write(f"{json.dumps(line)}\n".encode())
