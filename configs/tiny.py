"""The settings of the published run, six steps of small batches from a cached teacher: what the tests run."""

import dataclasses
from pathlib import Path

from configs import falcon_40b
from train.config import TrainConfig

_PUBLISHED = falcon_40b.CONFIG

CONFIG: TrainConfig = dataclasses.replace(
    _PUBLISHED,
    out=Path("runs/tiny"),
    init_from="weights/falcon-40b",
    teacher=None,
    data=dataclasses.replace(_PUBLISHED.data, seq_len=32, batch_size=8, teacher_cache="teacher"),
    loss=dataclasses.replace(_PUBLISHED.loss, chunk=8),
    optimizer=dataclasses.replace(_PUBLISHED.optimizer, learning_rate=1e-3, final_learning_rate=1e-4, warmup_steps=1),
    steps=6,
    mesh=(1, -1, 1),
    microbatches=2,
    query_chunk=8,
    checkpoint_every=3,
    validate_every=3,
    log_every=1,
)
