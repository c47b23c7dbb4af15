"""Twenty steps of a tiny distillation in float32, as a committed file: `python -m tests.train.golden_trace` remakes it.

Everything that decides a run is in it: both terms of the loss at a temperature other than 1, the L1 term, the blend of
activations, microbatches with uneven counts, warm-up and cosine, clipping that bites at some steps and not at others,
weight decay, and AdamW with the defaults of its config.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np

from falcon_relu.config import family
from falcon_relu.sharding import make_mesh, use_mesh
from tests.conftest import random_params
from train.config import OptimizerConfig, TrainConfig
from train.data.batches import Batch, DataConfig, Source
from train.job import make_job
from train.loss import LossConfig
from train.state import init_state

TRACE = Path(__file__).with_suffix(".json")
KEPT = ("loss", "cross_entropy", "kl", "l1", "gradient_norm")
STEPS, ROWS, T, V = 20, 8, 16, 512
RUN = TrainConfig(
    out=Path("nowhere"),
    model="tiny-40b",
    activation="relu",
    start_activation="gelu",
    activation_ramp=(2, 8),
    teacher="tiny-40b",
    data=DataConfig(sources=(Source(Path("nowhere")),), seq_len=T, batch_size=ROWS),
    loss=LossConfig(lm_weight=0.8, kd_weight=0.6, temperature=2.0, chunk=4, l1_stages=((5, 0.01), (15, 0.1))),
    optimizer=OptimizerConfig(
        learning_rate=2e-3, final_learning_rate=2e-4, warmup_steps=5, weight_decay=0.1, clip_norm=1.5
    ),
    steps=STEPS,
    microbatches=2,
    mesh=(1, 1, 1),
    compute_dtype="float32",
    teacher_dtype="float32",
)


def trace(config: TrainConfig = RUN) -> dict[str, list[float]]:
    """The metrics of `KEPT` at every step, by name."""
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    job = make_job(config, mesh, lambda source, _: family(source))
    teacher = random_params(job.teacher.config, seed=1)
    found: dict[str, list[float]] = {name: [] for name in KEPT}
    with use_mesh(mesh):
        state = init_state(job.student.config, job.optimizer, random_params(job.student.config), job.shardings)
        step = job.train_step()
        for number in range(config.steps):
            state, metrics = step(state, _batch(number), teacher)
            for name, values in found.items():
                values.append(float(metrics[name]))
    return found


def _batch(number: int) -> Batch:
    """Four batches in turn; rows of two documents, the first row with padding."""
    draw = np.random.RandomState(number % 4)  # its numbers are the same in every version
    tokens = draw.randint(0, V, (ROWS, T)).astype(np.int32)
    segments = np.where(np.arange(T)[None] < draw.randint(4, T - 4, (ROWS, 1)), 1, 2).astype(np.int32)
    segments[0, -5:] = 0
    positions = np.array([[np.sum(row[:t] == row[t]) for t in range(T)] for row in segments], np.int32)
    return {"tokens_BxT": tokens, "segment_ids_BxT": segments, "positions_BxT": positions}


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 1)
    rounded = {name: [float(f"{value:.7g}") for value in values] for name, values in trace().items()}
    TRACE.write_text(json.dumps(rounded, indent=1) + "\n")
