"""`falcon-relu eval`: benchmarks by lm-eval, for the Flax model and for CPU decoding."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json as jsonlib
import os
import urllib.parse
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro

from falcon_relu.checkpoints.load import load_model
from falcon_relu.checkpoints.schema import parse
from falcon_relu.cli.devices import Devices, Dtype, together
from falcon_relu.cli.outputs import Made
from falcon_relu.cli.report import report
from falcon_relu.config import Activation
from falcon_relu.errors import FalconError, check_number, check_seed
from falcon_relu.evaluation.journal import Journal
from falcon_relu.evaluation.scoring import Engine, FlaxEngine
from falcon_relu.files import read_json, regular_file, write_json, write_text
from falcon_relu.model import Falcon
from falcon_relu.sharding import make_mesh, use_mesh
from falcon_relu.tokenizer import Tokenizer
from infer import kernels
from infer.predictor.predictor import load_predictor
from infer.scoring import DecodeEngine
from infer.weights.formats import Format
from infer.weights.layout import Formats, weights_from_checkpoint
from infer.weights.storage import is_decode_weights, load_weights

_ANSWERS, _SETTINGS = "answers.jsonl", "settings.json"  # files of a run

EngineName = Literal["flax", "dense", "exact", "sparse"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(Devices):
    """Run benchmarks with EleutherAI's lm-eval: pip install "falcon-relu[eval]".

    Each answer is written to the --out folder at once. After an interruption, the same command continues; with other
    tasks, only requests that are not answered yet are run.
    """

    model: Annotated[str, tyro.conf.Positional]
    """Native weights, Hugging Face folder, hub id or, for the CPU modes, decode weights of falcon-relu pack."""
    tokenizer: Path
    """A tokenizer.json, or a folder with one."""
    out: Path
    """Folder of the run: settings, answers.jsonl, results.json and samples/."""
    suite: Literal["open-llm-v1"] | None = None
    """ARC-Challenge (25 examples shown), HellaSwag (10), MMLU (5), TruthfulQA mc2 (0), Winogrande (5) and GSM8K (5)."""
    tasks: tuple[str, ...] = ()
    """Any tasks or groups of lm-eval; a task of the suite has the suite's settings."""
    shots: int | None = None
    """Number of few-shot examples; that of the suite or task if not given."""
    data: Path | None = None
    """Folder of local datasets, see falcon-relu eval-data; others are downloaded from the hub."""
    offline: bool = False
    """Do not contact the hub."""
    limit: int | None = None
    """Maximum number of questions of each task (of MMLU, of each subject)."""
    seed: int = 1234
    """Seed of the choice of few-shot examples and of sampled generation."""
    engine: EngineName = "flax"
    """flax: the dense model on any devices; dense, exact or sparse: decoding on this CPU."""
    dtype: Dtype = "bfloat16"
    """Dtype of weights and products, for flax."""
    predictor: Path | None = None
    """Predictor file, for sparse; packed weights may hold one already."""
    format: Format | None = None
    """Number format of the weights, for the CPU modes. If not given: bf16; packed weights keep theirs.

    The KV cache is bf16, and f32 with f32."""
    backend: kernels.Backend = "auto"
    """Kernels, for the CPU modes."""
    activation: Activation | None = None
    """MLP activation, where a Hugging Face config does not state it."""

    def written(self) -> list[Made]:
        """What is written besides `json`."""
        return [Made(self.out, goes_on=True)]


def run(args: Args) -> None:
    """Checks the folder and the arguments, loads the questions, then the model, runs it, and reports."""
    if importlib.util.find_spec("lm_eval") is None:
        raise FalconError('evaluation needs lm-eval: pip install "falcon-relu[eval]"')
    if (args.suite is None) == (not args.tasks):
        raise FalconError("choose what to run: --suite open-llm-v1, or --tasks with names of lm-eval")
    if args.limit is not None:
        check_number("--limit", args.limit, low=1)
    if args.shots is not None:
        check_number("--shots", args.shots, low=0)
    check_seed("--seed", args.seed)
    if args.several_processes and args.engine != "flax":
        raise FalconError(
            f"--engine {args.engine} decodes on this CPU: leave --distributed.* out, or use --engine flax"
        )
    with together(args):
        _run(args)


