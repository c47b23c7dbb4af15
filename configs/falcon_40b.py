"""The published run: Falcon-40B to ReluFalcon-40B on about 5 billion tokens.

Published: full fine-tuning, batch 1920, cosine schedule, learning rate 3e-5, about 5B tokens of Wikipedia, Pile and
StackOverflow, cross-entropy and KL to the original model. Everything marked "our choice" was not published.
"""

from pathlib import Path

from train.config import OptimizerConfig, TrainConfig
from train.data.batches import DataConfig, Source
from train.loss import LossConfig

CONFIG = TrainConfig(
    out=Path("runs/falcon_40b"),
    init_from="tiiuae/falcon-40b",
    init_activation="gelu",  # its config.json does not say
    activation="relu",
    teacher="tiiuae/falcon-40b",
    teacher_activation="gelu",
    data=DataConfig(
        sources=(  # the mixture's weights are our choice
            Source(Path("data/wikipedia"), 1.0),
            Source(Path("data/pile"), 2.0),
            Source(Path("data/stackoverflow"), 1.0),
        ),
        seq_len=2048,  # our choice: the context that Falcon-40B was trained with
        batch_size=1920,
    ),
    loss=LossConfig(lm_weight=1.0, kd_weight=1.0, temperature=1.0),  # our choice
    optimizer=OptimizerConfig(
        learning_rate=3e-5,
        final_learning_rate=3e-6,  # our choice
        warmup_steps=40,  # our choice
        b1=0.9,  # our choice
        b2=0.95,  # our choice
        weight_decay=0.0,  # our choice
        clip_norm=1.0,  # our choice
    ),
    steps=1272,  # 5.0e9 tokens at 1920 x 2048 a step
    mesh=(-1, 8, 1),  # our choice: parameters split within nodes of 8, optimizer state over all 40
    microbatches=48,  # our choice: 1 row a device at a time, so that little has to be computed twice, see docs/plan.md
    remat="dots",  # our choice: the least that fits 80 GB
    query_chunk=256,  # our choice; only where attention is not one of the field's kernels
    validate_every=100,
    checkpoint_every=50,
)
