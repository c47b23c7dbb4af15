"""Rates of `prepare` against the tokenizer alone, and of the loader: `python -m tests.benchmarks.data_rates`.

The text is what `falcon_relu.corpora` gives (22 MB of prose and code) under the real Falcon tokenizer. The ways to
tokenise take turns, so that a machine that slows down slows them all; every time is wall time, that of `prepare` from
its call to its return: starting processes, reading, parsing, packing and writing included.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tokenizers
import tyro

from falcon_relu import corpora
from falcon_relu.cli.report import report
from falcon_relu.files import write_texts
from train.data.batches import DataConfig, Source, train_batches
from train.data.prepare import PrepareConfig, prepare

DOCUMENTS_A_CALL = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Rates of tokenising and loading."""

    runs: int = 3
    """Turns of each way to tokenise."""
    json: Path | None = None
    """Also write the figures to this file."""


def run(args: Args) -> None:
    """Measures and reports."""
    texts = [text for name in corpora.CORPORA for text in corpora.documents(name)]
    path = corpora.falcon_tokenizer()
    engine = tokenizers.Tokenizer.from_file(str(path))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "text.jsonl"
        write_texts(source, texts)
        outs = (Path(folder) / f"shards-{i}" for i in itertools.count())
        ways: dict[str, Callable[[], int]] = {
            "encode_batch": lambda: _encode(engine.encode_batch, texts),
            "encode_batch_fast": lambda: _encode(engine.encode_batch_fast, texts),
            "prepare": lambda: (
                prepare(PrepareConfig(inputs=(str(source),), tokenizer=path, out=next(outs), unit_mb=2)).new_tokens
            ),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.runs):
            for name, way in ways.items():
                rates[name].append(_rate(way))
        loader = statistics.median(_rate(lambda: _load(Path(folder) / "shards-0")) for _ in range(args.runs))
    median = {name: statistics.median(values) for name, values in rates.items()}
    figures = {f"{name}, tokens/s": rate for name, rate in median.items()}
    for name in ("encode_batch", "encode_batch_fast"):
        figures[f"prepare / {name}"] = median["prepare"] / median[name]
    report(figures | {"loader, tokens/s": loader}, args.json)


def _rate(way: Callable[[], int]) -> float:
    start = time.perf_counter()
    tokens = way()
    return tokens / (time.perf_counter() - start)


def _encode(encode: Callable, texts: list[str]) -> int:
    calls = (texts[i : i + DOCUMENTS_A_CALL] for i in range(0, len(texts), DOCUMENTS_A_CALL))
    return sum(len(encoding.ids) for call in calls for encoding in encode(call))


def _load(folder: Path) -> int:
    config = DataConfig(sources=(Source(folder),), batch_size=8)
    return sum(batch["tokens_BxT"].size for batch in itertools.islice(train_batches(config), 1000))


if __name__ == "__main__":
    run(tyro.cli(Args))
