"""The stages of the demo: text, teacher, swap, distillation, predictors, sparse decoding, benchmarks."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from falcon_relu.checkpoints.load import load_model
from falcon_relu.checkpoints.native import read_config
from falcon_relu.checkpoints.schema import parse, read_sealed, write_sealed
from falcon_relu.cli.demo.evaluation import benchmarks
from falcon_relu.cli.demo.recipe import Recipe
from falcon_relu.cli.machine import machine
from falcon_relu.config import family
from falcon_relu.corpora import CORPORA, documents
from falcon_relu.errors import FalconError
from falcon_relu.files import read_json, write_json, write_texts
from falcon_relu.generation import generate
from falcon_relu.model import Falcon
from falcon_relu.progress import console, progress
from falcon_relu.tokenizer import Tokenizer, train_bpe
from infer import kernels
from infer.bench import measure_widths
from infer.generation import DecodeStats
from infer.generation import generate as decode
from infer.predictor.fitting import fit_predictor
from infer.predictor.predictor import Predictor, load_predictor, save_predictor
from infer.predictor.quality import reading_curve, sensitivity
from infer.predictor.recording import open_recording, record_activations
from infer.step import MODES
from infer.weights.layout import weights_from_params
from train import loop
from train.config import TrainConfig
from train.data.batches import DataConfig, train_batches, validation_batches
from train.data.prepare import PrepareConfig, prepare
from train.data.shards import read_manifest
from train.folder.log import LOG, read_log
from train.validation import validate

PUBLISHED_RETENTION = 0.973  # average score of ReluFalcon-40B over that of Falcon-40B, six benchmarks

_SENSITIVITY_BATCHES = 2


class Demo:
    """One run of a recipe in a folder. A finished stage leaves a file in `results/`, and is not run again."""

    def __init__(self, recipe: Recipe, root: Path):
        self.recipe, self.root = recipe, root
        described = json.loads(json.dumps(dataclasses.asdict(recipe), default=str))
        path = root / "recipe.json"
        found = parse(dict[str, Any], read_json(path), path) if os.path.lexists(path) else {}
        if any(found.get(name, value) != value for name, value in described.items()):  # a run may lack a new setting
            raise FalconError(f"{root} holds a run of another recipe; choose another --out, or remove it")
        write_json(root / "recipe.json", described)

    def run(self) -> dict[str, Any]:
        """Runs every stage that is not finished; returns all results, as `report.render` takes them."""
        results: dict[str, Any] = {}
        seconds: dict[str, float] = {}
        processor: dict[str, float] = {}
        stages: list[tuple[str, Callable[[], Any]]] = [
            ("text", self._text),
            ("tokens", self._tokens),
            ("teacher", lambda: loop.run(self._placed(self.recipe.teacher))),
            ("lm_only", lambda: loop.run(self._placed(self.recipe.lm_only))),
            ("lm_kl", lambda: loop.run(self._placed(self.recipe.lm_kl))),
            ("quality", lambda: self._quality(results)),
            ("predictor", self._predictor),
            ("decode", self._decode),
            ("widths", self._widths),
            ("benchmarks", lambda: benchmarks(self.root, self.root / "questions", self.recipe.questions)),
        ]
        for number, (name, stage) in enumerate(stages, 1):
            done = self.root / "results" / f"{name}.json"
            if not os.path.lexists(done):
                console.print(f"[{number}/{len(stages)}] {name}", style="bold")
                start, busy = time.perf_counter(), _processor_seconds()
                value = stage()
                took = {"seconds": time.perf_counter() - start, "processor_seconds": _processor_seconds() - busy}
                write_sealed(done, took | {"results": value})
            stored = read_sealed(done, "remove it, and the same command measures it again")
            results[name], seconds[name] = stored["results"], stored["seconds"]
            processor[name] = stored["processor_seconds"]
        return self._results(results, seconds, processor)

    # ---- stages

    def _text(self) -> list[dict[str, Any]]:
        found = []
        for name in self.recipe.corpora:
            texts = itertools.islice(documents(name), self.recipe.documents)
            pieces = [piece for text in texts for piece in sections(text, self.recipe.section_chars)]
            write_texts(self.root / "text" / f"{name}.jsonl", pieces)
            corpus = CORPORA[name]
            found.append({"name": name, "about": corpus.about, "licence": corpus.licence, "documents": len(pieces)})
        return found

    def _tokens(self) -> dict[str, int]:
        tokenizer = self.root / "tokenizer.json"
        if not tokenizer.exists():
            console.print("training a tokenizer", style="dim")
            train_bpe(self._texts(), self.recipe.vocab_size, tokenizer)
        counts = {}
        for name in self.recipe.corpora:
            folder = self.root / "tokens" / name
            prepare(
                PrepareConfig(
                    inputs=(str(self.root / "text" / f"{name}.jsonl"),),
                    tokenizer=tokenizer,
                    out=folder,
                    seq_len=self.recipe.teacher.data.seq_len,
                    validation_fraction=self.recipe.validation_fraction,
                    unit_mb=4,
                )
            )
            counts[name] = sum(split.tokens for split in read_manifest(folder).splits.values())
        return counts

    def _quality(self, results: dict[str, Any]) -> list[dict[str, Any]]:
        """All models on the held-out rows; for trained ones, the validation at the end of their training."""
        teacher = self.root / "teacher" / "weights"
        measured = [
            ("teacher (GELU)", results["teacher"]),
            ("swapped, not tuned", validate(teacher, self._data, activation="relu", teacher=teacher)),
            ("tuned on text alone (LM)", results["lm_only"]),
            ("tuned with LM + KL", results["lm_kl"]),
        ]
        return [
            {
                "model": name,
                "cross_entropy": found["cross_entropy"],
                "perplexity": math.exp(found["cross_entropy"]),
                "accuracy": found["accuracy"],
                "kl": found.get("kl"),
                "agreement": found.get("agreement"),
                "zeros": statistics.fmean(found["zeros"]),
                "zeros_by_layer": found["zeros"],
            }
            for name, found in measured
        ]

    def _predictor(self) -> dict[str, Any]:
        recipe, folder = self.recipe, self.root / "recording"
        config, params = load_model(self.root / "lm_kl" / "weights")
        if folder.exists():
            recording = open_recording(folder)
        else:
            recording = record_activations(
                config, params, train_batches(self._data), folder, tokens=recipe.recorded_tokens, input="mlp_input"
            )
        fitted = fit_predictor(recording, config, params, [recipe.rank] * config.n_layers, recipe.fit)
        batches = list(itertools.islice(train_batches(self._data), _SENSITIVITY_BATCHES))
        weights = sensitivity(config, params, fitted, batches)
        rows = list(itertools.islice(validation_batches(self._data), recipe.quality_batches))
        points, best = [], None
        with progress("quality against neurons read", len(recipe.reads), "points") as advance:
            for predictor, found in reading_curve(
                config, params, fitted, recording, rows, recipe.reads, sensitivity=weights
            ):
                points.append(found | {"cross_entropy": found["sparse_loss"]})
                if found["target"] == recipe.read:
                    best = (predictor, points[-1])
                advance()
        assert best is not None  # Recipe checks that `read` is among `reads`
        predictor, operating = best
        save_predictor(predictor, self.root / "predictor.safetensors", replace=True)
        return {"layers": _predictor_rows(predictor, config.d_ff), "tradeoff": points, "operating_point": operating}

    def _decode(self) -> dict[str, Any]:
        recipe, tokenizer = self.recipe, Tokenizer(self.root / "tokenizer.json")
        prompts = list(itertools.islice(self._held_out_prompts(), recipe.prompts))
        config, params = load_model(self.root / "lm_kl" / "weights")
        weights = weights_from_params(
            params, config, predictor=load_predictor(self.root / "predictor.safetensors", config)
        )
        texts: dict[str, list[list[int]]] = {}
        rows = []
        settings = [(mode, backend) for backend in kernels.available() for mode in MODES]
        with progress("decode", len(settings) * len(prompts), "prompts") as advance:
            for mode, backend in settings:
                runs, new = [], []
                for prompt in prompts:
                    runs.append(DecodeStats())
                    new += decode(weights, [prompt], recipe.sampling, mode=mode, backend=backend, stats=runs[-1])
                    advance(note=f"{mode}, {backend}")
                texts.setdefault(mode, new)
                rows.append(
                    {
                        "mode": mode,
                        "backend": backend,
                        "tokens_per_second": statistics.median(run.steps_per_second for run in runs),
                        "kilobytes_per_token": statistics.fmean(run.step_bytes for run in runs) / 1e3,
                        "mlp_share_read": statistics.fmean(run.mlp_read for run in runs),
                        "same_text_as_dense": new == texts["dense"] or same_fraction(new, texts["dense"]),
                    }
                )
        teacher_config, teacher_params = load_model(self.root / "teacher" / "weights")
        texts["teacher"] = generate(Falcon(teacher_config), teacher_params, prompts, recipe.sampling)
        samples = [
            {"prompt": tokenizer.decode(prompt)} | {name: tokenizer.decode(new[i]) for name, new in texts.items()}
            for i, prompt in enumerate(prompts)
        ]
        return {"rows": rows, "samples": samples}

    def _widths(self) -> list[dict[str, Any]]:
        recipe, backends = self.recipe, kernels.available()
        rows = []
        with progress(f"decode at the widths of {recipe.widths}", len(backends), "backends") as advance:
            for backend in backends:
                for found in measure_widths(
                    recipe.widths,
                    layers=recipe.widths_layers,
                    active=recipe.widths_active,
                    steps=recipe.widths_steps,
                    backend=backend,
                ):
                    rate = found["bytes"] / found["seconds"]
                    rows.append(
                        {
                            "mode": found["name"],
                            "backend": backend,
                            "milliseconds": 1e3 * found["seconds"],
                            "megabytes": found["bytes"] / 1e6,
                            "gb_s": rate / 1e9,
                            "memory_gb_s": found["bandwidth"] / 1e9,
                            "share_of_memory": rate / found["bandwidth"],
                            "read": found["active"],
                        }
                    )
                advance(note=backend)
        return rows

    # ---- prompts, results and paths

    def _held_out_prompts(self) -> Iterator[list[int]]:
        """Prompts: the first tokens of held-out rows, each within one document, alternating between the corpora."""
        wanted = self.recipe.prompt_tokens
        by_source = [
            (
                tokens[:wanted].tolist()
                for batch in validation_batches(dataclasses.replace(self._data, sources=(source,)))
                for tokens, segments in zip(batch["tokens_BxT"], batch["segment_ids_BxT"], strict=True)
                if np.all(segments[:wanted] == 1)
            )
            for source in self._data.sources
        ]
        while True:
            for prompts in by_source:
                yield next(prompts)

    def _results(
        self, results: dict[str, Any], seconds: dict[str, float], processor: dict[str, float]
    ) -> dict[str, Any]:
        recipe, quality, predictor = self.recipe, results["quality"], results["predictor"]
        architecture = read_config(self.root / "lm_kl" / "weights")
        accuracy = [row["accuracy"] for row in quality]
        retained = accuracy[3] / accuracy[0]
        return {
            "machine": machine()
            | {"read_bandwidth_gb_s": statistics.median(row["memory_gb_s"] for row in results["widths"])},
            "seconds": seconds,
            "processor_seconds": processor,
            "model": {
                "parameters": architecture.n_params,
                "layers": architecture.n_layers,
                "d_model": architecture.d_model,
                "d_ff": architecture.d_ff,
                "heads": architecture.n_heads,
                "kv_heads": architecture.n_kv_heads,
                "vocab": architecture.vocab_size,
                "train_tokens_teacher": _trained_tokens(recipe.teacher),
                "train_tokens_student": _trained_tokens(recipe.lm_kl),
            },
            "corpora": [row | {"tokens": results["tokens"][row["name"]]} for row in results["text"]],
            "curves": {name: read_log(self.root / name / LOG) for name in ("teacher", "lm_only", "lm_kl")},
            "quality": quality,
            "retained": {
                "lm_only": accuracy[2] / accuracy[0],
                "lm_kl": retained,
                "published": PUBLISHED_RETENTION,
                "met": retained >= PUBLISHED_RETENTION,
                "why": _why(retained, recipe),
            },
            "zeros_by_layer": {
                name: quality[i]["zeros_by_layer"] for i, name in enumerate(("swapped", "lm_only", "lm_kl"), 1)
            },
            "predictor": predictor["layers"],
            "tradeoff": predictor["tradeoff"],
            "operating_point": predictor["operating_point"],
            "decode": results["decode"]["rows"],
            "widths": results["widths"],
            "widths_of": {
                "model": recipe.widths,
                "layers": recipe.widths_layers,
                "of_layers": family(recipe.widths).n_layers,
                "rank": family(recipe.widths).d_model // 8,
            },
            "samples": results["decode"]["samples"],
            "benchmarks": results["benchmarks"]["rows"],
            "benchmarks_missing": results["benchmarks"]["missing"],
        }

    @property
    def _data(self) -> DataConfig:
        return self._placed(self.recipe.teacher).data

    def _placed(self, config: TrainConfig) -> TrainConfig:
        """The config of a training run with its paths moved into this folder."""
        sources = tuple(dataclasses.replace(source, path=self.root / source.path) for source in config.data.sources)
        return dataclasses.replace(
            config,
            out=self.root / config.out,
            data=dataclasses.replace(config.data, sources=sources),
            init_from=config.init_from and str(self.root / config.init_from),
            teacher=config.teacher and str(self.root / config.teacher),
        )

    def _texts(self) -> Iterator[str]:
        for name in self.recipe.corpora:
            with (self.root / "text" / f"{name}.jsonl").open(encoding="utf-8") as file:
                yield from (json.loads(line)["text"] for line in file)


def sections(text: str, size: int) -> Iterator[str]:
    """Splits a text at blank lines into pieces of at least `size` characters (the last may be shorter)."""
    piece: list[str] = []
    for paragraph in text.split("\n\n"):
        piece.append(paragraph)
        if sum(map(len, piece)) >= size:
            yield "\n\n".join(piece)
            piece = []
    if piece:
        yield "\n\n".join(piece)


def same_fraction(texts: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> float:
    """Fraction of the tokens that come before the first difference, over all texts."""
    same = sum(
        len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))))
        for a, b in zip(texts, expected, strict=True)
    )
    return same / max(sum(map(len, expected)), 1)


def _trained_tokens(config: TrainConfig) -> int:
    return config.steps * config.data.batch_size * config.data.seq_len


def _processor_seconds() -> float:
    """CPU time of this process and of its finished child processes, in seconds, all cores added up."""
    return sum(os.times()[:4])


def _why(retained: float, recipe: Recipe) -> str:
    if retained > 1:
        return (
            "The student was trained on more text than its briefly trained teacher, so that this does not tell what "
            "the swap costs a fully trained model."
        )
    if retained >= PUBLISHED_RETENTION:
        return ""
    return (
        f"missed by {PUBLISHED_RETENTION - retained:.1%}: the student was tuned on {_trained_tokens(recipe.lm_kl):,} "
        "tokens, the published one on about 5 billion."
    )


def _predictor_rows(predictor: Predictor, n_neurons: int) -> list[dict[str, Any]]:
    return [
        {
            "layer": i,
            "rank": rank,
            "recall": found["recall"],
            "energy": found["energy"],
            "precision": found["precision"],
            "read": found["read"] / n_neurons,
            "fired": found["fired"] / n_neurons,
        }
        for i, (rank, found) in enumerate(zip(predictor.ranks, predictor.measured, strict=True))
    ]
