"""What may befall a run: killed at any moment, told to stop, a full disk, lost shards. Nothing finished is lost."""

import dataclasses
import random
import resource
import signal
import time
from typing import Any

import jax
import numpy as np
import pytest

import train.loop
from falcon_relu.checkpoints.load import load_model
from falcon_relu.errors import FalconError
from falcon_relu.files import read_json
from falcon_relu.generation import Sampling
from tests.train import processes
from tests.train.runs import config_of, make_data, run_until_stopped
from train.config import SamplesConfig, TrainConfig
from train.data.batches import DataConfig

SPAN = 20  # steps that a run makes before it is interrupted, more or less
FEW = (
    *((signal.SIGKILL, moment) for moment in ("starting", "stepping", "writing", "writing")),
    *((signal.SIGTERM, moment) for moment in ("starting", "compiling", "stepping", "validating")),
)
MANY = (
    tuple(
        (signal.SIGTERM, moment)
        for moment, times in (("starting", 6), ("compiling", 3), ("stepping", 4), ("validating", 2), ("sampling", 2))
        for _ in range(times)
    )
    + ((signal.SIGTERM, "writing"),) * 2
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    ("interruptions", "steps", "every"),
    [(FEW, 400, 5), pytest.param(MANY, 2000, 20, marks=pytest.mark.slow)],
    ids=["few", "many"],
)
def test_killed_and_stopped_at_random_it_ends_with_the_same_bits(tmp_path, data, interruptions, steps, every):
    cache, seed = tmp_path / "compiled", 13
    straight = dataclasses.replace(config_of(tmp_path / "straight", data), steps=steps, checkpoint_every=every)
    begun = time.monotonic()
    process = processes.start(straight, devices=2, cache=cache)
    processes.wait_until(lambda: bool(processes.starts(straight.out)), process)
    start_seconds = time.monotonic() - begun
    status, output = processes.finish(process)
    assert status == 0, output
    run = dataclasses.replace(straight, out=tmp_path / "run")
    draw = random.Random(seed)
    shuffled = draw.sample(interruptions, len(interruptions))
    for number, (sign, moment) in enumerate([*shuffled, (signal.SIGTERM, "ending")]):
        whole = max(processes.whole_checkpoints(run.out), default=0)
        before, logged_before = len(processes.starts(run.out)), processes.last_step(run.out)
        now = moment_settings(run, moment, data)
        compiled = tmp_path / f"compiled {number}" if moment == "compiling" else cache
        process = processes.start(now, devices=2, cache=compiled)
        wait_for(moment, process, now, draw, before, start_seconds)
        process.send_signal(signal.SIGSTOP)  # so that nothing is done between the look at the log and the signal
        seen = max(processes.last_step(run.out), whole)
        process.send_signal(sign)
        process.send_signal(signal.SIGCONT)
        status, output = processes.finish(process)
        ended = (run.out / "metrics.json").exists()
        allowed = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 0 if ended else 130}
        assert status == allowed[sign], (moment, output)
        kept, logged = max(processes.whole_checkpoints(run.out), default=0), processes.last_step(run.out)
        where = f"{sign.name} {moment}: checkpoints {whole} -> {kept}, log {logged_before} -> {logged}, at {seen}"
        assert whole <= kept, where
        if sign == signal.SIGKILL:
            assert logged - kept <= 2 * every, where  # one may have been on its way
        else:
            assert kept <= seen + 3, where  # the log is a step behind
            assert logged == kept or (kept, logged) == (whole, logged_before), where
        assert all(start == whole for start in processes.starts(run.out)[before:])
    assert processes.last_step(run.out) == steps
    status, output = processes.finish(processes.start(run, devices=2, cache=cache))
    assert status == 0, output
    jax.tree.map(np.testing.assert_array_equal, *(load_model(config.out / "weights")[1] for config in (run, straight)))
    assert read_json(run.out / "metrics.json") == read_json(straight.out / "metrics.json")
    lines = [line["step"] for line in processes.read_log(run.out / "log.jsonl") if "loss" in line]
    assert lines == list(range(1, steps + 1))


def moment_settings(run: TrainConfig, moment: str, data: DataConfig) -> TrainConfig:
    """The run, with what it must do for the moment to come."""
    if moment == "validating":
        return dataclasses.replace(run, validate_every=5)
    if moment == "sampling":
        tokenizer, sampling = data.sources[0].path.parent / "tokenizer.json", Sampling(max_new_tokens=8)
        samples = SamplesConfig(every=5, prompts=("The number 7 is",), tokenizer=tokenizer, sampling=sampling)
        return dataclasses.replace(run, samples=samples)
    return run


def wait_for(
    moment: str, process: Any, run: TrainConfig, draw: random.Random, before: int, start_seconds: float
) -> None:
    """Returns at the moment, as far as that can be told from outside."""
    if moment == "starting":
        processes.wait_until(lambda: processes.takes_signals(process), process)
        time.sleep(draw.uniform(0, start_seconds))
        return
    processes.wait_until(lambda: len(processes.starts(run.out)) > before, process)
    if moment == "compiling":
        time.sleep(draw.uniform(0, 0.4))
        return
    first = max(processes.whole_checkpoints(run.out), default=0)
    target = run.steps if moment == "ending" else first + draw.randint(1, SPAN)
    if moment in ("validating", "sampling"):
        target += -target % 5
    processes.wait_until(lambda: processes.last_step(run.out) >= target, process)
    if moment == "writing":
        processes.wait_until(lambda: processes.being_written(run.out), process)
    else:
        time.sleep(draw.uniform(0, 0.3 if moment == "ending" else 0.05))


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
