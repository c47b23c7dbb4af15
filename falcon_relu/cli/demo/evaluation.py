"""The demo's benchmarks: a few questions of the published suite, on its own small models."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from falcon_relu.checkpoints.load import load_model
from falcon_relu.errors import FalconError
from falcon_relu.evaluation.journal import Journal
from falcon_relu.evaluation.scoring import Engine, FlaxEngine
from falcon_relu.model import Falcon
from falcon_relu.progress import console
from falcon_relu.tokenizer import Tokenizer
from infer.predictor.predictor import load_predictor
from infer.scoring import DecodeEngine
from infer.weights.layout import weights_from_params

CHANCE = {"ARC-Challenge": 0.25, "HellaSwag": 0.25, "MMLU": 0.25, "Winogrande": 0.5, "GSM8K": 0.0}


def benchmarks(root: Path, data: Path, questions: int) -> dict[str, Any]:
    """The suite on the teacher, the student, and the student's sparse decoding.

    Args:
      root: folder of the run.
      data: folder of the datasets; those that are missing are built.
      questions: maximum number for each task; of MMLU, one question of each subject of the social sciences.

    Returns:
      rows: a mapping for each benchmark: benchmark, shots, questions, original, relu, sparse (scores), chance, error
        (standard error of the original's).
      missing: why some or all benchmarks were not measured; empty if all were.
    """
    if not questions:
        return {"rows": [], "missing": "the recipe asks for no benchmark questions"}
    if importlib.util.find_spec("lm_eval") is None:
        return {"rows": [], "missing": 'lm-eval is not installed: pip install "falcon-relu[eval]"'}
    os.environ |= dict.fromkeys(("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_OFFLINE"), "1")
    from falcon_relu.evaluation.harness import HarnessModel
    from falcon_relu.evaluation.questions import MISSING, build_eval_data
    from falcon_relu.evaluation.suite import SUITES, evaluate

    try:
        build_eval_data(data)
    except FalconError as error:
        return {"rows": [], "missing": str(error)}
    most = [benchmark for benchmark in SUITES["open-llm-v1"] if benchmark.name in CHANCE and benchmark.task != "mmlu"]
    mmlu = [b._replace(task="mmlu_social_sciences") for b in SUITES["open-llm-v1"] if b.task == "mmlu"]
    tokenizer, found = Tokenizer(root / "tokenizer.json"), {}
    for name, engine in _engines(root).items():
        console.print(f"benchmarks: {name}", style="dim")
        model = HarnessModel(engine, tokenizer, Journal(root / "benchmarks" / f"{name}.jsonl"))
        found[name] = evaluate(model, most, data=data, limit=questions)
        found[name]["rows"] += evaluate(model, mmlu, data=data, limit=1)["rows"]
    rows = []
    for original, relu, sparse in zip(*(found[name]["rows"] for name in ("original", "relu", "sparse")), strict=True):
        scores = {"original": original["value"], "relu": relu["value"], "sparse": sparse["value"]}
        about = {name: original[name] for name in ("benchmark", "shots", "questions", "error")}
        rows.append(about | scores | {"chance": CHANCE[original["benchmark"]]})
    return {"rows": rows, "missing": "; ".join(MISSING.values())}


def _engines(root: Path) -> dict[str, Engine]:
    teacher_config, teacher = load_model(root / "teacher" / "weights")
    config, params = load_model(root / "lm_kl" / "weights")
    weights = weights_from_params(params, config, predictor=load_predictor(root / "predictor.safetensors", config))
    return {
        "original": FlaxEngine(Falcon(teacher_config), teacher),
        "relu": FlaxEngine(Falcon(config), params),
        "sparse": DecodeEngine(weights, "sparse"),
    }
