"""The demo's report: one HTML file that needs nothing beside it, with every number taken from the run's results.

A number that the results lack is shown as "not measured". Plots are inline SVG whose text stays text and whose colours
are CSS variables, so that one file serves screens, phones, dark mode and paper.
"""

from __future__ import annotations

import html
import io
import re
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from falcon_relu.files import write_aside

Results = Mapping[str, Any]
Rows = Sequence[Mapping[str, Any]]


class _Html(str):
    """Text that is HTML already."""


_MISSING = _Html('<span class="missing">not measured</span>')


def write_report(path: Path, results: Results) -> None:
    """Writes the report of `results` to `path`, whole or not at all; an older report is replaced."""
    page = render(results)
    with write_aside(path, replace=True) as aside:
        aside.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")


def render(results: Results) -> str:
    """The report as HTML.

    Args:
      results: what the demo measured: the mappings machine, seconds, model, curves, retained, zeros_by_layer and
        operating_point, and the tables corpora, quality, predictor, tradeoff, decode and samples. Any part may be
        missing or None.
    """
    results = {**results, "derived": _derived(results)}
    parts = {
        "style": _Html(_CSS),
        "verdict": _verdict(results),
        "samples": _Html("".join(map(_sample, results.get("samples") or [])) or _MISSING),
        "plots": _plots(results),
        "tables": {name: _table(*shape, _rows(results, name)) for name, shape in _TABLES.items()},
    }
    return _fill(_PAGE, {**results, **parts})


# Figures as text: a value and how Python formats it


def _get(value: Any, path: str) -> Any:
    """What lies at a dotted path in nested mappings, None where any part is missing."""
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _show(value: Any, spec: str = "") -> _Html:
    if value is None:
        return _MISSING
    if isinstance(value, _Html):
        return value
    if isinstance(value, bool):
        return _Html("yes" if value else "no")
    return _Html(html.escape(value if isinstance(value, str) else format(value, spec)))


