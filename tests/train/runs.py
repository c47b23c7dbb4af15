"""Small runs that several tests make: their data, their settings, how they are stopped and damaged."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

import train.loop
from falcon_relu.checkpoints.load import load_model
from falcon_relu.tokenizer import train_bpe
from tests.train.data.texts import prepare_texts
from train.config import OptimizerConfig, TrainConfig
from train.data.batches import DataConfig, Source
from train.data.rows import Rows
from train.processes.signals import Stopped

TEXT = [
    f"The number {i} is {'even' if i % 2 == 0 else 'odd'}, and after the number {i} comes the number {i + 1}."
    for i in range(600)
]


def make_data(folder: Path) -> DataConfig:
    """Text, tokenizer and shards below `folder`."""
    train_bpe(TEXT, 400, folder / "tokenizer.json")
    prepare_texts(folder / "tokens", TEXT, folder / "tokenizer.json", seq_len=32, validation_fraction=0.1)
    return DataConfig(sources=(Source(folder / "tokens"),), seq_len=32, batch_size=8)


def config_of(out: Path, data: DataConfig, **changes: object) -> TrainConfig:
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


def run_until_stopped(monkeypatch, config: TrainConfig, step: int) -> None:
    """Trains; SIGTERM comes while the batch of `step` is laid out."""
    original, seen = Rows.to_global, []

    def signal_at(self, batch):
        seen.append(1)
        if len(seen) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Rows, "to_global", signal_at)
        with pytest.raises(Stopped):
            train.loop.run(config)
    assert len(seen) == step


def assert_same_weights(one: Path, other: Path, **tolerance: float) -> None:
    pairs = [load_model(run / "weights")[1] for run in (one, other)]
    jax.tree.map(functools.partial(np.testing.assert_allclose, **({"rtol": 0} | tolerance)), *pairs)


def flip_a_bit(step: Path) -> None:
    largest = max((file for file in step.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def cut(step: Path) -> None:
    for file in step.rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:100])


def lose_a_file(step: Path) -> None:
    max((file for file in step.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size).unlink()
