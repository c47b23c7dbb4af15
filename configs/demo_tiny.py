"""The demo with everything small: what the tests run. Its results say nothing about quality."""

import dataclasses

from configs import demo

_TEACHER = dataclasses.replace(
    demo.CONFIG.teacher,
    model="tiny-40b",
    data=dataclasses.replace(demo.CONFIG.teacher.data, sources=demo.CONFIG.teacher.data.sources[2:], batch_size=8),
    optimizer=dataclasses.replace(demo.CONFIG.teacher.optimizer, warmup_steps=2),
    steps=30,
)

CONFIG = dataclasses.replace(
    demo.CONFIG,
    corpora=("python-stdlib",),
    documents=12,
    vocab_size=512,
    validation_fraction=0.1,
    teacher=_TEACHER,
    lm_only=dataclasses.replace(demo.CONFIG.lm_only, data=_TEACHER.data, optimizer=_TEACHER.optimizer, steps=12),
    lm_kl=dataclasses.replace(demo.CONFIG.lm_kl, data=_TEACHER.data, optimizer=_TEACHER.optimizer, steps=12),
    recorded_tokens=6000,
    rank=8,
    reads=(0.5, 1.25),
    quality_batches=1,
    prompts=2,
    sampling=dataclasses.replace(demo.CONFIG.sampling, max_new_tokens=8),
    widths="tiny-40b",
    widths_steps=2,
    questions=0,  # they would be downloaded
)