class _Formatter(string.Formatter):
    """`{path:spec}` stands for what lies at a dotted path."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        return _get(kwargs, field_name), field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        return _show(value, format_spec)


def _fill(template: str, values: Mapping[str, Any]) -> _Html:
    return _Html(_Formatter().vformat(template, (), values))


_TABLES: dict[str, tuple[str, dict[str, tuple[str, str]]]] = {  # caption, then heading and format of each column
    "quality": (
        "On held-out text, the same for every row.",
        {
            "model": ("model", ""),
            "cross_entropy": ("cross-entropy, nats a token", ".3f"),
            "perplexity": ("perplexity", ",.2f"),
            "accuracy": ("next-token accuracy", ".1%"),
            "kl": ("KL from the teacher, nats a token", ".3f"),
            "agreement": ("same first choice as the teacher", ".1%"),
            "zeros": ("zero activations", ".1%"),
        },
    ),
    "predictor": (
        "Predictors on held-out text, a layer a row.",
        {
            "layer": ("layer", ".0f"),
            "rank": ("rank", ",.0f"),
            "recall": ("recall", ".1%"),
            "mass_recall": ("recall by size of activation", ".1%"),
            "precision": ("precision", ".1%"),
            "predicted": ("neurons predicted", ".1%"),
            "active": ("neurons that fire", ".1%"),
        },
    ),
    "decode": (
        "The same prompts in every mode.",
        {
            "mode": ("mode", ""),
            "backend": ("backend", ""),
            "tokens_per_second": ("tokens/s", ",.1f"),
            "kilobytes_per_token": ("kB read a token", ",.0f"),
            "mlp_share_read": ("share of the MLPs read", ".1%"),
            "same_text_as_dense": ("same text as dense", ".1%"),
        },
    ),
    "widths": (
        "One token, random weights in bf16, the vocabulary head included.",
        {
            "mode": ("mode", ""),
            "backend": ("backend", ""),
            "active": ("neurons read", ".1%"),
            "milliseconds": ("ms a token", ",.1f"),
            "megabytes": ("MB read a token", ",.0f"),
            "gb_s": ("GB/s", ",.1f"),
            "share_of_memory": ("share of what memory delivers", ".0%"),
        },
    ),
    "benchmarks": (
        "A few questions of the published suite, by lm-eval. With so few, and models this small, scores near chance "
        "are what to expect.",
        {
            "benchmark": ("benchmark", ""),
            "shots": ("examples shown", ".0f"),
            "questions": ("questions", ",.0f"),
            "original": ("original (GELU)", ".1%"),
            "relu": ("ReLU, dense", ".1%"),
            "sparse": ("ReLU, sparse decoding", ".1%"),
            "error": ("standard error", ".1%"),
            "chance": ("chance", ".0%"),
        },
    ),
    "corpora": (
        "What the models were trained and measured on.",
        {
            "name": ("corpus", ""),
            "about": ("what it is", ""),
            "licence": ("licence", ""),
            "documents": ("documents", ",.0f"),
            "tokens": ("tokens", ",.0f"),
        },
    ),
}


def _table(caption: str, columns: Mapping[str, tuple[str, str]], rows: Rows) -> _Html:
    if not rows:
        return _Html(f"<p>{_MISSING}</p>")
    kinds = {name: "" if spec else ' class="text"' for name, (_, spec) in columns.items()}
    head = "".join(f"<th{kinds[name]}>{heading}</th>" for name, (heading, _) in columns.items())
    body = "".join(
        "<tr>"
        + "".join(f"<td{kinds[name]}>{_show(row.get(name), spec)}</td>" for name, (_, spec) in columns.items())
        + "</tr>"
        for row in rows
    )
    caption = f"<caption>{caption}</caption>"
    return _Html(f'<div class="scroll"><table>{caption}<thead><tr>{head}</tr></thead>{body}</table></div>')


def _verdict(results: Results) -> _Html:
    outcome = {
        None: "{retained.met}.",
        True: "<strong>reached</strong>.",
        False: "<strong>missed by {derived.short:.2f} percentage points</strong>. {retained.why}",
    }
    return _fill(outcome[_get(results, "retained.met")], results)


def _sample(sample: Mapping[str, Any]) -> str:
    """A prompt and its continuations; what differs from dense decoding's is marked."""

    def cell(name: str) -> str:
        text, dense = sample.get(name), sample.get("dense")
        if text is None or dense is None or name == "teacher":
            return _show(text)
        equal = (a == b for a, b in zip(text, dense, strict=False))
        same = next((i for i, letter_equal in enumerate(equal) if not letter_equal), min(len(text), len(dense)))
        return _show(text[:same]) + (f"<mark>{_show(text[same:])}</mark>" if text[same:] else "")

    cells = "".join(
        f"<div><h4>{name}</h4><p>{cell(name)}</p></div>" for name in ("teacher", "dense", "exact", "sparse")
    )
    return f"<article><blockquote>{_show(sample.get('prompt'))}</blockquote><div>{cells}</div></article>"


# Figures that follow from the results


def _rows(results: Results, path: str) -> Rows:
    return _get(results, path) or []


def _derived(results: Results) -> dict[str, Any]:
    quality = {name: _first(_rows(results, "quality"), "model", name) for name in ("teacher", "swapped", "LM + KL")}
    sparse_rows = [row for row in _rows(results, "decode") if row.get("mode") == "sparse"]
    sparse = max(sparse_rows, key=lambda row: row.get("tokens_per_second") or 0, default={})
    same_backend = [row for row in _rows(results, "decode") if row.get("backend") == sparse.get("backend")]
    dense = _first(same_backend, "mode", "dense") if sparse else {}
    short = _combine(np.subtract, _get(results, "retained.published"), _get(results, "retained.lm_kl"))
    mlps = _combine(
        lambda *sizes: 2 * np.prod(sizes), *(_get(results, f"model.{n}") for n in ("layers", "d_model", "d_ff"))
    )
    seconds = (results.get("seconds") or {}).values()
    return {
        "teacher": quality["teacher"],
        "swapped": quality["swapped"],
        "student": quality["LM + KL"],
        "sparse": sparse,
        "dense": dense,
        "speedup": _combine(np.divide, sparse.get("tokens_per_second"), dense.get("tokens_per_second")),
        "bytes": _combine(np.divide, sparse.get("kilobytes_per_token"), dense.get("kilobytes_per_token")),
        "zeros": _mean(_get(results, "zeros_by_layer.lm_kl")),
        "active": _mean([row.get("active") for row in _rows(results, "predictor")]),
        "short": _combine(np.multiply, 100, short),
        "mlp_share": _combine(np.divide, mlps, _get(results, "model.parameters")),
        "seconds": _combine(lambda *each: sum(each), *seconds) if seconds else None,
    }


