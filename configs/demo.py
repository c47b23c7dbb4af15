"""`falcon-relu demo`: the whole idea in about 18 minutes of processor time."""

import dataclasses
from pathlib import Path

from falcon_relu.cli.demo.recipe import Recipe
from falcon_relu.generation import Sampling
from infer.predictor.fitting import FitConfig
from train.config import OptimizerConfig, TrainConfig
from train.data.batches import DataConfig, Source
from train.loss import LossConfig

_DATA = DataConfig(
    sources=(
        Source(Path("tokens/wikipedia-sample"), 0.3),
        Source(Path("tokens/shakespeare"), 0.3),
        Source(Path("tokens/python-stdlib"), 0.4),
    ),
    seq_len=128,
    batch_size=32,
)

_TEACHER = TrainConfig(
    out=Path("teacher"),
    model="demo",
    data=_DATA,
    optimizer=OptimizerConfig(learning_rate=4e-3, final_learning_rate=2e-4, warmup_steps=20, weight_decay=0.05),
    steps=260,
    compute_dtype="float32",
    teacher_dtype="float32",
    checkpoint_every=100,
    log_every=5,
)

_LM_ONLY = dataclasses.replace(
    _TEACHER,
    out=Path("lm_only"),
    model=None,
    init_from="teacher/weights",
    activation="relu",
    teacher="teacher/weights",  # only measured against, until the loss has a kd_weight
    data=dataclasses.replace(_DATA, seed=1),
    optimizer=dataclasses.replace(_TEACHER.optimizer, learning_rate=1e-3, final_learning_rate=1e-4, warmup_steps=5),
    steps=70,
)

CONFIG = Recipe(
    corpora=("wikipedia-sample", "shakespeare", "python-stdlib"),
    section_chars=4000,
    vocab_size=2048,
    validation_fraction=0.01,
    teacher=_TEACHER,
    lm_only=_LM_ONLY,
    lm_kl=dataclasses.replace(_LM_ONLY, out=Path("lm_kl"), loss=LossConfig(lm_weight=1.0, kd_weight=1.0)),
    recorded_tokens=40_000,
    rank=48,
    fit=FitConfig(epochs=5),
    reads=(0.25, 0.5, 0.75, 1.0, 1.25),
    read=1.25,
    quality_batches=4,
    prompts=4,
    prompt_tokens=48,
    sampling=Sampling(max_new_tokens=64, temperature=0.7, top_k=40),
    widths="falcon-40b",
    widths_layers=1,
    widths_active=0.1,
    widths_steps=10,
    questions=4,
)
