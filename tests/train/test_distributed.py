"""Two real processes on loopback against one: the same data, the same losses, one decision."""

import dataclasses
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import train.loop
from falcon_relu.checkpoints.load import load_model
from falcon_relu.errors import FalconError
from falcon_relu.sharding import make_mesh
from tests.train import processes
from tests.train.runs import config_of, lose_a_file, make_data, run_until_stopped
from train.data.batches import DataConfig
from train.data.rows import Rows
from train.distributed import DistributedConfig
from train.folder.log import read_log

STEPS = 60
LOSS_TOLERANCE = 1e-4  # relative; sums over devices are added in another order


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data):
    """One process with eight devices, from beginning to end."""
    config = config_of(tmp_path_factory.mktemp("alone") / "run", data, steps=STEPS, checkpoint_every=10)
    train.loop.run(config)
    return config


def assert_same_run(config, alone):
    one, other = ([line for line in read_log(run.out / "log.jsonl") if "loss" in line] for run in (alone, config))
    assert [line["step"] for line in other] == list(range(1, STEPS + 1))
    # A row that was left out or read twice would change how many positions count.
    assert [line["count"] for line in other] == [line["count"] for line in one]
    for name in ("loss", "cross_entropy", "gradient_norm", "zeros"):
        few = 1e-4 if name == "zeros" else 0  # neurons within rounding of 0 fall on either side
        found, expected = ([line[name] for line in lines] for lines in (other, one))
        np.testing.assert_allclose(found, expected, rtol=LOSS_TOLERANCE, atol=few, err_msg=name)
    params = [load_model(run.out / "weights")[1] for run in (alone, config)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *params)


def freeze(pair: list[subprocess.Popen[str]], frozen: int) -> None:
    """Stops one of two processes for good: the other must end, and say why."""
    pair[frozen].send_signal(signal.SIGSTOP)
    status, output = processes.finish(pair[1 - frozen])
    pair[frozen].kill()
    pair[frozen].communicate()
    assert status == 1, output
    assert re.search(rf"process {frozen} \(.*\) has not been heard of for 10 s .*; it was at", output), output


@pytest.mark.slow  # its timing is not yet robust on a busy machine
def test_two_processes_train_as_one_does_and_end_when_one_is_stopped_for_good(tmp_path, data, alone):
    config, cache = dataclasses.replace(alone, out=tmp_path / "run"), tmp_path / "compiled"
    pair = processes.start_two(config, cache=cache)
    processes.wait_until(lambda: max(processes.whole_checkpoints(config.out), default=0) >= 10, pair[0])
    freeze(pair, 1)
    assert not (config.out / "metrics.json").exists()

    pair = processes.start_two_as_slurm(config, cache=cache)
    (status, first), (other_status, second) = map(processes.finish, pair)
    assert (status, other_status) == (0, 0), first + second
    assert re.search(r"run: \d+/60", first), first
    assert "run: " not in second
    assert processes.starts(config.out)[-1] >= 10
    assert_same_run(config, alone)


def test_from_one_process_to_two_and_back(tmp_path, data, alone, monkeypatch):
    config, cache = dataclasses.replace(alone, out=tmp_path / "run", checkpoint_every=5), tmp_path / "compiled"
    run_until_stopped(monkeypatch, config, 12)
    lose_a_file(config.out / "checkpoints" / "12")
    pair = processes.start_two(config, cache=cache)
    processes.wait_until(
        lambda: len(processes.starts(config.out)) > 1 and processes.last_step(config.out) > 12, pair[0]
    )
    pair[1].send_signal(signal.SIGTERM)
    ends = [processes.finish(process) for process in pair]
    assert [status for status, _ in ends] == [130, 130], ends
    assert "checkpoints/12 is damaged" in ends[0][1]
    stopped = processes.last_step(config.out)
    assert 12 < stopped < STEPS
    assert processes.whole_checkpoints(config.out)[-1] == stopped
    train.loop.run(config)
    assert processes.starts(config.out) == [0, 10, stopped]
    assert_same_run(config, alone)