def _first(rows: Rows, key: str, part: str) -> Mapping[str, Any]:
    """The first row whose `key` contains `part`."""
    return next((row for row in rows if part in str(row.get(key))), {})


def _combine(function: Callable[..., Any], *values: float | None) -> float | None:
    """`function` of the values, or None where one is missing."""
    return None if None in values else float(function(*values))


def _mean(values: Sequence[float | None] | None) -> float | None:
    return _combine(lambda *each: np.mean(each), *values) if values else None


# Plots

# Colours and the CSS variables that they become; one meaning each in all plots.
_INK, _GRID, _TEACHER, _SWAPPED = "#20262e", "#d9dde3", "#66707d", "#b0307a"
_LM, _KL, _EXACT = "#c25a12", "#1f66b0", "#1c8474"
_VARIABLES = {
    _INK: "ink",
    _GRID: "grid",
    _TEACHER: "teacher",
    _SWAPPED: "swapped",
    _LM: "lm",
    _KL: "kl",
    _EXACT: "exact",
}
_MODES = {"dense": _TEACHER, "exact": _EXACT, "sparse": _KL}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "legend.frameon": False,
} | dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK)

_Line = tuple[np.ndarray, dict[str, Any]]  # points [n, 2] and how they are drawn


def _plots(results: Results) -> dict[str, _Html]:
    loss, from_teacher, from_dense = (
        f"{name} (nats a token)" for name in ("cross-entropy", "KL from the teacher", "KL(dense || sparse)")
    )
    students = {"lm_only": ("LM", _LM), "lm_kl": ("LM + KL", _KL)}
    tuned, distance = (
        [line for name, look in students.items() for line in _curves(results, name, *look, key)]
        for key in ("cross_entropy", "kl")
    )
    layers = {
        look: [{"layer": i, "zeros": share} for i, share in enumerate(_get(results, f"zeros_by_layer.{name}") or [])]
        for name, look in {"swapped": ("swapped, not tuned", _SWAPPED), **students}.items()
    }
    zeros = [_line(rows, "layer", "zeros", label, color, marker="o") for (label, color), rows in layers.items()]
    level = {"teacher, held out": _get(results, "derived.teacher.cross_entropy")}
    firing = {"neurons that fire": _get(results, "derived.active")}
    against = {
        key: [
            _line(_rows(results, "tradeoff"), "read", key, "by neurons read", _KL, marker="o"),
            _line(
                [results.get("operating_point") or {}], "read", key, "operating point", _INK, marker="D", ls="", ms=8
            ),
        ]
        for key in ("kl", "agreement")
    }
    decode, widths = (
        [
            {**row, "label": f"{row.get('mode')}, {row.get('backend')}", "color": _MODES.get(row.get("mode", ""), _INK)}
            for row in _rows(results, table)
        ]
        for table in ("decode", "widths")
    )
    stages = [{"label": k, "seconds": v, "color": _KL} for k, v in (results.get("seconds") or {}).items()]
    teacher = _curves(results, "teacher", "teacher", _TEACHER, "cross_entropy")
    read = "neurons read"
    return {
        "teacher": _lines("The teacher learns", "step", loss, teacher),
        "students": _lines("Tuning the ReLU students", "step", loss, tuned, level=level),
        "distance": _lines("Distance from the teacher", "step", from_teacher, distance),
        "zeros": _lines("Zeros by layer", "layer", "zero activations", zeros, percent="y"),
        "kl": _lines("Quality lost against neurons read", read, from_dense, against["kl"], upright=firing, percent="x"),
        "agreement": _lines(
            "Agreement against neurons read",
            read,
            "same first choice as dense",
            against["agreement"],
            upright=firing,
            percent="xy",
        ),
        "bytes": _bars("Bytes read for a token", "kB a token", decode, "kilobytes_per_token", ",.0f"),
        "speed": _bars("Speed", "tokens a second", decode, "tokens_per_second", ",.1f"),
        "widths": _bars("Time for a token at real widths", "milliseconds", widths, "milliseconds", ",.1f"),
        "seconds": _bars("Time by stage", "seconds", stages, "seconds", ",.1f"),
    }


