"""A tiny model really trained, on the sources of the standard library: GELU teacher, ReLU student with distillation.

`python -m tests.infer.trained FOLDER` makes it, in a process of its own: the tests' own eight virtual devices would
only get in each other's way.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path

from falcon_relu.checkpoints.native import save_params
from falcon_relu.config import family
from falcon_relu.corpora import documents
from falcon_relu.sharding import init_params, make_mesh
from falcon_relu.tokenizer import train_bpe
from tests.train.data.texts import prepare_texts
from train import loop
from train.config import OptimizerConfig, TrainConfig
from train.data.batches import DataConfig, Source
from train.loss import LossConfig
from train.machine import keep_freed_memory

CONFIG = family("tiny-40b").replace(max_positions=512, bos_token_id=0, eos_token_id=0)
SEQ_LEN = 64
_SECTION = 2000  # characters of a document


def data(folder: Path) -> DataConfig:
    """The text that the model in `folder` was trained on, and its held-out part."""
    return DataConfig(sources=(Source(folder / "tokens"),), seq_len=SEQ_LEN, batch_size=32)


def make(folder: Path) -> None:
    """Leaves `tokenizer.json`, `tokens/`, `teacher/weights` and `student/weights` in `folder`."""
    keep_freed_memory()
    texts = [
        text[start : start + _SECTION]
        for text in itertools.islice(documents("python-stdlib"), 120)
        for start in range(0, len(text), _SECTION)
    ]
    train_bpe(texts, CONFIG.vocab_size, folder / "tokenizer.json")
    prepare_texts(folder / "tokens", texts, folder / "tokenizer.json", seq_len=SEQ_LEN, validation_fraction=0.03)
    save_params(folder / "fresh", CONFIG, init_params(CONFIG, 0, make_mesh()))
    teacher = TrainConfig(
        out=folder / "teacher",
        data=data(folder),
        init_from=str(folder / "fresh"),
        optimizer=OptimizerConfig(learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=10),
        steps=160,
        compute_dtype="float32",
        teacher_dtype="float32",
        checkpoint_every=0,
    )
    loop.run(teacher)
    loop.run(
        dataclasses.replace(
            teacher,
            out=folder / "student",
            init_from=str(folder / "teacher/weights"),
            teacher=str(folder / "teacher/weights"),
            activation="relu",
            loss=LossConfig(lm_weight=1.0, kd_weight=1.0),
            optimizer=OptimizerConfig(learning_rate=3e-3, final_learning_rate=3e-4, warmup_steps=5),
            steps=40,
        )
    )


if __name__ == "__main__":
    make(Path(sys.argv[1]))
