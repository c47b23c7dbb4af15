"""launch/slurm.sh on a real SLURM: signalled before its limit, put back into the queue, resumed, finished.

    apt-get install slurm-wlm munge
    python -m pytest -m slow -n 0 tests/train/test_slurm.py

It takes about six minutes, most of them waiting: SLURM looks at its jobs' limits every 30 seconds. Where a start takes
longer than usual, because the machine is busy, the limit is longer than a minute, and so are the steps.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.train import processes, slurm
from tests.train.launches import LAUNCH
from tests.train.runs import assert_same_weights, config_of, make_data

STEPS = 120
BUSY = ("--distributed.heartbeat-seconds", "600")  # on a busy machine a process may be silent for long
PACE = """
# A step takes a second at least, on the fastest of machines too, so that the run outlives its limit.
import os, time
from train.watch import Trace
before = Trace.before
Trace.before = lambda self, number: time.sleep(float(os.environ["PACE"])) or before(self, number)
"""


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.skipif(slurm.missing() is not None, reason=str(slurm.missing()))
def test_a_run_of_slurm_outlives_its_limit_twice_and_ends_with_the_same_bits(tmp_path):
    data = make_data(tmp_path)
    alone = config_of(tmp_path / "alone", data, steps=STEPS, checkpoint_every=0)
    for process in processes.start_two(alone, *BUSY, devices=1, cache=tmp_path / "compiled"):
        status, output = processes.finish(process)
        assert status == 0, output
    # The limit in minutes: one, where a start with compiled programs takes less than 25 s.
    begin, again = time.monotonic(), dataclasses.replace(alone, out=tmp_path / "again")
    pair = processes.start_two(again, *BUSY, devices=1, cache=tmp_path / "compiled")
    processes.wait_until(lambda: processes.last_step(again.out) > 0, pair[0])
    minutes = 1 + int((time.monotonic() - begin) / 25)
    for process in pair:
        process.terminate()
        processes.finish(process)

    config = dataclasses.replace(alone, out=tmp_path / "run")
    path = processes.write_config(config)
    path.write_text(path.read_text() + PACE)
    venv = tmp_path / "venv" / "bin"
    venv.mkdir(parents=True)
    (venv / "activate").write_text(f"export PATH={Path(sys.executable).parent}:$PATH\n")
    tiny = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", f"--time={minutes}"]
    tiny += ["--signal=TERM@1", f"--output={tmp_path}/log"]  # SLURM sends it up to 30 s before that
    env = {
        "VENV": str(venv.parent),
        "PACE": str(minutes),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with tempfile.TemporaryDirectory(prefix="slurm") as folder, slurm.cluster(Path(folder), cpus=2) as cluster:
        words = ["sbatch", "--parsable", *tiny, str(LAUNCH / "slurm.sh"), "--config", str(path), *BUSY]
        number = cluster.command(*words, **env).strip()
        end = time.monotonic() + 2000
        while (job := cluster.job(number))["JobState"] not in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED"):
            said = (tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""
            assert time.monotonic() < end, said + cluster.logs()
            time.sleep(1)
        said = (tmp_path / "log").read_text()
        assert (job["JobState"], job["TimeLimit"]) == ("COMPLETED", f"00:{minutes:02}:00"), said + cluster.logs()
    assert int(job["Restarts"]) >= 2, said
    starts = processes.starts(config.out)
    assert starts == sorted(set(starts)), starts
    assert len(starts) >= 3, starts  # each went on from where the one before had stopped
    assert_same_weights(alone.out, config.out, atol=0)