def _curves(results: Results, run: str, label: str, color: str, key: str) -> list[_Line]:
    """A figure along a run's log: training pale, held out marked."""
    log = _rows(results, f"curves.{run}")
    return [
        _line(log, "step", key, f"{label}, training", color, lw=1, alpha=0.55),
        _line(log, "step", f"validation.{key}", f"{label}, held out", color, marker="o"),
    ]


def _line(rows: Rows, x: str, y: str, label: str, color: str, **look: Any) -> _Line:
    """The points of the rows that have both figures."""
    points = np.array([[_get(row, x), _get(row, y)] for row in rows], float).reshape(-1, 2)
    known = points[np.isfinite(points).all(axis=1)]
    label = label if len(known) else f"{label}: not measured"
    return known, {"label": label, "color": color, "lw": 1.8, "ms": 4, **look}


def _lines(
    title: str,
    x: str,
    y: str,
    lines: Sequence[_Line],
    *,
    level: Mapping[str, float | None] | None = None,
    upright: Mapping[str, float | None] | None = None,
    percent: str = "",
) -> _Html:
    """A plot of lines, with dashed levels (horizontal) and uprights (vertical), and shares on the `percent` axes."""

    def draw(axes: Axes) -> None:
        for points, look in lines:
            axes.plot(*points.T, **look)
        for marks, add in ((level, axes.axhline), (upright, axes.axvline)):
            for label, value in (marks or {}).items():
                if value is not None:
                    add(value, color=_TEACHER, ls="--", label=label)
                else:
                    axes.plot([], color=_TEACHER, ls="--", label=f"{label}: not measured")
        axes.set(xlabel=x, ylabel=y)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer="x" not in percent, steps=[1, 2, 5, 10]))
        for axis in percent:
            getattr(axes, f"{axis}axis").set_major_formatter(PercentFormatter(1))
        axes.figure.legend(loc="outside lower center", ncols=2)

    return _svg(title, draw if any(len(points) for points, _ in lines) else None)


def _bars(title: str, x: str, rows: Rows, key: str, spec: str) -> _Html:
    """A bar for each row's `key`, named by its `label`."""

    def draw(axes: Axes) -> None:
        places, values = np.arange(len(rows)), [row.get(key) for row in rows]
        bars = axes.barh(places, [value or 0 for value in values], color=[row["color"] for row in rows], height=0.65)
        axes.bar_label(bars, ["not measured" if v is None else format(v, spec) for v in values], padding=4)
        axes.set(xlabel=x)
        axes.set_yticks(places, [row["label"] for row in rows])
        axes.invert_yaxis()
        axes.margins(x=0.18)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(5))

    return _svg(title, draw if rows else None, height=1.3 + 0.34 * len(rows))


def _svg(title: str, draw: Callable[[Axes], None] | None, height: float = 3.6) -> _Html:
    """A plot as a figure with inline SVG; without `draw`, that there is nothing to show."""
    if draw is None:
        return _Html(f"<figure><h3>{title}</h3><p>{_MISSING}</p></figure>")
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": title}):  # ids that are unique here and equal in every run
        figure = Figure(figsize=(4.8, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title)
        draw(axes)
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| version="[^"]*"|(?<=<g) id="[^"]*"', "", svg[svg.index("<svg") :])
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    return _Html("<figure>" + svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1) + "</figure>")


