"""The demo's report: one HTML file that needs nothing beside it, with every number taken from the run's results.

The text is in `report.html.jinja`. A number that is missing from the results is shown as "not measured".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from falcon_relu.cli.demo import charts
from falcon_relu.cli.demo.charts import MISSING, Line, Rows, at
from falcon_relu.files import write_aside
from falcon_relu.progress import format_value

Results = Mapping[str, Any]

_CACHED_MB = 256  # weights below this may stay in a processor's caches, where times say nothing about large models


def write_report(path: Path, results: Results) -> None:
    """Writes the report of `results` to `path`, whole or not at all; an older report is replaced."""
    page = render(results)
    with write_aside(path, replace=True) as aside:
        aside.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")


def render(results: Results) -> str:
    """The report as HTML. All text in the results is shown as text.

    Args:
      results: what the demo measured: the mappings machine, seconds, processor_seconds, model, curves, retained,
        zeros_by_layer, widths_of and operating_point, and the tables corpora, quality, predictor, tradeoff, decode,
        widths, benchmarks and samples. Any part may be missing or None.
    """
    results = {**results, "derived": derived(results)}
    samples = [_sample(sample) for sample in results.get("samples") or []]
    return (
        _templates().get_template("report.html.jinja").render({**results, "samples": samples, "plots": _plots(results)})
    )


def _templates() -> jinja2.Environment:
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        finalize=lambda value: MISSING if value is None or isinstance(value, jinja2.Undefined) else value,
        keep_trailing_newline=True,
    )
    templates.filters["show"] = _show
    templates.globals["missing"] = MISSING
    return templates


def _show(value: Any, spec: str = "") -> Any:
    """A number in a Python format, or with four significant digits for "digits"; None where it is missing."""
    if value is None or isinstance(value, jinja2.Undefined):
        return None
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    return format_value(value) if spec == "digits" else format(value, spec)


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt and its continuations, each split at the first difference from the text of dense decoding."""

    def parts(name: str) -> tuple[str | None, str]:
        text, dense = sample.get(name), sample.get("dense")
        if text is None or dense is None or name == "teacher":
            return text, ""
        equal = (a == b for a, b in zip(text, dense, strict=False))
        same = next((i for i, letter_equal in enumerate(equal) if not letter_equal), min(len(text), len(dense)))
        return text[:same], text[same:]

    texts = {name: parts(name) for name in ("teacher", "dense", "exact", "sparse")}
    return {"prompt": sample.get("prompt"), "texts": texts}


def _rows(results: Results, path: str) -> Rows:
    return at(results, path) or []


def derived(results: Results) -> dict[str, Any]:
    """Numbers computed from the results; None where a result that they need is missing."""
    quality = {name: _first(_rows(results, "quality"), "model", name) for name in ("teacher", "swapped", "LM + KL")}
    sparse_rows = [row for row in _rows(results, "decode") if row.get("mode") == "sparse"]
    sparse = max(sparse_rows, key=lambda row: row.get("tokens_per_second") or 0, default={})
    same_backend = [row for row in _rows(results, "decode") if row.get("backend") == sparse.get("backend")]
    dense = _first(same_backend, "mode", "dense") if sparse else {}
    short = _combine(np.subtract, at(results, "retained.published"), at(results, "retained.lm_kl"))
    mlps = _combine(
        lambda *sizes: 2 * np.prod(sizes), *(at(results, f"model.{n}") for n in ("layers", "d_model", "d_ff"))
    )
    seconds, processor = ((results.get(name) or {}).values() for name in ("seconds", "processor_seconds"))
    return {
        "teacher": quality["teacher"],
        "swapped": quality["swapped"],
        "student": quality["LM + KL"],
        "sparse": sparse,
        "dense": dense,
        "speedup": _combine(np.divide, sparse.get("tokens_per_second"), dense.get("tokens_per_second")),
        "bytes": _combine(np.divide, sparse.get("kilobytes_per_token"), dense.get("kilobytes_per_token")),
        "zeros": _mean(at(results, "zeros_by_layer.lm_kl")),
        "fired": _mean([row.get("fired") for row in _rows(results, "predictor")]),
        "widths": _widths(_rows(results, "widths")),
        "short": _combine(np.multiply, 100, short),
        "mlp_share": _combine(np.divide, mlps, at(results, "model.parameters")),
        "seconds": _combine(lambda *each: sum(each), *seconds) if seconds else None,
        "processor_minutes": _combine(lambda *each: sum(each) / 60, *processor) if processor else None,
    }


