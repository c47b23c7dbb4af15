"""The demo, larger: `falcon-relu demo --config laptop --out runs/laptop`, about a quarter of an hour on two cores."""

import dataclasses

from configs import demo

_DATA = dataclasses.replace(demo.CONFIG.teacher.data, seq_len=256, batch_size=8)

_TEACHER = dataclasses.replace(
    demo.CONFIG.teacher,
    model="laptop",
    data=_DATA,
    optimizer=dataclasses.replace(demo.CONFIG.teacher.optimizer, learning_rate=2e-3, final_learning_rate=1e-4),
    steps=240,
    checkpoint_every=50,
)

_STUDENT_OPTIMIZER = dataclasses.replace(
    demo.CONFIG.lm_only.optimizer, learning_rate=6e-4, final_learning_rate=6e-5, warmup_steps=5
)

CONFIG = dataclasses.replace(
    demo.CONFIG,
    vocab_size=4096,
    teacher=_TEACHER,
    lm_only=dataclasses.replace(
        demo.CONFIG.lm_only,
        data=dataclasses.replace(_DATA, seed=1),
        optimizer=_STUDENT_OPTIMIZER,
        checkpoint_every=20,
        steps=40,
    ),
    lm_kl=dataclasses.replace(
        demo.CONFIG.lm_kl,
        data=dataclasses.replace(_DATA, seed=1),
        optimizer=_STUDENT_OPTIMIZER,
        checkpoint_every=20,
        steps=80,
    ),
    recorded_tokens=60_000,
    rank=96,
    reads=(0.25, 0.5, 0.75, 1.0, 1.25, 1.5),
)
