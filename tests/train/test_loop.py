from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import train.loop
from falcon_relu.checkpoints.load import load_model
from falcon_relu.checkpoints.native import save_params
from falcon_relu.config import family
from falcon_relu.errors import FalconError
from falcon_relu.generation import Sampling
from falcon_relu.sharding import make_mesh
from tests.conftest import opened_files, random_params
from tests.train.runs import (
    assert_same_weights,
    config_of,
    cut,
    flip_a_bit,
    lose_a_file,
    make_data,
    run_until_stopped,
)
from train.config import OptimizerConfig, SamplesConfig
from train.data.batches import DataConfig, Source
from train.data.prepare import PrepareConfig, prepare
from train.distributed import DistributedConfig
from train.folder.checkpoints import fingerprint
from train.folder.log import read_log
from train.loss import LossConfig
from train.validation import validate


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "weights"
    save_params(folder, family("tiny-40b"), random_params(family("tiny-40b")))
    return folder


def test_a_model_learns_and_a_swapped_student_is_won_back(tmp_path, data):
    learned = train.loop.run(config_of(tmp_path / "teacher", data, steps=60, validate_every=30))
    assert learned["cross_entropy"] < 2.0 < np.log(400)
    weights = tmp_path / "teacher" / "weights"
    roundabout = weights / ".." / "weights"
    swapped = validate(roundabout, data, activation="relu", teacher=weights)
    student = config_of(
        tmp_path / "student",
        data,
        model=None,
        init_from=str(weights),
        activation="relu",
        teacher=str(weights),
        loss=LossConfig(lm_weight=0.0, kd_weight=1.0),
        steps=30,
    )
    with opened_files() as opened:
        tuned = train.loop.run(student)
    manifests = [Path(source.path) / "manifest.json" for source in data.sources]
    for path in [*manifests, *(path for path in weights.rglob("[0-9]*") if path.is_file())]:
        assert opened[str(path.resolve())] == 1, path  # student and teacher start from the same files
    assert opened[str((weights / "falcon.json").resolve())] <= 1  # it was parsed for `validate` already
    assert tuned["kl"] < 0.5 * swapped["kl"]
    assert tuned["teacher_cross_entropy"] == pytest.approx(learned["cross_entropy"], rel=1e-4)
    assert validate(tmp_path / "student" / "weights", data, teacher=weights)["kl"] == pytest.approx(
        tuned["kl"], rel=1e-3
    )
    config, _ = load_model(tmp_path / "student" / "weights")
    assert config.activation == "relu"
    lines = [json.loads(line) for line in (tmp_path / "teacher" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation" in line] == [30, 60]
    assert train.loop.run(student) == tuned  # a finished run is not run again


def test_a_run_stopped_in_its_validation_goes_on_to_the_same_end_bit_for_bit(tmp_path, data, teacher, monkeypatch):
    taught = {"teacher": str(teacher), "loss": LossConfig(kd_weight=1.0), "validate_every": 4}
    straight = train.loop.run(config_of(tmp_path / "straight", data, **taught))
    stopped = config_of(tmp_path / "stopped", data, **taught)
    run_until_stopped(monkeypatch, stopped, 5)  # four of training, then the first of the validation rows
    assert (tmp_path / "stopped" / "checkpoints" / "4").is_dir()
    assert not (tmp_path / "stopped" / "weights").exists()
    log = tmp_path / "stopped" / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 6, "loss": 3.0}\n{"step": 7, "lo')  # lost work, and a torn line
    assert train.loop.run(stopped) == straight
    assert_same_weights(tmp_path / "stopped", tmp_path / "straight")
    names = ("step", "loss", "kl", "agreement", "gradient_norm", "learning_rate", "zeros")
    stopped_lines, straight_lines = (
        [[line.get(name) for name in names] for line in read_log(tmp_path / run / "log.jsonl")]
        for run in ("stopped", "straight")
    )
    assert stopped_lines == straight_lines
    assert [line[0] for line in straight_lines] == [*range(1, 5), 4, *range(5, 9), 8]


def test_a_run_goes_on_elsewhere_with_other_settings_of_how(tmp_path, data, monkeypatch):
    whole = train.loop.run(config_of(tmp_path / "whole", data))
    run_until_stopped(monkeypatch, config_of(tmp_path / "run", data), 4)
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    shards = shutil.copytree(data.sources[0].path, tmp_path / "tokens")
    here = dataclasses.replace(data, sources=(Source(shards),))
    metrics = train.loop.run(
        config_of(moved, here, mesh=(2, 2, 2), microbatches=2, checkpoint_every=2, remat="full", query_chunk=8)
    )
    assert metrics["cross_entropy"] == pytest.approx(whole["cross_entropy"], rel=1e-4)
    assert_same_weights(moved, tmp_path / "whole", rtol=1e-3, atol=1e-4)
    starts = [json.loads(line) for line in (moved / "starts.jsonl").read_text().splitlines()]
    assert [(start["step"], start["mesh"]["tensor"]) for start in starts] == [(0, 1), (4, 2)]


def test_rows_prepared_again_are_noticed(tmp_path, data, monkeypatch):
    run_until_stopped(monkeypatch, config_of(tmp_path / "run", data), 2)
    again = PrepareConfig(
        inputs=(str(data.sources[0].path.parent / "tokens.jsonl"),),
        tokenizer=data.sources[0].path.parent / "tokenizer.json",
        out=tmp_path / "again",
        seq_len=32,
        validation_fraction=0.1,
        seed=1,
        processes=1,
    )
    prepare(again)
    other = dataclasses.replace(data, sources=(Source(again.out),))
    with pytest.raises(FalconError, match="began with other rows than are there now in: source 0"):
        train.loop.run(config_of(tmp_path / "run", other))


def test_damaged_checkpoints_are_passed_over_for_the_one_before(tmp_path, data, caplog):
    config = config_of(tmp_path / "run", data, checkpoint_every=2, keep_checkpoints=4)
    straight = train.loop.run(config)
    checkpoints = tmp_path / "run" / "checkpoints"
    for step, damage in ((8, flip_a_bit), (6, cut), (4, lose_a_file)):
        damage(checkpoints / str(step))
    (checkpoints / "9.orbax-checkpoint-tmp").mkdir()  # as a killed process leaves it
    (tmp_path / "run" / "metrics.json").unlink()
    assert train.loop.run(config) == straight
    for step in (8, 6, 4):
        assert f"checkpoints/{step} is damaged" in caplog.text
        assert (checkpoints / f"{step}.damaged").is_dir()
    assert sorted(path.name for path in checkpoints.iterdir() if path.name.isdigit()) == ["2", "4", "6", "8"]
    for step in (2, 4, 6, 8):
        lose_a_file(checkpoints / str(step))
    (tmp_path / "run" / "metrics.json").unlink()
    with pytest.raises(FalconError, match=r"none of the checkpoints .* 8: .* 2: "):
        train.loop.run(config)
    assert (checkpoints / "8").is_dir()  # nothing is set aside, nothing is trained anew


def test_fingerprints_show_any_bit_and_not_the_mesh():
    state = {"a": np.random.default_rng(0).normal(size=(8, 16, 4)).astype(np.float32), "b": np.int32(3)}
    want = fingerprint(state)
    mesh = make_mesh((1, 8, 1))
    split = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    assert fingerprint(state | {"a": jax.device_put(state["a"], split)}) == want
    for place in ((0, 0, 0), (7, 15, 3), (3, 8, 1)):
        other = state["a"].copy()
        other.view(np.uint32)[place] ^= 1 << 31
        assert fingerprint(state | {"a": other}) != want
    assert fingerprint(state | {"a": state["a"][:, ::-1]}) != want
    assert fingerprint(state | {"b": np.int32(4)}) != want


def test_a_run_shows_what_it_does(tmp_path, data, teacher):
    from tensorboardX.proto.event_pb2 import Event

    tokenizer = data.sources[0].path.parent / "tokenizer.json"
    prompt = "The number 7 is"
    config = config_of(
        tmp_path / "run",
        data,
        teacher=str(teacher),
        loss=LossConfig(kd_weight=1.0),
        validate_every=4,
        checkpoint_every=2,
        keep_checkpoints=1,
        keep_every=4,
        profile=(2, 3),
        samples=SamplesConfig(every=8, prompts=(prompt,), tokenizer=tokenizer, sampling=Sampling(max_new_tokens=4)),
    )
    train.loop.run(config)
    lines = read_log(config.out / "log.jsonl")
    last = [line for line in lines if "loss" in line][-1]
    wanted = {"loss", "cross_entropy", "kl", "agreement", "zeros", "gradient_norm", "learning_rate"}
    wanted |= {"tokens_per_second", "model_flops_per_second", "skipped"}
    assert wanted <= last.keys()
    assert len(last["zeros"]) == family("tiny-40b").n_layers
    assert [line["step"] for line in lines if "validation" in line] == [4, 8]
    (texts,) = [line["samples"] for line in lines if "samples" in line]
    assert list(texts) == [prompt]
    assert texts[prompt]
    assert sorted(path.name for path in (config.out / "checkpoints").iterdir() if path.name.isdigit()) == ["4", "8"]
    board = config.out / "tensorboard"
    assert list(board.rglob("*.xplane.pb"))
    scalars = set()
    (events,) = board.glob("events.*")
    data_bytes = events.read_bytes()
    while data_bytes:  # TFRecord: length, its CRC, the record, its CRC
        size = int.from_bytes(data_bytes[:8], "little")
        event = Event.FromString(data_bytes[12 : 12 + size])
        scalars |= {(value.tag, event.step) for value in event.summary.value}
        data_bytes = data_bytes[16 + size :]
    assert {("train/kl", 8), ("train/zeros", 1), ("validation/kl", 4), ("samples/0/text_summary", 8)} <= scalars


def test_runs_that_go_wrong_stop_with_a_message(tmp_path, data):
    with pytest.raises(FalconError, match="3 steps in a row"):
        train.loop.run(
            config_of(
                tmp_path / "hot", data, max_bad_steps=3, optimizer=OptimizerConfig(learning_rate=1e30, clip_norm=1e30)
            )
        )
    train.loop.run(config_of(tmp_path / "run", data, steps=3))
    with pytest.raises(FalconError, match=r"other settings \(steps, seed\)"):
        train.loop.run(config_of(tmp_path / "run", data, steps=4, seed=1))
    small = family("tiny-40b").replace(vocab_size=50)
    save_params(tmp_path / "small", small, random_params(small))
    with pytest.raises(FalconError, match="vocabular"):
        train.loop.run(config_of(tmp_path / "vocab", data, model=None, init_from=str(tmp_path / "small")))


def test_contradictory_configs_are_refused(tmp_path, data):
    good = config_of(tmp_path, data)
    for wrong, name in (
        ({"model": None}, "init_from"),
        ({"model": "falcon-41b"}, "falcon-41b"),
        ({"loss": LossConfig(kd_weight=1.0)}, "teacher"),
        ({"microbatches": 3}, "microbatches"),
        ({"steps": 1}, "warmup"),
        ({"query_chunk": 5}, "query_chunk"),
        ({"keep_every": 4}, "keep_every"),
        ({"profile": (3, 2)}, "profile"),
        ({"seed": -1}, "seed"),
        ({"mesh": (0, 1, 1)}, "mesh"),
        ({"validate_every": -1}, "validate_every"),
        ({"activation_shift": math.nan}, "activation_shift"),
        ({"data": dataclasses.replace(data, seq_len=31), "loss": LossConfig(chunk=8)}, "seq_len"),
    ):
        with pytest.raises(FalconError, match=name):
            dataclasses.replace(good, **wrong)
    for wrong, name in (
        (lambda: OptimizerConfig(learning_rate=math.nan), "learning_rate"),
        (lambda: OptimizerConfig(learning_rate=1e-3, final_learning_rate=1.0), "final_learning_rate"),
        (lambda: OptimizerConfig(clip_norm=math.inf), "clip_norm"),
        (lambda: OptimizerConfig(b2=1.0), "b2"),
        (lambda: LossConfig(temperature=math.nan), "temperature"),
        (lambda: LossConfig(lm_weight=0.0), "lm_weight"),
        (lambda: LossConfig(l1_stages=((5, math.inf),)), "l1_stages"),
        (lambda: SamplesConfig(every=1), "prompts"),
        (lambda: SamplesConfig(prompts=("",)), "prompts"),
        (lambda: DistributedConfig(start_seconds=0), "start_seconds"),
        (lambda: DistributedConfig(coordinator="a:1", num_processes=2, process_id=2), "process_id"),
    ):
        with pytest.raises(FalconError, match=name):
            wrong()
