"""Runs in real processes: `falcon-relu train` as a user starts it, on virtual CPU devices."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from train.config import TrainConfig
from train.folder.log import read_log

IMPORTS = """
from pathlib import PosixPath
from falcon_relu.generation import Sampling
from train.config import *
from train.data.batches import DataConfig, Source
from train.loss import LossConfig
"""


def write_config(config: TrainConfig) -> Path:
    """A config module beside the run's folder."""
    path = config.out.with_suffix(".py")
    path.write_text(f"{IMPORTS}\nCONFIG = {config!r}\n")
    return path


def start(
    config: TrainConfig, *arguments: str, devices: int = 8, cache: Path | None = None, **env: str
) -> subprocess.Popen[str]:
    """Starts one process; its output is collected in a pipe."""
    command = [sys.executable, "-m", "falcon_relu", "train", "--config", str(write_config(config)), *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)} | env
    if cache is not None:  # starting takes seconds, most of it compiling
        environment |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_two(
    config: TrainConfig, *arguments: str, devices: int = 4, cache: Path | None = None
) -> list[subprocess.Popen[str]]:
    """Starts two processes of one run with so many devices each, told of each other by flags."""
    where = ["--distributed.coordinator", f"127.0.0.1:{free_port()}", "--distributed.num-processes", "2"]
    where += ["--distributed.heartbeat-seconds", "10"]
    return [
        start(config, *where, "--distributed.process-id", str(i), *arguments, devices=devices, cache=cache)
        for i in range(2)
    ]


def start_two_as_slurm(config: TrainConfig, cache: Path | None = None) -> list[subprocess.Popen[str]]:
    """The same, in the environment that srun would give them."""
    job = {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2"}
    return [
        start(config, "--distributed.auto", devices=4, cache=cache, SLURM_PROCID=str(i), SLURM_LOCALID=str(i), **job)
        for i in range(2)
    ]


def finish(process: subprocess.Popen[str], timeout: float = 300) -> tuple[int, str]:
    """Exit status and output."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        raise AssertionError(f"no end after {timeout} s:\n{output[-4000:]}") from None
    return process.returncode, output


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], timeout: float = 300) -> None:
    """Polls; the process must not end before."""
    end = time.monotonic() + timeout
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            output, _ = process.communicate()
            raise AssertionError(f"status {process.returncode} while waited for:\n{output[-4000:]}")
        time.sleep(0.002)


def takes_signals(process: subprocess.Popen[str]) -> bool:
    """Whether SIGTERM no longer ends the process as it would any program: Python has begun, and caught it (Linux)."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def last_step(out: Path) -> int:
    """The last step in the log."""
    return max((line["step"] for line in read_log(out / "log.jsonl")), default=0)


def starts(out: Path) -> list[int]:
    """The steps that the run was started from."""
    path = out / "starts.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def whole_checkpoints(out: Path) -> list[int]:
    """Steps of the checkpoints that were written to their end."""
    folder = out / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []


def being_written(out: Path) -> bool:
    """Whether a checkpoint is on its way."""
    return any("tmp" in path.name for path in (out / "checkpoints").iterdir())
