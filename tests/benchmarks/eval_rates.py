"""Requests answered a second, ours against lm-eval's own Hugging Face model: `python -m tests.benchmarks.eval_rates`.

The same random model of 19.5M parameters and the same real questions for both. Each way is a process of its own, since
torch reads the settings of the allocator when it starts; "torch, malloc" is torch with glibc told to keep freed memory.
Questions are loaded before the clock starts; tokenising, compiling and reading the results are within it.
"""

from __future__ import annotations

import dataclasses
import json as jsonlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import tyro

Way = Literal["torch", "torch, malloc", "flax", "exact"]
WAYS: tuple[Way, ...] = ("torch", "torch, malloc", "flax", "exact")
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 36)}
QUIET = {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Rates of answering."""

    data: Path
    """Folder made by falcon-relu eval-data."""
    tasks: tuple[Literal["arc_challenge", "hellaswag"], ...] = ("arc_challenge", "hellaswag")
    """25 and 10 examples shown."""
    limit: int = 100
    """Questions of each task."""
    ways: tuple[Way, ...] = WAYS
    """What to measure."""
    model: Path | None = None
    """Where the model is or is put; a temporary folder if not given."""
    one: bool = False
    """Measure one way and task in this process."""
    json: Path | None = None
    """Also write the figures to this file."""


def run(args: Args) -> None:
    """Measures each way in a new process and reports."""
    if args.one:
        assert args.model is not None
        assert args.json is not None
        args.json.write_text(jsonlib.dumps(_measure(args)))
        return
    from falcon_relu.cli.report import report

    with tempfile.TemporaryDirectory() as folder:
        model = args.model or Path(folder) / "hf"
        if not model.exists():
            _make_model(model)
        rows = [
            _in_process(args, task, way, model, Path(folder) / "one.json") for task in args.tasks for way in args.ways
        ]
    for row in rows:
        for theirs in ("torch", "torch, malloc"):
            base = next((r for r in rows if r["task"] == row["task"] and r["way"] == theirs), None)
            row[f"times {theirs}"] = None if base is None else row["requests/s"] / base["requests/s"]
    report({"rates": rows}, args.json)


def _in_process(args: Args, task: str, way: Way, model: Path, out: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.eval_rates", "--one", "--data", args.data, "--tasks", task]
    command += ["--limit", args.limit, "--ways", way, "--model", model, "--json", out]
    environment = os.environ | QUIET | (MALLOC if way == "torch, malloc" else {})
    subprocess.run(list(map(str, command)), env=environment, check=True, stdout=subprocess.DEVNULL)
    return {"task": task, "way": way} | jsonlib.loads(out.read_text())


def _make_model(out: Path) -> None:
    from falcon_relu.checkpoints.convert import export_hf
    from falcon_relu.checkpoints.native import save_params
    from falcon_relu.config import FalconConfig
    from falcon_relu.corpora import falcon_tokenizer
    from falcon_relu.sharding import init_params

    config = FalconConfig(d_model=256, n_layers=4, n_heads=4, n_kv_heads=2, d_ff=1024, activation="relu")
    with tempfile.TemporaryDirectory() as folder:
        save_params(Path(folder) / "native", config, init_params(config, 0))
        export_hf(Path(folder) / "native", out, tokenizer=falcon_tokenizer())


def _measure(args: Args) -> dict[str, Any]:
    from falcon_relu.evaluation import suite

    (task,), (way,) = args.tasks, args.ways
    (benchmark,) = (b for b in suite.SUITES["open-llm-v1"] if b.task == task)
    model: Any = _theirs(args.model) if way.startswith("torch") else _ours(args.model, way)
    clock = [0.0, 0.0]
    answer = model.loglikelihood

    def timed(requests: list) -> list:
        clock[0], start = len(requests), time.perf_counter()
        found = answer(requests)
        clock[1] = time.perf_counter() - start
        return found

    model.loglikelihood = timed
    found = suite.evaluate(model, [benchmark], data=args.data, limit=args.limit)
    return {
        "requests": clock[0],
        "seconds": clock[1],
        "requests/s": clock[0] / clock[1],
        "score": found["rows"][0]["value"],
    }


def _theirs(model: Path | None) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(model), device="cpu", dtype="float32", batch_size=1)


def _ours(model: Path | None, way: str) -> Any:
    from falcon_relu.checkpoints.load import load_model
    from falcon_relu.evaluation.harness import HarnessModel
    from falcon_relu.evaluation.scoring import Engine, FlaxEngine
    from falcon_relu.model import Falcon
    from falcon_relu.tokenizer import Tokenizer
    from infer.scoring import DecodeEngine
    from infer.weights.layout import Formats, weights_from_params
    from train.machine import keep_freed_memory

    keep_freed_memory()
    assert model is not None
    config, params = load_model(model)
    engine: Engine = FlaxEngine(Falcon(config), params)
    if way == "exact":
        engine = DecodeEngine(weights_from_params(params, config, Formats.all("f32")), "exact", cache="f32")
    return HarnessModel(engine, Tokenizer(model))


if __name__ == "__main__":
    run(tyro.cli(Args))
