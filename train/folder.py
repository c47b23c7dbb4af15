"""The folder of a run: whose it is, how often it was started, what the model is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import jax

from falcon_relu.config import FalconConfig
from falcon_relu.errors import FalconError
from falcon_relu.files import read_json, write_json
from train.checkpoints import writing
from train.config import TrainConfig, changed_settings
from train.distributed import all_agree, check_same, wait_for_all

_CONFIG = "config.json"
_ARCHITECTURE = "architecture.json"
_STARTS = "starts.jsonl"
_FIGURES = "figures.json"


def claim(config: TrainConfig) -> dict[str, Any] | None:
    """Makes the run's folder, or makes sure that it is this run's; returns the figures of a finished run.

    Raises:
      FalconError: the folder holds a run whose result would be another, or is not on a disk that all processes share.
    """
    path, wanted = config.out / _CONFIG, config.as_json()
    check_same(hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).digest(), "settings")
    changed = changed_settings(read_json(path), wanted) if path.exists() else []
    if changed:
        raise FalconError(
            f"{config.out} holds a run with other settings ({', '.join(changed)}); choose another --out, or remove it"
        )
    wait_for_all("looked at the folder")
    if jax.process_index() == 0:
        with writing(str(path)):
            write_json(path, wanted)
    wait_for_all("claimed the folder")
    if not all_agree(path.exists()):
        raise FalconError(f"{config.out} is not on a disk that all {jax.process_count()} processes share")
    figures = config.out / _FIGURES
    return read_json(figures) if all_agree(figures.exists()) else None


def finish(out: Path, figures: dict[str, Any]) -> None:
    """Marks the run as finished."""
    if jax.process_index() == 0:
        write_json(out / _FIGURES, figures)


def write_architecture(out: Path, architecture: FalconConfig) -> None:
    """Keeps what the student is, so that going on needs no look at where it started from."""
    if jax.process_index() == 0:
        write_json(out / _ARCHITECTURE, dataclasses.asdict(architecture))


def read_architecture(out: Path) -> FalconConfig:
    """What the student is.

    Raises:
      FalconError: the file is missing or damaged.
    """
    try:
        return FalconConfig(**read_json(out / _ARCHITECTURE))
    except (TypeError, ValueError) as error:
        raise FalconError(f"{out / _ARCHITECTURE} holds no valid config: {error}") from None


def note_start(config: TrainConfig, step: int, mesh: jax.sharding.Mesh) -> None:
    """Adds a line on this start: when, from which step, on what."""
    if jax.process_index() == 0:
        line = {
            "step": step,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "processes": jax.process_count(),
            "mesh": dict(mesh.shape),
            "device": jax.devices()[0].device_kind,
        }
        with writing(str(config.out / _STARTS)), (config.out / _STARTS).open("a") as file:
            file.write(json.dumps(line) + "\n")