_CSS = """
:root { color-scheme: light dark; --paper: #fff; --card: #f5f6f8; --mark: #ffe3b8;
  --ink: #20262e; --grid: #d9dde3; --teacher: #66707d; --swapped: #b0307a; --lm: #c25a12; --kl: #1f66b0;
  --exact: #1c8474; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #14181d; --card: #1e242b; --mark: #5c4013;
  --ink: #e4e8ed; --grid: #353d47; --teacher: #9aa5b1; --swapped: #f07fbf;
  --lm: #f59a57; --kl: #6fb0f5; --exact: #5cc7b2; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-bottom: .25rem; border-bottom: 1px solid var(--grid); }
h3, h4 { font-size: .95rem; margin: 0 0 .5rem; }
p, li { max-width: 46rem; }
.lead { font-size: 1.1rem; }
.missing { color: var(--teacher); font-style: italic; font-weight: normal; }
.tiles, .figures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 9rem), 1fr)); }
.figures { grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); margin: 1rem 0; }
.tiles div, article, .verdict { background: var(--card); border-radius: .5rem; padding: .75rem 1rem; }
.tiles strong { display: block; font-size: 1.7rem; line-height: 1.3; color: var(--kl); }
.verdict { border-left: .3rem solid var(--kl); }
figure { margin: 0; max-width: 34rem; }
svg { width: 100%; height: auto; } svg text { font-family: inherit !important; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .4rem; }
th, td { padding: .35rem .75rem; text-align: right; border-bottom: 1px solid var(--grid); vertical-align: top; }
th { vertical-align: bottom; line-height: 1.25; max-width: 8rem; } td { white-space: nowrap; }
.text { text-align: left; min-width: 6rem; white-space: normal; }
dl { display: grid; grid-template-columns: auto 1fr; gap: .2rem 1rem; margin: 0; font-size: .9rem; }
dd { margin: 0; overflow-wrap: anywhere; }
article { margin: 1rem 0; } article > div { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr)); }
blockquote { margin: 0 0 .75rem; font-weight: 600; }
article p { margin: 0; font-size: .9rem; } article p, blockquote { white-space: pre-wrap; overflow-wrap: anywhere; }
mark { background: var(--mark); color: inherit; }
code { background: var(--card); padding: .1rem .35rem; border-radius: .25rem; }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } .scroll { overflow: visible; }
  figure, article, tr, .tiles { break-inside: avoid; } h2 { break-after: avoid; }
  article > div { grid-template-columns: repeat(4, 1fr); } table { font-size: 8pt; } }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>ReLU-Falcon: what the demo measured</title>
<style>{style}</style>
</head>
<body>
<h1>A Falcon that reads only what fires</h1>
<p class="lead">A Falcon with {model.parameters:,} parameters and GELU was trained on {model.train_tokens_teacher:,}
tokens of text. Its GELU was replaced by ReLU, and the result was tuned on {model.train_tokens_student:,} tokens with
the language-modelling loss and the KL divergence from the original. It predicts the next token right at
{derived.student.accuracy:.1%} of held-out positions; the teacher does at {derived.teacher.accuracy:.1%}. Predictors
then chose {derived.sparse.mlp_share_read:.1%} of the MLP neurons to read for a token, and the CPU decoded
{derived.sparse.tokens_per_second:,.1f} tokens a second, against {derived.dense.tokens_per_second:,.1f} reading all of
them.</p>
<div class="tiles">
<div><strong>{retained.lm_kl:.1%}</strong> of the teacher's next-token accuracy kept by the ReLU student</div>
<div><strong>{derived.zeros:.1%}</strong> of its MLP activations are exactly zero</div>
<div><strong>{derived.speedup:.2f}</strong> times the speed of dense decoding when only predicted neurons are read</div>
<div><strong>{derived.bytes:.1%}</strong> of the bytes of dense decoding read for a token</div>
</div>

<h2>Quality</h2>
{tables.quality}
<p class="verdict">Of the teacher's next-token accuracy, tuning with LM + KL keeps {retained.lm_kl:.2%} and tuning on
text alone {retained.lm_only:.2%}. The published ReluFalcon-40B keeps {retained.published:.2%} of its benchmark
average, which is the mark set for this run: {verdict}</p>

<h2>Benchmarks</h2>
{tables.benchmarks}
<p>Missing: {benchmarks_missing}.</p>

<h2>Training, and the zeros it leaves</h2>
<p>Right after the swap, before tuning, cross-entropy is {derived.swapped.cross_entropy:.3f} nats a token; the
teacher's is {derived.teacher.cross_entropy:.3f}. ReLU leaves zeros, and a neuron that is zero at a token need not be
read for it.</p>
<div class="figures">{plots.teacher}{plots.students}{plots.distance}{plots.zeros}</div>

<h2>Predicting which neurons fire</h2>
<p>{derived.active:.1%} of the neurons fire. At the operating point {operating_point.read:.1%} are read, KL(dense ||
sparse) is {operating_point.kl:.3g} nats a token, the first choice is the same at {operating_point.agreement:.1%} of
positions, and cross-entropy is {operating_point.cross_entropy:.3f} nats a token.</p>
<div class="figures">{plots.kl}{plots.agreement}</div>
{tables.predictor}

<h2>Decoding on the CPU</h2>
<p><b>dense</b> reads all weights. <b>exact</b> reads the whole up-projection and only those rows of the
down-projection whose neuron fired. <b>sparse</b> reads only the neurons that the predictor chose, and the predictor.
This machine reads {machine.read_bandwidth_gb_s:,.1f} GB/s from memory.</p>
{tables.decode}
<div class="figures">{plots.bytes}{plots.speed}</div>

<h2>Decoding at real widths</h2>
<p>The demo's model fits into the processor's caches, and its steps are too short to be limited by memory. This is the
same program at the widths of {widths_of.model}: {widths_of.layers:,} of {widths_of.of_layers:,} layers, predictor rank
{widths_of.rank:,}.</p>
{tables.widths}
<div class="figures">{plots.widths}</div>

<h2>Samples</h2>
<p>The teacher, and the tuned student decoded in three ways. <mark>Marked</mark> is what follows the first difference
from dense.</p>
{samples}

<h2>Text</h2>
{tables.corpora}

<h2>Machine and time</h2>
<div class="figures">
<dl><dt>processor</dt><dd>{machine.cpu}</dd><dt>cores</dt><dd>{machine.cores:,}</dd>
<dt>memory</dt><dd>{machine.memory_gb:,.1f} GB</dd><dt>platform</dt><dd>{machine.platform}</dd>
<dt>JAX</dt><dd>{machine.jax}</dd><dt>all stages</dt><dd>{derived.seconds:,.1f} s</dd></dl>
<dl><dt>layers</dt><dd>{model.layers:,}</dd><dt>model width</dt><dd>{model.d_model:,}</dd>
<dt>MLP neurons a layer</dt><dd>{model.d_ff:,}</dd><dt>query heads</dt><dd>{model.heads:,}</dd>
<dt>KV heads</dt><dd>{model.kv_heads:,}</dd><dt>vocabulary</dt><dd>{model.vocab:,}</dd></dl>
{plots.seconds}
</div>

<h2>Do it yourself</h2>
<p><code>falcon-relu demo</code> runs all of this again, from text to this report; a stage that is finished is picked
up, not repeated. Every number above but that of ReluFalcon-40B was measured in that run.</p>

<h2>What this does not show</h2>
<ul>
<li>The model is tiny: {model.parameters:,} parameters. Its scores are those of a toy; they show that the steps fit
together, not how good a large ReLU Falcon is.</li>
<li>Quality here is next-token prediction on held-out text. No benchmark was run, so the share kept is not the same
quantity as the published one, which is a share of benchmark scores.</li>
<li>The MLPs hold {derived.mlp_share:.1%} of the parameters here, and only they are read sparsely; the rest, attention
and the vocabulary head, is read whole for every token. The MLPs' share, and with it the gain, grows with width.</li>
<li>The student saw {model.train_tokens_student:,} tokens of text more than the teacher did; what it keeps of the
teacher's accuracy is in part that.</li>
<li>Weights as small as these can stay in the processor's caches, where the bandwidth of memory is not the limit that
it is for a large model.</li>
<li>Speeds are those of one short run on one machine, shared with whatever else ran there.</li>
</ul>
</body>
</html>
"""