def _run(args: Args) -> None:
    # The libraries read these variables when they are imported.
    os.environ |= {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    if args.offline:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    from falcon_relu.evaluation.harness import HarnessModel
    from falcon_relu.evaluation.suite import SUITES, Benchmark, evaluate

    tokenizer = Tokenizer(args.tokenizer)
    settings = _claim(args, tokenizer)
    write = jax.process_index() == 0
    known = {benchmark.task: benchmark for benchmark in SUITES["open-llm-v1"]}
    benchmarks = [known.get(name, Benchmark(name, name)) for name in args.tasks] or SUITES[str(args.suite)]
    if args.shots is not None:
        benchmarks = [benchmark._replace(shots=args.shots) for benchmark in benchmarks]

    def model() -> HarnessModel:
        ready = engine(args)
        if write:
            write_json(args.out / _SETTINGS, settings)
        return HarnessModel(ready, tokenizer, Journal(args.out / _ANSWERS, write=write), args.seed)

    found = evaluate(model, benchmarks, data=args.data, limit=args.limit, seed=args.seed)
    samples = found.pop("samples")
    results = {"settings": settings, "suite": args.suite, "limit": args.limit, "seed": args.seed, **found}
    if write:
        write_json(args.out / "results.json", results)
        for name, records in samples.items():
            lines = "".join(jsonlib.dumps(record, default=str) + "\n" for record in records)
            write_text(args.out / "samples" / f"{urllib.parse.quote(name, safe='')}.jsonl", lines)
    shown = {name: results[name] for name in ("average", "limit", "seed", "lm_eval")}
    report({"engine": args.engine, **shown, "benchmarks": found["rows"]}, args, also=results)
    if all(row["value"] is None for row in found["rows"]):
        raise FalconError("no benchmark was measured; the table says why; for local questions: falcon-relu eval-data")


def engine(args: Args) -> Engine:
    """The model with the engine that the arguments choose.

    Raises:
      FalconError: the model cannot be loaded or cannot serve the mode.
    """
    if args.engine == "flax":
        mesh = make_mesh(args.mesh)
        with use_mesh(mesh):
            config, params = load_model(args.model, activation=args.activation, dtype=jnp.dtype(args.dtype), mesh=mesh)
        return FlaxEngine(Falcon(config, jnp.dtype(args.dtype)), params, mesh)
    kernels.backend(args.backend)
    if is_decode_weights(Path(args.model)):
        if args.format is not None or args.activation is not None:
            raise FalconError(f"{args.model} is packed already: its format and activation cannot be chosen any more")
        weights = load_weights(Path(args.model))
    else:
        weights = weights_from_checkpoint(args.model, Formats.parse(args.format or "bf16"), activation=args.activation)
    if args.predictor is not None:
        weights = weights.with_predictor(load_predictor(args.predictor, weights.config), args.format or "bf16")
    return DecodeEngine(weights, args.engine, args.backend, cache="f32" if args.format == "f32" else "bf16")


def _claim(args: Args, tokenizer: Tokenizer) -> dict[str, Any]:
    """The settings that determine the answers, equal to those of the answers that the folder already holds.

    Raises:
      FalconError: the folder holds answers with other settings, or the file with their settings cannot be read.
    """
    names = ("dtype",) if args.engine == "flax" else ("format", "backend")
    settings: dict[str, Any] = {"model": str(args.model), "engine": args.engine, "tokenizer": tokenizer.sha256}
    settings |= {name: getattr(args, name) for name in ("activation", *names)}
    settings["weights"] = _fingerprint(Path(args.model))
    settings["predictor"] = None if args.predictor is None else _fingerprint(args.predictor)
    answers, path = args.out / _ANSWERS, args.out / _SETTINGS
    if not os.path.lexists(answers) or not regular_file(answers).stat().st_size:
        return settings
    found = parse(dict[str, str | None], read_json(path), path)
    if changed := [name for name in settings | found if found.get(name, "") != settings.get(name, "")]:
        raise FalconError(
            f"{args.out} holds answers of another model or with other settings ({', '.join(changed)}); choose another "
            "--out"
        )
    return settings


def _fingerprint(path: Path) -> str | None:
    """A digest of the names, sizes and times of a file or of a folder's files; None for a hub id."""
    if not path.exists():
        return None
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    about = [(p.relative_to(path).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.blake2b(jsonlib.dumps(about).encode(), digest_size=8).hexdigest()
