"""Plots of measurements. Each function returns a matplotlib Figure, which a notebook shows as a cell's result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

Rows = Sequence[Mapping[str, Any]]

_LABELS = {
    "cross_entropy": "cross-entropy, nats a token",
    "kl": "KL from the teacher, nats a token",
    "agreement": "same first choice as the teacher",
    "zeros": "activations that are zero",
    "loss": "loss",
    "gradient_norm": "gradient norm",
    "learning_rate": "learning rate",
}
_SHARES = ("agreement", "accuracy", "zeros")


def curves(logs: Mapping[str, Rows], keys: Sequence[str] = ("cross_entropy", "kl", "zeros")) -> Figure:
    """Training curves of one or more runs.

    Args:
      logs: the lines of each run's `log.jsonl`, by the name of the run.
      keys: the metrics to draw, one panel each; a metric that is a list, one value a layer, is averaged.
    """
    figure, axes = _panels(len(keys))
    for axis, key in zip(axes, keys, strict=True):
        for name, rows in logs.items():
            points = [(row["step"], float(np.mean(row[key]))) for row in rows if key in row]
            if points:
                axis.plot(*zip(*points, strict=True), label=name)
        axis.set(xlabel="step", title=_LABELS.get(key, key))
        if key in _SHARES:
            axis.yaxis.set_major_formatter(PercentFormatter(1))
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    _legend(axes[0])
    return figure


def zeros_by_layer(found: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Share of activations that are exactly zero in each layer.

    Args:
      found: what `falcon_relu.evaluation.measure_sparsity` returned, by the name of the model.
    """
    figure, (axis,) = _panels(1)
    width = 0.8 / len(found)
    for i, (name, measured) in enumerate(found.items()):
        zeros = [row["zeros"] for row in measured["layers"]]
        axis.bar(np.arange(len(zeros)) + (i - (len(found) - 1) / 2) * width, zeros, width, label=name)
    axis.set(xlabel="layer", title=_LABELS["zeros"], ylim=(0, 1))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    _legend(axis)
    return figure


def firing_rates(measured: Mapping[str, Any]) -> Figure:
    """How often each neuron fires, from the most to the least active, a line for each layer.

    Args:
      measured: what `falcon_relu.evaluation.measure_sparsity` returned.
    """
    rates_LxF = np.sort(measured["rates_LxF"], axis=1)[:, ::-1]
    figure, (axis,) = _panels(1)
    share_F = (np.arange(rates_LxF.shape[1]) + 1) / rates_LxF.shape[1]
    for i, rates_F in enumerate(rates_LxF):
        axis.plot(share_F, rates_F, label=f"layer {i}")
    axis.set(xlabel="neurons, the hottest first", ylabel="tokens at which it fires", title="Hot and cold neurons")
    axis.xaxis.set_major_formatter(PercentFormatter(1))
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    if len(rates_LxF) <= 8:
        _legend(axis)
    return figure


def firing(neurons_TxF: Any, tokens: Sequence[str]) -> Figure:
    """Which neurons of a layer fire at which token of a short text.

    Args:
      neurons_TxF: a layer's activations; those that are not zero are drawn black.
      tokens: the T tokens as text.
    """
    figure, (axis,) = _panels(1)
    axis.imshow(np.asarray(neurons_TxF) != 0, aspect="auto", interpolation="nearest", cmap="Greys")
    axis.set(xlabel="neuron", title="Neurons that fire, token by token", yticks=range(len(tokens)))
    axis.set_yticklabels([repr(token)[1:-1] for token in tokens], fontsize="x-small")
    axis.grid(visible=False)
    return figure