def _widths(rows: Rows) -> dict[str, Any]:
    """At a large model's widths: the backend on which sparse decoding is fastest, and how it compares with dense there.

    `cached` tells that the widths are too small for that; then there is no `speedup`.
    """
    timed = [row for row in rows if row.get("mode") == "sparse" and row.get("milliseconds")]
    sparse = min(timed, key=lambda row: row["milliseconds"], default={})
    same_backend = [row for row in rows if sparse and row.get("backend") == sparse.get("backend")]
    dense = _first(same_backend, "mode", "dense")
    cached = (dense.get("megabytes") or _CACHED_MB) < _CACHED_MB
    speedup = _combine(np.divide, dense.get("milliseconds"), sparse.get("milliseconds"))
    return {"sparse": sparse, "dense": dense, "cached": cached, "speedup": None if cached else speedup}


def _first(rows: Rows, key: str, part: str) -> Mapping[str, Any]:
    """The first row whose `key` contains `part`."""
    return next((row for row in rows if part in str(row.get(key))), {})


def _combine(function: Callable[..., Any], *values: float | None) -> float | None:
    """`function` of the values, or None where one is missing."""
    return None if None in values else float(function(*values))


def _mean(values: Sequence[float | None] | None) -> float | None:
    return _combine(lambda *each: np.mean(each), *values) if values else None


def _plots(results: Results) -> dict[str, str]:
    loss, from_teacher, from_dense = (
        f"{name} (nats a token)" for name in ("cross-entropy", "KL from the teacher", "KL(dense || sparse)")
    )
    students = {"lm_only": ("LM", charts.LM), "lm_kl": ("LM + KL", charts.KL)}
    tuned, distance = (
        [line for name, look in students.items() for line in _curves(results, name, *look, key)]
        for key in ("cross_entropy", "kl")
    )
    layers = {
        look: [{"layer": i, "zeros": share} for i, share in enumerate(at(results, f"zeros_by_layer.{name}") or [])]
        for name, look in {"swapped": ("swapped, not tuned", charts.SWAPPED), **students}.items()
    }
    zeros = [charts.line(rows, "layer", "zeros", label, color, marker="o") for (label, color), rows in layers.items()]
    level = {"teacher, held out": at(results, "derived.teacher.cross_entropy")}
    firing = {"neurons that fire": at(results, "derived.fired")}
    against = {
        key: [
            charts.line(_rows(results, "tradeoff"), "read", key, "by neurons read", charts.KL, marker="o"),
            charts.line(
                [results.get("operating_point") or {}],
                "read",
                key,
                "operating point",
                charts.INK,
                marker="D",
                ls="",
                ms=8,
            ),
        ]
        for key in ("kl", "agreement")
    }
    decode, widths = (
        [
            {
                **row,
                "label": f"{row.get('mode')}, {row.get('backend')}",
                "color": charts.MODES.get(row.get("mode", ""), charts.INK),
            }
            for row in _rows(results, table)
        ]
        for table in ("decode", "widths")
    )
    stages = [{"label": k, "seconds": v, "color": charts.KL} for k, v in (results.get("seconds") or {}).items()]
    teacher = _curves(results, "teacher", "teacher", charts.TEACHER, "cross_entropy")
    read = "neurons read"
    return {
        "teacher": charts.lines("The teacher learns", "step", loss, teacher),
        "students": charts.lines("Tuning the ReLU students", "step", loss, tuned, level=level),
        "distance": charts.lines("Distance from the teacher", "step", from_teacher, distance),
        "zeros": charts.lines("Zeros by layer", "layer", "zero activations", zeros, percent="y"),
        "kl": charts.lines(
            "Quality lost against neurons read", read, from_dense, against["kl"], upright=firing, percent="x"
        ),
        "agreement": charts.lines(
            "Agreement against neurons read",
            read,
            "same first choice as dense",
            against["agreement"],
            upright=firing,
            percent="xy",
        ),
        "bytes": charts.bars("Bytes read for a token", "kB a token", decode, "kilobytes_per_token", ",.0f"),
        "speed": charts.bars("Speed", "tokens a second", decode, "tokens_per_second", ",.1f"),
        "widths": charts.bars("Time for a token, random weights", "milliseconds", widths, "milliseconds", ",.1f"),
        "seconds": charts.bars("Time by stage", "seconds", stages, "seconds", ",.1f"),
    }


def _curves(results: Results, run: str, label: str, color: str, key: str) -> list[Line]:
    """A metric over a run's log: a pale line for training, markers for held-out text."""
    log = _rows(results, f"curves.{run}")
    return [
        charts.line(log, "step", key, f"{label}, training", color, lw=1, alpha=0.55),
        charts.line(log, "step", f"validation.{key}", f"{label}, held out", color, marker="o"),
    ]
