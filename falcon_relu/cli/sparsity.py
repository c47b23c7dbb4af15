"""`falcon-relu sparsity`: how sparse a model is on real text, and what reading fewer neurons costs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import tyro
from jax.sharding import Mesh
from matplotlib.figure import Figure

from falcon_relu.checkpoints.load import load_model
from falcon_relu.cli.devices import Devices, Dtype, on_devices, stored_as
from falcon_relu.cli.outputs import Made
from falcon_relu.cli.report import report
from falcon_relu.config import Activation, FalconConfig
from falcon_relu.errors import FalconError, check_number
from falcon_relu.evaluation.sparsity import measure_sparsity
from falcon_relu.files import write_aside, write_json
from falcon_relu.model import Params
from falcon_relu.progress import progress, track
from falcon_relu.sharding import check_shared
from infer.predictor.calibration import calibrate_predictor
from infer.predictor.predictor import load_predictor
from infer.predictor.quality import compare_sparse, sensitivity
from infer.predictor.recording import open_recording
from train.data.batches import DataConfig, Manifests, open_folders, train_batches, validation_batches

_WEIGHING_BATCHES = 2
_FIRST_ENERGY = 0.98  # covered while the layers' sensitivity is measured
_QUANTILES = 101  # points of the curve of neurons by how often they fire


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(Devices):
    """Measure zeros, how often neurons fire, overlap from token to token, and the union of a batch's firing neurons.

    With a predictor and the recording that it was fitted to, also the budgets for each allowed KL(dense || sparse), the
    KL measured with them on held-out text, and whether that kept within the allowed one. Writes sparsity.json and
    sparsity.svg.
    """

    model: Annotated[str, tyro.conf.Positional]
    """Native weights, Hugging Face folder or hub id."""
    data: Annotated[Path, tyro.conf.Positional]
    """Token shards made by falcon-relu prepare; the validation split is read."""
    out: Path
    """Folder for sparsity.json and sparsity.svg."""
    batch_size: int = 32
    """Rows run together; also the most sequences whose union is taken."""
    batches: int = 8
    """Batches to measure on, at most."""
    predictor: Path | None = None
    """Predictor file of the model."""
    recording: Path | None = None
    """Recording of the model, see falcon-relu predictor record."""
    kl: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3)
    """Allowed KL(dense || sparse), nats a token."""
    activation: Activation | None = None
    """MLP activation, where a Hugging Face config does not state it."""
    dtype: Dtype = "float32"
    """Dtype of products; weights are kept as stored for float32."""

    def __post_init__(self) -> None:
        check_number("--batch-size", self.batch_size, low=1)
        check_number("--batches", self.batches, low=1)
        for allowed in self.kl:
            check_number("--kl", allowed, above=0)

    def written(self) -> list[Made]:
        """What is written besides `json`."""
        return [Made(self.out / "sparsity.json"), Made(self.out / "sparsity.svg")]


def run(args: Args) -> None:
    """Measures, draws, reports."""
    if (args.predictor is None) != (args.recording is None):
        raise FalconError("the curve of allowed error needs both --predictor and --recording")
    with on_devices(args) as mesh:
        _run(args, mesh)


def _run(args: Args, mesh: Mesh) -> None:
    parts = check_shared(mesh, args.batch_size)
    data = open_folders([args.data], args.batch_size)
    config, params = load_model(args.model, activation=args.activation, dtype=stored_as(args.dtype), mesh=mesh)
    rows = list(itertools.islice(validation_batches(data[0], manifests=data[1]), args.batches))
    found = measure_sparsity(config, params, track(rows, "activations", "batches"), dtype=jnp.dtype(args.dtype))
    rates_LxF = found.pop("rates_LxF")
    found["rates"] = np.quantile(rates_LxF, np.linspace(0, 1, _QUANTILES), axis=1).T.tolist()
    found["allowed"] = []
    if args.predictor is not None and args.recording is not None:
        found["allowed"] = _allowed(args, config, params, data, rows, parts)
    if jax.process_index() == 0:
        write_json(args.out / "sparsity.json", found, replace=args.overwrite)
        _draw(args.out / "sparsity.svg", found, args.overwrite)
    shown = [{name: value for name, value in row.items() if not isinstance(value, list)} for row in found["allowed"]]
    union = [{"batch": row["batch"], "fired": row["fired"]} for row in found["union"]]
    tables = {"layers": found["layers"], "neurons that fire in any sequence of a batch": union}
    if shown:
        tables["budgets for an allowed KL(dense || sparse)"] = shown
    report({"zeros": found["zeros"], "tokens": found["tokens"], **tables}, args, also=found)


def _allowed(
    args: Args,
    config: FalconConfig,
    params: Params,
    data: tuple[DataConfig, Manifests],
    rows: Sequence[Any],
    parts: int,
) -> list[dict[str, Any]]:
    assert args.predictor is not None
    assert args.recording is not None
    recording = open_recording(args.recording)
    recording.check(config)
    dtype = jnp.dtype(args.dtype)
    fitted = calibrate_predictor(load_predictor(args.predictor, config), recording, energy=_FIRST_ENERGY)
    small = dataclasses.replace(data[0], batch_size=min(args.batch_size, -(-8 // parts) * parts))
    weighing = list(itertools.islice(train_batches(small, manifests=data[1]), _WEIGHING_BATCHES))
    weights = sensitivity(config, params, fitted, weighing, dtype=dtype)
    table = []
    with progress("allowed error", len(args.kl), "budgets") as advance:
        for allowed in sorted(args.kl):
            predictor = calibrate_predictor(fitted, recording, kl=allowed, sensitivity=weights)
            measured = compare_sparse(config, params, predictor, rows, dtype=dtype)
            names = ("kl", "agreement", "read", "fired", "sparse_loss", "dense_loss")
            table.append(
                {"allowed kl": allowed, "kept": measured["kl"] <= allowed}
                | {name: measured[name] for name in names}
                | {"budgets": list(predictor.budgets), "thresholds": list(predictor.thresholds)}
            )
            advance(note=f"KL {measured['kl']:.3g}")
    return table


def _draw(path: Path, found: dict[str, Any], overwrite: bool) -> None:
    """Five plots, or four without a predictor, in one file."""
    with matplotlib.rc_context({"svg.fonttype": "none", "axes.grid": True, "grid.alpha": 0.3, "font.size": 9}):
        count = 5 if found["allowed"] else 4
        figure = Figure(figsize=(4 * count, 3.4), layout="constrained")
        zeros, neurons, overlap, union, *allowed = figure.subplots(1, count)
        layers = [row["layer"] for row in found["layers"]]
        zeros.plot(layers, [row["zeros"] for row in found["layers"]], marker="o")
        zeros.set(title="Zeros by layer", xlabel="layer", ylabel="share of activations", ylim=(0, 1))
        for layer, rates in zip(layers, found["rates"], strict=True):
            neurons.plot(np.linspace(1, 0, len(rates)), rates, alpha=0.7, label=f"layer {layer}")
        neurons.set(title="Hot and cold neurons", xlabel="share of neurons, hottest first", ylabel="share of tokens")
        if len(layers) <= 6:
            neurons.legend()
        overlap.plot(layers, [row["overlap"] for row in found["layers"]], marker="o")
        overlap.set(title="Fired at the token before, too", xlabel="layer", ylabel="share of firing", ylim=(0, 1))
        union.plot([row["batch"] for row in found["union"]], [row["fired"] for row in found["union"]], marker="o")
        union.set(title="Union over a batch", xlabel="sequences together", ylabel="share of neurons", ylim=(0, 1))
        for axes in allowed:
            read = [row["read"] for row in found["allowed"]]
            axes.plot(read, [max(row["kl"], 1e-9) for row in found["allowed"]], marker="o", label="measured")
            axes.plot(read, [row["allowed kl"] for row in found["allowed"]], ls="--", marker=".", label="allowed")
            axes.set(title="Error by neurons read", xlabel="share read", ylabel="KL, nats a token", yscale="log")
            axes.legend()
        with write_aside(path, replace=overwrite) as aside:
            figure.savefig(aside, format="svg")