def quality_against_reads(points: Rows) -> Figure:
    """Quality of sparse decoding against the number of neurons read.

    Args:
      points: mappings with read and fired (shares of the neurons), kl and agreement, as returned by
        `infer.compare_sparse`.
    """
    figure, axes = _panels(2)
    reads = [point["read"] / point["fired"] for point in points]
    for axis, key, title in zip(
        axes, ("kl", "agreement"), ("KL(dense || sparse), nats a token", "same first choice as dense"), strict=True
    ):
        axis.plot(reads, [point[key] for point in points], marker="o")
        axis.axvline(1, color="grey", linestyle=":", label="as many as fire")
        axis.set(xlabel="neurons read / neurons that fire", title=title)
    axes[0].set_yscale("log")
    axes[1].yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    _legend(axes[1])
    return figure


def roofline(rows: Rows) -> Figure:
    """Measured tokens a second against the bytes read for a token, and the limit set by memory bandwidth.

    Args:
      rows: mappings with name, bytes (a token), seconds (a token) and bandwidth (bytes a second), as returned by
        `infer.measure_widths`.
    """
    figure, (axis,) = _panels(1)
    megabytes = np.array([row["bytes"] / 1e6 for row in rows])
    bandwidth = float(np.median([row["bandwidth"] for row in rows]))
    x = np.geomspace(megabytes.min() / 1.6, megabytes.max() * 1.6, 50)
    axis.plot(x, bandwidth / 1e6 / x, color="grey", linestyle=":", label=f"memory: {bandwidth / 1e9:.1f} GB/s")
    for row, size in zip(rows, megabytes, strict=True):
        axis.plot(size, 1 / row["seconds"], marker="o", linestyle="", label=row["name"])
    axis.set(xscale="log", yscale="log", xlabel="MB read for a token", ylabel="tokens a second", title="Roofline")
    _legend(axis)
    return figure


def sharding(rows: Rows, largest: int = 14) -> Figure:
    """How much of each array a device holds, and along which mesh axes the array is sharded.

    Args:
      rows: as returned by `train.sharding_table`.
      largest: how many arrays to draw, the largest first.
    """
    rows = sorted(rows, key=lambda row: -row["bytes a device"])[:largest]
    figure = Figure(figsize=(9, 0.3 * len(rows) + 1.2), layout="constrained")
    axis = figure.add_subplot()
    specs = list(dict.fromkeys(row["PartitionSpec"] for row in rows))
    for i, spec in enumerate(specs):
        bars = [(place, row) for place, row in enumerate(rows) if row["PartitionSpec"] == spec]
        axis.barh([p for p, _ in bars], [row["bytes a device"] / 1e9 for _, row in bars], color=f"C{i}", label=spec)
    axis.set(xlabel="GB a device", title="Largest arrays and how they are sharded", yticks=range(len(rows)))
    axis.set_yticklabels([f"{row['array']}  {row['shape']} {row['dtype']}" for row in rows], fontsize="x-small")
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(title="sharded along", frameon=False, fontsize="x-small", loc="lower right")
    return figure


def memory_by_mesh(parts: Mapping[str, Mapping[str, float]], capacity: float) -> Figure:
    """Memory that a chip needs under several plans.

    Args:
      parts: for each plan, by its name: bytes, by the name of what they are used for.
      capacity: memory of a chip, bytes.
    """
    figure, (axis,) = _panels(1)
    figure.set_size_inches(9, 1.4 + 0.5 * len(parts))
    names = list(parts)
    left = np.zeros(len(names))
    for part in dict.fromkeys(part for plan in parts.values() for part in plan):
        sizes = np.array([plan.get(part, 0) / 1e9 for plan in parts.values()])
        axis.barh(names, sizes, left=left, label=part)
        left += sizes
    axis.axvline(capacity / 1e9, color="black", linestyle="--", label="capacity")
    axis.set(xlabel="GB a chip", title="Memory")
    axis.invert_yaxis()
    axis.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _panels(n: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.6 * n if n > 1 else 6.4, 3.2), layout="constrained")
    axes = [figure.add_subplot(1, n, i + 1) for i in range(n)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    return figure, axes


def _legend(axis: Axes) -> None:
    axis.legend(frameon=False, fontsize="small")
