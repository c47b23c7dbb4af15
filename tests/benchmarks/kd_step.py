"""One distillation step against the same step in torch and transformers: `python -m tests.benchmarks.kd_step`.

A small Falcon (hidden 512, 8 layers, 8 query and 2 KV heads, F 2048, 65,024 tied entries: 55.3M parameters), float32,
2 rows of 512 tokens: teacher forward, student forward, CE + KL over the whole vocabulary, backward, clip, AdamW. Every
engine is a process of its own that starts from the same weights; they take turns step by step, so that a machine that
slows down slows them all, and their first losses must agree. For torch the final hidden states are shifted, not the
logits, which spares it copies of these.

Engines: "jax"; "eager" (torch as it is); "malloc" (glibc told not to give memory back); "best" (that, torch.compile and
fused AdamW; needs a C++ compiler and a minute to start).
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from falcon_relu.cli.report import report

Engine = Literal["jax", "eager", "malloc", "best"]
ROWS, TOKENS = 2, 512
LEARNING_RATE, BETAS, CLIP = 1e-4, (0.9, 0.95), 1.0
_KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "68719476736"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Tokens a second of a distillation step, by engine."""

    engines: tuple[Engine, ...] = ("jax", "eager", "malloc", "best")
    """Which take turns."""
    steps: int = 7
    """Timed steps of each, after two that are not."""
    chunk: int = 256
    """`LossConfig.chunk` of ours."""
    xla_flags: str = ""
    """XLA_FLAGS of ours."""
    json: Path | None = None
    """Also write the figures to this file."""


def run(args: Args) -> None:
    """Measures and reports; fails if the engines do not compute the same loss."""
    with tempfile.TemporaryDirectory() as folder:
        _subprocess("weights", Path(folder), args).wait()
        processes = {engine: _subprocess(engine, Path(folder), args) for engine in args.engines}
        losses: dict[str, list[float]] = {engine: [] for engine in processes}
        seconds: dict[str, list[float]] = {engine: [] for engine in processes}
        for _ in range(args.steps + 2):
            for engine, process in processes.items():
                loss, time_ = _turn(process)
                losses[engine].append(loss)
                seconds[engine].append(time_)
        for process in processes.values():
            process.stdin.close()
            process.wait()
    np.testing.assert_allclose([values[0] for values in losses.values()], losses[args.engines[0]][0], rtol=1e-4)
    rates = {engine: ROWS * TOKENS / statistics.median(times[2:]) for engine, times in seconds.items()}
    figures: dict[str, Any] = {f"{engine}, tokens/s": rate for engine, rate in rates.items()}
    if "jax" in rates:
        figures |= {f"jax / {engine}": rates["jax"] / rate for engine, rate in rates.items() if engine != "jax"}
    report(figures | {"loss after the last step": {e: round(v[-1], 4) for e, v in losses.items()}}, args.json)


def _subprocess(role: str, folder: Path, args: Args) -> subprocess.Popen[str]:
    environment = os.environ | {"XLA_FLAGS": args.xla_flags} | (_KEEP_MEMORY if role in ("malloc", "best") else {})
    command = [sys.executable, "-m", __spec__.name, "--engine", role, str(folder), str(args.chunk)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True)


def _turn(process: subprocess.Popen[str]) -> tuple[float, float]:
    """Loss and seconds of a process's next step."""
    process.stdin.write("\n")
    process.stdin.flush()
    return tuple(json.loads(process.stdout.readline()))


def _tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 65024, (ROWS, TOKENS)).astype(np.int32)


def _serve(step: Callable[[], float]) -> None:
    """A step for every line of standard input."""
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = step()
        print(json.dumps([loss, time.perf_counter() - start]), flush=True)


def _config() -> Any:
    from falcon_relu.config import FalconConfig

    return FalconConfig(d_model=512, n_layers=8, n_heads=8, n_kv_heads=2, d_ff=2048, activation="relu")


def _write_weights(folder: Path) -> None:
    """A student and a teacher of different random weights, native and for transformers."""
    from falcon_relu import export_hf, init_params, save_params

    for seed, name in enumerate(("student", "teacher")):
        config = _config() if name == "student" else _config().with_activation("gelu")
        save_params(folder / name, config, init_params(config, seed))
        export_hf(folder / name, folder / f"{name}-hf")


def _jax_step(folder: Path, chunk: int) -> Callable[[], float]:
    from train.machine import keep_freed_memory

    keep_freed_memory()
    from falcon_relu import Falcon, load_model, make_mesh, use_mesh
    from train.config import OptimizerConfig
    from train.loss import LossConfig
    from train.state import init_state, make_optimizer, state_shardings
    from train.step import make_train_step

    mesh = make_mesh((1, 1, 1))
    optimizer = make_optimizer(
        OptimizerConfig(
            learning_rate=LEARNING_RATE,
            final_learning_rate=LEARNING_RATE,
            b1=BETAS[0],
            b2=BETAS[1],
            clip_norm=CLIP,
        ),
        steps=1000,
    )
    with use_mesh(mesh):
        config, params = load_model(folder / "student", mesh=mesh)
        teacher_config, teacher = load_model(folder / "teacher", mesh=mesh)
        state = init_state(config, optimizer, params, state_shardings(config, optimizer, mesh))
        loss = LossConfig(kd_weight=1.0, chunk=chunk)
        train_step = make_train_step(loss, Falcon(config), Falcon(teacher_config), optimizer, mesh)
    ones = np.ones((ROWS, TOKENS), np.int32)
    positions = np.broadcast_to(np.arange(TOKENS, dtype=np.int32), ones.shape)
    batch = {"tokens_BxT": _tokens(), "segment_ids_BxT": ones, "positions_BxT": positions}

    def step() -> float:
        nonlocal state
        with use_mesh(mesh):
            state, metrics = train_step(state, batch, teacher)
            return float(metrics["loss"])

    return step


def _torch_step(folder: Path, best: bool) -> Callable[[], float]:
    import torch
    import torch.nn.functional as F
    from transformers import FalconForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    student, teacher = (
        FalconForCausalLM.from_pretrained(folder / f"{name}-hf", dtype=torch.float32) for name in ("student", "teacher")
    )
    teacher.eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=0, fused=best)
    tokens = torch.from_numpy(_tokens()).long()

    def logits(model: Any) -> Any:
        return model.lm_head(model.transformer(tokens).last_hidden_state[:, :-1].flatten(0, 1))

    def objective() -> Any:
        with torch.no_grad():
            t = F.log_softmax(logits(teacher), -1)
        s = logits(student)
        kl = F.kl_div(F.log_softmax(s, -1), t, log_target=True, reduction="batchmean")
        return F.cross_entropy(s, tokens[:, 1:].flatten()) + kl

    compiled = torch.compile(objective) if best else objective

    def step() -> float:
        optimizer.zero_grad()
        loss = compiled()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimizer.step()
        return float(loss.detach())

    return step


if __name__ == "__main__":
    if sys.argv[1:2] == ["--engine"]:
        role, where, loss_chunk = sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
        if role == "weights":
            _write_weights(where)
        elif role == "jax":
            _serve(_jax_step(where, loss_chunk))
        else:
            _serve(_torch_step(where, best=role == "best"))
    else:
        run(tyro.cli(Args))
