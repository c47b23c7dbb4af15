"""How much of the online loss a cached teacher gives, by k: `python -m tests.benchmarks.cached_kl --help`.

On validation rows: the KL divergence at temperature 1 over the whole vocabulary and over the top k and the rest, the
gradient's distance from the online one as a share of its norm (with respect to the student's final hidden states, which
all other gradients come from), the same where the rest is dropped and the top k made to sum to 1, the mass that the
rest holds, and what a token takes on disk. After `falcon-relu demo`:

  python -m tests.benchmarks.cached_kl runs/demo/teacher/weights runs/demo/lm_kl/weights runs/demo/tokens/python-stdlib
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from falcon_relu import Falcon, load_model
from falcon_relu.cli.report import report
from falcon_relu.model import BATCH_KEYS, head_kernel, next_tokens
from train.data.batches import DataConfig, Source, validation_batches
from train.data.shards import read_manifest, token_dtype
from train.loss import CachedTeacher, LossConfig, OnlineTeacher, distillation_loss
from train.teacher_cache import top_k_targets

LOSS = LossConfig(lm_weight=0.0, kd_weight=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """KL of a student from a cached teacher, by k."""

    teacher: Annotated[Path, tyro.conf.Positional]
    """Weights of the teacher."""
    student: Annotated[Path, tyro.conf.Positional]
    """Weights of the student."""
    tokens: Annotated[Path, tyro.conf.Positional]
    """Folder of token shards."""
    top_k: tuple[int, ...] = (8, 32, 128, 512)
    """k's, besides the whole vocabulary."""
    batches: int = 4
    """Batches of 8 validation rows."""
    json: Path | None = None
    """Also write the figures to this file."""


def run(args: Args) -> None:
    """Measures and reports."""
    manifest = read_manifest(args.tokens)
    data = DataConfig(sources=(Source(args.tokens),), seq_len=manifest.seq_len, batch_size=8)
    config, student = load_model(args.student)
    teacher_config, teacher = load_model(args.teacher)
    head, teacher_head = head_kernel(config, student), head_kernel(teacher_config, teacher)
    ks = (*(k for k in args.top_k if k < config.vocab_size), config.vocab_size)
    totals = {(k, dtype): np.zeros(4) for k in ks for dtype in ("float32", "bfloat16")}
    online = np.zeros(2)
    for batch in itertools.islice(validation_batches(data), args.batches):
        rows: Any = [jnp.asarray(batch[name]) for name in BATCH_KEYS]  # type: ignore[literal-required]
        targets, mask = next_tokens(rows[0], rows[2])
        hidden, t_hidden = (
            Falcon(c).apply({"params": p}, *rows, method="hidden")
            for c, p in ((config, student), (teacher_config, teacher))
        )
        of = functools.partial(_kl_and_gradient, hidden, head, targets, mask)
        kl, gradient = of(OnlineTeacher(t_hidden, teacher_head))
        online += np.array([kl, mask.sum()])
        for k in ks:
            said, _ = top_k_targets(t_hidden, teacher_head, targets, top_k=k, temperature=1.0, chunk=64)
            rest = jnp.sum(jnp.exp(said.log_rest_BxTx2[..., 0]) * mask)
            for dtype in ("float32", "bfloat16"):
                stored = dataclasses.replace(said, log_probs_BxTxk=said.log_probs_BxTxk.astype(dtype))
                cached_kl, cached_gradient = of(stored)
                _, cut_gradient = of(_without_rest(stored))
                distances = (
                    jnp.linalg.norm(g - gradient) / jnp.linalg.norm(gradient) for g in (cached_gradient, cut_gradient)
                )
                totals[k, dtype] += np.array([cached_kl, rest, *(d * mask.sum() for d in distances)])
    count = online[1]
    table = [
        {
            "k": k,
            "log-probabilities": dtype,
            "KL": kl / count,
            "share of the online KL": kl / online[0],
            "gradient off by": off / count,
            "off without the rest": off_without / count,
            "mass of the rest": rest / count,
            "bytes a token": k * (token_dtype(config.vocab_size).itemsize + jnp.dtype(dtype).itemsize) + 16,
        }
        for (k, dtype), (kl, rest, off, off_without) in totals.items()
    ]
    report({"positions": int(count), "online KL": online[0] / count, "cached": table}, args.json)


@jax.jit
def _kl_and_gradient(hidden: jax.Array, head: jax.Array, targets: jax.Array, mask: jax.Array, teacher: Any) -> Any:
    return jax.value_and_grad(lambda h: distillation_loss(LOSS, h, head, targets, mask, teacher).loss)(hidden)


def _without_rest(said: CachedTeacher) -> CachedTeacher:
    return dataclasses.replace(said, log_rest_BxTx2=jnp.full_like(said.log_rest_BxTx2, -jnp.inf))


if __name__ == "__main__":
    run(tyro.cli(Args))
