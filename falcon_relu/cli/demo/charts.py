"""Plots as inline SVG: their text stays text, and their colours are CSS variables, for screens, dark mode and paper."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from falcon_relu.progress import NOT_MEASURED

MISSING = Markup(f'<span class="missing">{NOT_MEASURED}</span>')

Rows = Sequence[Mapping[str, Any]]
Line = tuple[np.ndarray, dict[str, Any]]  # points [n, 2] and how they are drawn

# Colours and the CSS variables that they become; one meaning each in all plots.
INK, _GRID, TEACHER, SWAPPED = "#20262e", "#d9dde3", "#66707d", "#b0307a"
LM, KL, EXACT = "#c25a12", "#1f66b0", "#1c8474"
_VARIABLES = {
    INK: "ink",
    _GRID: "grid",
    TEACHER: "teacher",
    SWAPPED: "swapped",
    LM: "lm",
    KL: "kl",
    EXACT: "exact",
}
MODES = {"dense": TEACHER, "exact": EXACT, "sparse": KL}

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
} | dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)


def at(value: Any, path: str) -> Any:
    """The value at a dotted path in nested mappings; None where any part of the path is missing."""
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def line(rows: Rows, x: str, y: str, label: str, color: str, **look: Any) -> Line:
    """A line through the rows in which both `x` and `y` are numbers; `look` is passed to matplotlib."""
    values = [[at(row, x), at(row, y)] for row in rows]
    values = [[v if isinstance(v, int | float) else np.nan for v in pair] for pair in values]
    points = np.array(values, float).reshape(-1, 2)
    known = points[np.isfinite(points).all(axis=1)]
    label = label if len(known) else f"{label}: {NOT_MEASURED}"
    return known, {"label": label, "color": color, "lw": 1.8, "ms": 4, **look}


def lines(
    title: str,
    x: str,
    y: str,
    drawn: Sequence[Line],
    *,
    level: Mapping[str, float | None] | None = None,
    upright: Mapping[str, float | None] | None = None,
    percent: str = "",
) -> Markup:
    """A plot of lines, with dashed horizontal (`level`) and vertical (`upright`) ones; `percent`: axes in percent."""

    def draw(axes: Axes) -> None:
        for points, look in drawn:
            axes.plot(*points.T, **look)
        for marks, add in ((level, axes.axhline), (upright, axes.axvline)):
            for label, value in (marks or {}).items():
                if value is not None:
                    add(value, color=TEACHER, ls="--", label=label)
                else:
                    axes.plot([], color=TEACHER, ls="--", label=f"{label}: {NOT_MEASURED}")
        axes.set(xlabel=x, ylabel=y)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer="x" not in percent, steps=[1, 2, 5, 10]))
        for axis in percent:
            getattr(axes, f"{axis}axis").set_major_formatter(PercentFormatter(1))
        axes.figure.legend(loc="outside lower center", ncols=2)

    return _svg(title, draw if any(len(points) for points, _ in drawn) else None)


def bars(title: str, x: str, rows: Rows, key: str, spec: str) -> Markup:
    """A plot with a bar for each row: its `label`, the value under `key` in the format `spec`, and its `color`."""

    def draw(axes: Axes) -> None:
        places, values = np.arange(len(rows)), [row.get(key) for row in rows]
        drawn = axes.barh(places, [value or 0 for value in values], color=[row["color"] for row in rows], height=0.65)
        axes.bar_label(drawn, [NOT_MEASURED if v is None else format(v, spec) for v in values], padding=4)
        axes.set(xlabel=x)
        axes.set_yticks(places, [row["label"] for row in rows])
        axes.invert_yaxis()
        axes.margins(x=0.18)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(5))

    return _svg(title, draw if rows else None, height=1.3 + 0.34 * len(rows))


def _svg(title: str, draw: Callable[[Axes], None] | None, height: float = 3.6) -> Markup:
    """A plot as an HTML figure with inline SVG; without `draw`, a figure that says "not measured"."""
    if draw is None:
        return Markup(f"<figure><h3>{title}</h3><p>{MISSING}</p></figure>")
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
    return Markup("<figure>" + svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1) + "</figure>")
