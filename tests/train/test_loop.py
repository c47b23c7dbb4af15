from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

import train.loop
from falcon_relu.checkpoint import load_model
from falcon_relu.config import family
from falcon_relu.errors import FalconError
from falcon_relu.native import save_params
from falcon_relu.tokenizer import train_bpe
from tests.conftest import random_params
from train.config import OptimizerConfig, TrainConfig
from train.data import DataConfig, Source
from train.loop import validate
from train.loss import LossConfig
from train.prepare import PrepareConfig, prepare

TEXT = [
    f"The number {i} is {'even' if i % 2 == 0 else 'odd'}, and after the number {i} comes the number {i + 1}."
    for i in range(600)
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT))
    train_bpe(TEXT, 400, folder / "tokenizer.json")
    prepare(
        PrepareConfig(
            inputs=(str(folder / "text.jsonl"),),
            tokenizer=folder / "tokenizer.json",
            out=folder / "tokens",
            seq_len=32,
            validation_fraction=0.1,
            processes=1,
        )
    )
    return DataConfig(sources=(Source(folder / "tokens"),), seq_len=32, batch_size=8)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "weights"
    save_params(folder, family("tiny-40b"), random_params(family("tiny-40b")))
    return folder


def _config(out: Path, data: DataConfig, **changes: object) -> TrainConfig:
    fields = {
        "model": "tiny-40b",
        "optimizer": OptimizerConfig(learning_rate=5e-3, warmup_steps=2),
        "steps": 8,
        "compute_dtype": "float32",
        "teacher_dtype": "float32",
        "checkpoint_every": 3,
        "log_every": 1,
    }
    return TrainConfig(out=out, data=data, **(fields | changes))


def test_a_model_learns_and_a_swapped_student_is_won_back(tmp_path, data):
    learned = train.loop.train(_config(tmp_path / "teacher", data, steps=60, validate_every=30))
    assert learned["cross_entropy"] < 2.0 < np.log(400)
    weights = tmp_path / "teacher" / "weights"
    roundabout = weights / ".." / "weights"
    swapped = validate(roundabout, data, activation="relu", teacher=weights)
    student = _config(
        tmp_path / "student",
        data,
        model=None,
        init_from=str(weights),
        activation="relu",
        teacher=str(weights),
        loss=LossConfig(lm_weight=0.0, kd_weight=1.0),
        steps=30,
    )
    tuned = train.loop.train(student)
    assert tuned["kl"] < 0.5 * swapped["kl"]
    assert tuned["teacher_cross_entropy"] == pytest.approx(learned["cross_entropy"], rel=1e-4)
    assert validate(tmp_path / "student" / "weights", data, teacher=weights)["kl"] == pytest.approx(
        tuned["kl"], rel=1e-3
    )
    config, _ = load_model(tmp_path / "student" / "weights")
    assert config.activation == "relu"
    lines = [json.loads(line) for line in (tmp_path / "teacher" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation" in line] == [30, 60]
    assert train.loop.train(student) == tuned  # a finished run is not run again


def test_a_stopped_run_goes_on_to_the_same_end_bit_for_bit(tmp_path, data, teacher, monkeypatch):
    taught = {"teacher": str(teacher), "loss": LossConfig(kd_weight=1.0)}
    straight = train.loop.train(_config(tmp_path / "straight", data, **taught))
    stopped = _config(tmp_path / "stopped", data, **taught)
    original, seen = train.loop._to_global, []

    def signal_at(batch, mesh):
        seen.append(1)
        if len(seen) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(batch, mesh)

    monkeypatch.setattr(train.loop, "_to_global", signal_at)
    with pytest.raises(KeyboardInterrupt):
        train.loop.train(stopped)
    assert len(seen) == 5
    assert not (tmp_path / "stopped" / "weights").exists()
    monkeypatch.setattr(train.loop, "_to_global", original)
    assert train.loop.train(stopped) == straight
    jax.tree.map(
        np.testing.assert_array_equal,
        load_model(tmp_path / "stopped" / "weights")[1],
        load_model(tmp_path / "straight" / "weights")[1],
    )


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, data, caplog):
    config = _config(tmp_path / "run", data)
    straight = train.loop.train(config)
    for left in ("figures.json", "weights/falcon.json"):
        (tmp_path / "run" / left).unlink()
    newest = tmp_path / "run" / "checkpoints" / "8"
    for file in newest.rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(b"\0" * 100)
    assert train.loop.train(config) == straight
    assert "checkpoints/8" in caplog.text


def test_runs_that_go_wrong_stop_with_a_message(tmp_path, data):
    with pytest.raises(FalconError, match="3 steps in a row"):
        train.loop.train(
            _config(
                tmp_path / "hot", data, max_bad_steps=3, optimizer=OptimizerConfig(learning_rate=1e30, clip_norm=1e30)
            )
        )
    train.loop.train(_config(tmp_path / "run", data, steps=3))
    with pytest.raises(FalconError, match=r"other settings \(steps, seed\)"):
        train.loop.train(_config(tmp_path / "run", data, steps=4, seed=1))
    small = family("tiny-40b").replace(vocab_size=50)
    save_params(tmp_path / "small", small, random_params(small))
    with pytest.raises(FalconError, match="vocabular"):
        train.loop.train(_config(tmp_path / "vocab", data, model=None, init_from=str(tmp_path / "small")))


def test_contradictory_configs_are_refused(tmp_path, data):
    good = _config(tmp_path, data)
    for wrong, name in (
        ({"model": None}, "init_from"),
        ({"model": "falcon-41b"}, "falcon-41b"),
        ({"loss": LossConfig(kd_weight=1.0)}, "teacher"),
        ({"microbatches": 3}, "microbatches"),
        ({"steps": 1}, "warmup"),
        ({"query_chunk": 5}, "query_chunk"),
    ):
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(good, **wrong)
