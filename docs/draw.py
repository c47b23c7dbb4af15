"""Draws `docs/figures`, from the code's own count of bytes: run it again when that changes (a test says so)."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt

from falcon_relu.config import FAMILY, FalconConfig
from falcon_relu.files import write_aside
from falcon_relu.layers import activation_fn
from infer.weights.formats import Format
from infer.weights.layout import Formats, skeleton

RANK = 1024
BANDWIDTH = 67.2e9  # bytes a second, of the machine of the published figures
_KINDS = {"attention": "#4c72b0", "MLP": "#dd8452", "predictor": "#55a868", "vocabulary head": "#8c8c8c"}


def all_figures(folder: Path) -> None:
    """Draws every figure of the pages into `folder`, as SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    mpl.rcParams.update({"svg.fonttype": "none", "font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    mpl.rcParams["svg.hashsalt"] = "figures"  # the same ids every time
    for draw in (activations, bytes_per_token, tokens_per_second):
        figure = draw()
        with write_aside(folder / f"{draw.__name__}.svg", replace=True) as aside:
            figure.savefig(aside, format="svg", bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)


def step_gigabytes(config: FalconConfig, format: Format, active: float | None) -> dict[str, float]:
    """GB that a decoded token reads, by kind; `active` is the share of neurons, None for a dense MLP."""
    weights = skeleton(config, Formats.parse(format), (RANK,) * config.n_layers, "mlp_input")
    layer = weights.layers[0]
    assert layer.predictor is not None
    whole = {
        "attention": (layer.qkv, layer.out),
        "MLP": (layer.up, layer.down),
        "predictor": (layer.predictor.fc1, layer.predictor.fc2),
    }
    sizes = {kind: config.n_layers * sum(rows.nbytes for rows in parts) / 1e9 for kind, parts in whole.items()}
    if active is None:
        sizes["predictor"] = 0.0
    else:
        sizes["MLP"] *= active
    return sizes | {"vocabulary head": weights.head_rows.nbytes / 1e9}


def activations() -> plt.Figure:
    """GELU beside ReLU: what is exactly zero."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), sharey=True)
    x = np.linspace(-4, 2.5, 400, dtype=np.float32)
    for axis, activation, title in zip(
        axes, ("gelu", "relu"), ("GELU: small, never zero", "ReLU: zero for half the axis"), strict=True
    ):
        y = np.asarray(activation_fn(FAMILY["falcon-40b"].with_activation(activation))(x))
        axis.plot(x, y, color=_KINDS["MLP"], linewidth=2)
        axis.plot(x[y == 0], y[y == 0], color=_KINDS["predictor"], linewidth=5, label="exactly zero: row not read")
        axis.set(title=title, xlabel="row of W_up times x")
    axes[0].set_ylabel("neuron's activation")
    axes[1].legend(frameon=False)
    return figure


def bytes_per_token() -> plt.Figure:
    """GB that one token of the 40B model reads, by kind and way of decoding."""
    config = FAMILY["falcon-40b"]
    bars = {
        "dense, bf16": ("bf16", None),
        "20 % active, bf16": ("bf16", 0.2),
        "10 % active, bf16": ("bf16", 0.1),
        "5 % active, bf16": ("bf16", 0.05),
        "dense, int8": ("int8", None),
        "10 % active, int8": ("int8", 0.1),
    }
    figure, axis = plt.subplots(figsize=(8, 3.4))
    for name, (format, active) in reversed(bars.items()):
        left = 0.0
        for kind, gigabytes in step_gigabytes(config, format, active).items():  # type: ignore[arg-type]
            axis.barh(name, gigabytes, left=left, color=_KINDS[kind])
            left += gigabytes
        axis.text(left + 0.7, name, f"{left:.1f} GB", va="center")
    axis.set(title=f"Falcon-40B: bytes that a token reads (predictor rank {RANK})", xlabel="GB a token", xlim=(0, 95))
    axis.legend(
        [plt.Rectangle((0, 0), 1, 1, color=color) for color in _KINDS.values()],
        _KINDS,
        frameon=False,
        loc="lower right",
    )
    return figure


def tokens_per_second() -> plt.Figure:
    """The ceiling that bandwidth sets, by the share of active neurons."""
    config = FAMILY["falcon-40b"]
    share = np.linspace(0.01, 1, 100)
    figure, axis = plt.subplots(figsize=(8, 3.2))
    for format, color in (("bf16", _KINDS["attention"]), ("int8", _KINDS["MLP"])):
        sparse = [BANDWIDTH / 1e9 / sum(step_gigabytes(config, format, float(s)).values()) for s in share]
        dense = BANDWIDTH / 1e9 / sum(step_gigabytes(config, format, None).values())
        axis.plot(100 * share, sparse, color=color, linewidth=2, label=f"sparse, {format}")
        axis.axhline(dense, color=color, linestyle=":", label=f"dense, {format}")
    axis.set(
        title=f"Falcon-40B on {BANDWIDTH / 1e9:g} GB/s: the most tokens that memory allows",
        xlabel="active neurons, %",
        ylabel="tokens a second",
        ylim=(0, None),
    )
    axis.legend(frameon=False)
    return figure


if __name__ == "__main__":
    all_figures(Path(__file__).parent / "figures")