@pytest.mark.slow
def test_two_processes_told_to_stop_or_stopped_for_good_at_random_end_with_the_same_bits(tmp_path, data):
    """SIGTERM comes to one of the two only."""
    cache, draw = tmp_path / "compiled", random.Random(13)
    straight = config_of(tmp_path / "straight", data, steps=STEPS, checkpoint_every=5, validate_every=15)
    ends = [processes.finish(process) for process in processes.start_two(straight, cache=cache)]
    assert [status for status, _ in ends] == [0, 0], ends
    run = dataclasses.replace(straight, out=tmp_path / "run")
    moments = [("starting", signal.SIGTERM)] * 3 + [("compiling", signal.SIGTERM)] * 2
    moments += [("stepping", signal.SIGTERM)] * 3 + [("compiling", signal.SIGSTOP), *[("stepping", signal.SIGSTOP)] * 2]
    for number, (moment, sign) in enumerate(draw.sample(moments, len(moments))):
        chosen, before, whole = number % 2, len(processes.starts(run.out)), processes.whole_checkpoints(run.out)
        pair = processes.start_two(run, cache=tmp_path / f"compiled {number}" if moment == "compiling" else cache)
        if moment == "starting":
            processes.wait_until(lambda one=pair[chosen]: processes.takes_signals(one), pair[chosen])
            time.sleep(draw.uniform(0, 5))
        else:
            processes.wait_until(lambda before=before: len(processes.starts(run.out)) > before, pair[0])
        if moment == "stepping":
            target = max(whole, default=0) + draw.randint(1, 5)
            processes.wait_until(lambda target=target: processes.last_step(run.out) >= target, pair[0])
        time.sleep(draw.uniform(0, 1 if moment == "compiling" else 0.05))
        if sign == signal.SIGSTOP:
            freeze(pair, chosen)
        else:
            pair[chosen].send_signal(sign)
            ends = [processes.finish(process) for process in pair]
            assert [status for status, _ in ends] == [130, 130], (moment, ends)
            kept = max(processes.whole_checkpoints(run.out), default=0)
            assert kept == processes.last_step(run.out) or kept == max(whole, default=0), (moment, whole, kept)
        assert set(whole[-1:]) <= set(processes.whole_checkpoints(run.out)), (moment, whole)
    ends = [processes.finish(process) for process in processes.start_two(run, cache=cache)]
    assert [status for status, _ in ends] == [0, 0], ends
    jax.tree.map(np.testing.assert_array_equal, *(load_model(config.out / "weights")[1] for config in (run, straight)))


LATE = """
import sys, time
import numpy as np
from falcon_relu.errors import FalconError
from train.distributed import DistributedConfig, joined, reached, wait_for_all
rank = int(sys.argv[2])
how = DistributedConfig(coordinator=sys.argv[1], num_processes=2, process_id=rank, wait_seconds=4)
with joined(how):
    from jax.experimental import multihost_utils
    wait_for_all("the start")
    multihost_utils.process_allgather(np.array(rank))
    reached("step 1")
    if rank == 1:
        time.sleep(600)
    try:
        wait_for_all("the vote")
    except FalconError as error:
        print(error, file=sys.stderr, flush=True)
    reached("step 2")
    multihost_utils.process_allgather(np.array(rank))
"""


def test_a_process_that_lives_but_does_not_come_is_named():
    """By the wait at a barrier, and in a collective by the thread that watches the others."""
    address = f"127.0.0.1:{processes.free_port()}"
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", LATE, address, str(rank)],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
        )
        for rank in range(2)
    ]
    said, other = (one.communicate(timeout=300)[1] for one in pair)
    assert [one.returncode for one in pair] == [1, 1], said + other
    assert "the vote: process 1 did not come within 4 s" in said, said
    assert re.search(
        r"process 1 \(.*\) lives but is late: it has been at step 1 for 4 s .* is at (step 2|the vote)", said
    )
    assert re.search(r"process 0 \(.*\) ended with an error, see its output", other), other


def test_every_row_is_held_whichever_way_the_mesh_lies():
    for shape in ((1, 8, 1), (2, 2, 2), (1, 1, 8)):
        mesh = make_mesh(shape)
        rows = Rows(mesh, 16)
        batch = {"tokens": np.arange(32).reshape(16, 2)}
        assert rows.own.tolist() == list(range(16))
        placed = rows.to_global(batch)["tokens"]
        np.testing.assert_array_equal(placed, batch["tokens"])
        assert len(placed.addressable_shards[0].data) == 16 // (shape[0] * shape[1])
    with pytest.raises(FalconError, match="12 rows cannot be divided evenly among the 8 devices"):
        Rows(make_mesh((1, 8, 1)), 12)


def test_contradictory_flags_are_refused():
    for wrong, message in (
        ({"auto": True, "process_id": 1}, "auto alone"),
        ({"coordinator": "a:1", "num_processes": 2}, "together"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "host:port"),
    ):
        with pytest.raises(FalconError, match=message):
            DistributedConfig(**wrong)


LISTENS = """
import sys
from train.distributed import DistributedConfig, joined
config = DistributedConfig(coordinator=sys.argv[1], num_processes=1, process_id=0)
with joined(config):
    port = f"{int(sys.argv[1].rpartition(':')[2]):04X}"
    for table in ("tcp", "tcp6"):
        for line in open(f"/proc/net/{table}").readlines()[1:]:
            _, here, _, state, *_ = line.split()
            if here.endswith(":" + port) and state == "0A":
                print(here)
"""


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="tells what listens by Linux's /proc")
def test_the_coordinator_listens_where_it_was_told_and_nowhere_else():
    port = processes.free_port()
    command = [sys.executable, "-c", LISTENS, f"127.0.0.1:{port}"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    mapped = "0000000000000000FFFF0000"  # an IPv4 address in IPv6's form
    addresses = {address.removeprefix(mapped) for address in done.stdout.split()}
    assert addresses == {f"0100007F:{port:04X}"}, done.stdout + done.stderr
