"""What may befall a run: killed at any moment, told to stop, a full disk, lost shards. Nothing finished is lost."""

import dataclasses
import random
import resource
import signal
import time

import jax
import numpy as np
import pytest

import train.loop
from falcon_relu.checkpoints.load import load_model
from falcon_relu.errors import FalconError
from falcon_relu.files import read_json
from tests.train import processes
from tests.train.runs import config_of, make_data, run_until_stopped
from train.data.batches import DataConfig

EVERY = 5  # steps between checkpoints
SPAN = 20  # steps that a run makes at most before it is killed
STEPS = 400
KILLS = ("starting", "starting", *("stepping", "writing") * 5)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    return make_data(tmp_path_factory.mktemp("data"))


def test_killed_and_stopped_at_random_it_ends_with_the_same_bits(tmp_path, data):
    cache = tmp_path / "compiled"
    straight = dataclasses.replace(config_of(tmp_path / "straight", data), steps=STEPS, checkpoint_every=EVERY)
    status, output = processes.finish(processes.start(straight, devices=2, cache=cache))
    assert status == 0, output
    run = dataclasses.replace(straight, out=tmp_path / "run")
    draw = random.Random(time.time_ns())
    moments = [(signal.SIGKILL, moment) for moment in KILLS] + [(signal.SIGTERM, "stepping")] * 2
    draw.shuffle(moments)
    for sign, moment in moments:
        whole = max(processes.whole_checkpoints(run.out), default=0)
        before = len(processes.starts(run.out))
        process = processes.start(run, devices=2, cache=cache)
        if moment == "starting":
            time.sleep(draw.uniform(0, 4))
        else:
            processes.wait_until(lambda before=before: len(processes.starts(run.out)) > before, process)
            target = whole + draw.randint(1, SPAN)
            processes.wait_until(lambda target=target: processes.last_step(run.out) >= target, process)
            if moment == "writing":
                processes.wait_until(lambda: processes.being_written(run.out), process)
            else:
                time.sleep(draw.uniform(0, 0.05))
        process.send_signal(sign)
        status, output = processes.finish(process)
        assert status == (-signal.SIGKILL if sign == signal.SIGKILL else 130), output
        kept, logged = max(processes.whole_checkpoints(run.out), default=0), processes.last_step(run.out)
        assert whole <= kept
        assert logged - kept <= (2 * EVERY if sign == signal.SIGKILL else 0)  # one may have been on its way
        assert all(begun == whole for begun in processes.starts(run.out)[before:])
    assert processes.last_step(run.out) < STEPS
    status, output = processes.finish(processes.start(run, devices=2, cache=cache))
    assert status == 0, output
    jax.tree.map(np.testing.assert_array_equal, *(load_model(config.out / "weights")[1] for config in (run, straight)))
    assert read_json(run.out / "metrics.json") == read_json(straight.out / "metrics.json")
    lines = [line["step"] for line in processes.read_log(run.out / "log.jsonl") if "loss" in line]
    assert lines == list(range(1, STEPS + 1))


def test_full_disks_and_lost_shards_lose_nothing(tmp_path, data, monkeypatch):
    straight = train.loop.run(config_of(tmp_path / "straight", data))
    config = config_of(tmp_path / "run", data)
    run_until_stopped(monkeypatch, config, 4)
    checkpoints = processes.whole_checkpoints(config.out)
    assert checkpoints == [3, 4]

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # writing on fails as on a full disk
    try:
        with pytest.raises(FalconError, match=r"could not write a checkpoint to .*run.*disk full"):
            train.loop.run(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert processes.whole_checkpoints(config.out) == checkpoints

    shard = next(data.sources[0].path.glob("train-*.array_record"))
    away = shard.rename(shard.with_suffix(".away"))
    try:
        with pytest.raises(FalconError, match=f"{shard.name} is missing"):
            train.loop.run(config)
    finally:
        away.rename(shard)
    assert processes.whole_checkpoints(config.out) == checkpoints
    assert train.loop.run(config) == straight
