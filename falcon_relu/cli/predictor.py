"""`falcon-relu predictor`: record, fit and calibrate the predictors of which neurons fire."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import Mesh

from falcon_relu.checkpoints.load import layered_params, load_config, load_model, open_model
from falcon_relu.cli.devices import Devices, Dtype, on_devices, stored_as
from falcon_relu.cli.outputs import Made, Output
from falcon_relu.cli.prepare import parse_shard
from falcon_relu.cli.report import report
from falcon_relu.config import Activation, FalconConfig
from falcon_relu.errors import FalconError, check_number, check_part
from falcon_relu.model import Params
from falcon_relu.progress import progress
from falcon_relu.sharding import check_shared
from infer.predictor.calibration import calibrate_predictor, check_target, neurons_for_bytes
from infer.predictor.fitting import FitConfig, check_rank, choose_rank, fit_predictor, up_rows
from infer.predictor.predictor import (
    Predictor,
    PredictorInput,
    export_powerinfer,
    import_powerinfer,
    join_predictors,
    load_predictor,
    save_predictor,
)
from infer.predictor.quality import compare_sparse, reading_curve, sensitivity
from infer.predictor.recording import Recording, open_recording, record_activations
from train.data.batches import open_folders, train_batches, validation_batches

_WEIGHING_BATCHES = 2  # batches on which the layers' sensitivity is measured
_SHOWN_TOKENS = 10_000  # of a recording, in the table of what fires
_FIRST_ENERGY = 0.98  # covered while the sensitivity of an imported predictor's layers is measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Step(Output):
    model: Annotated[str, tyro.conf.Positional]
    """Folder of native or Hugging Face weights, or hub id, of a ReLU model."""
    activation: Activation | None = None
    """MLP activation, where a Hugging Face config does not state it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run(Devices, _Step):
    """A step that runs the model."""

    dtype: Dtype = "float32"
    """Dtype of products; weights are kept as stored for float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record(_Run):
    """Run the model on text; keep what entered its MLPs and what each neuron added, 2 D + F bytes a token and layer."""

    data: Annotated[Path, tyro.conf.Positional]
    """Token shards made by falcon-relu prepare; the training split is read."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder to make."""
    tokens: int = 200_000
    """Tokens to record; the last tenth is held out."""
    input: PredictorInput = "mlp_input"
    """What the predictor reads: the block's input (as PowerInfer's do) or the MLP's, after the LayerNorm."""
    batch_size: int = 8
    """Sequences run together."""

    def __post_init__(self) -> None:
        check_number("--tokens", self.tokens, low=10)
        check_number("--batch-size", self.batch_size, low=1)

    def written(self) -> list[Made]:
        """What is written besides `json`."""
        return [Made(self.out, "recording.json")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit(_Step):
    """Fit a predictor for every layer to a recording."""

    recording: Annotated[Path, tyro.conf.Positional]
    """Folder made by falcon-relu predictor record."""
    out: Annotated[Path, tyro.conf.Positional]
    """Predictor file to make."""
    rank: int | None = None
    """R of every layer; if not given, each layer takes the one at which a token reads least."""
    rank_energy: float = 0.99
    """Share of the squared contributions to be covered when ranks are compared."""
    shard: str = "0/1"
    """i/n: fit only the i-th of n ranges of layers, counted from 0, as one job of an array; `join` takes the parts."""
    how: Annotated[FitConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=FitConfig)

    def __post_init__(self) -> None:
        check_number("--rank-energy", self.rank_energy, above=0, high=1)

    def written(self) -> list[Made]:
        """What is written besides `json`."""
        return [Made(self.out)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Join(_Step):
    """Put the parts that the jobs of an array fitted together."""

    out: Annotated[Path, tyro.conf.Positional]
    """Predictor file to make."""
    parts: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Files of fit with --shard, in any order."""

    def written(self) -> list[Made]:
        """What is written besides `json`."""
        return [Made(self.out)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibrate(_Run):
    """Choose all layers' thresholds and budgets for one target, and measure the quality on held-out text.

    Give one of --kl, --energy, --recall, --neurons and --megabytes.
    """

    recording: Annotated[Path, tyro.conf.Positional]
    """Recording of the model."""
    predictor: Annotated[Path, tyro.conf.Positional]
    """Predictor file that was fitted to it."""
    data: Annotated[Path, tyro.conf.Positional]
    """Token shards: the training split weighs the layers, the validation split measures."""
    out: Annotated[Path, tyro.conf.Positional]
    """Predictor file to make."""
    kl: float | None = None
    """KL(dense || sparse) to expect, nats a token."""
    energy: float | None = None
    """Share of the squared contributions to cover."""
    recall: float | None = None
    """Share of the neurons that fire to cover, all layers together."""
    neurons: float | None = None
    """Neurons to read for a token in all layers together."""
    megabytes: float | None = None
    """MB that MLPs and predictors may read for a token."""
    weight_bytes: float = 2.0
    """Bytes of a weight when decoding, for --megabytes: 2 for bf16, 1 for int8."""
    batch_size: int = 8
    """Sequences run together."""
    batches: int = 16
    """Validation batches to measure on, at most."""
    curve: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    """Points of the curve of quality against neurons read: targets for neurons read / neurons that fire."""

    def __post_init__(self) -> None:
        check_target(kl=self.kl, energy=self.energy, recall=self.recall, neurons=self.neurons, megabytes=self.megabytes)
        check_number("--weight-bytes", self.weight_bytes, above=0)
        check_number("--batch-size", self.batch_size, low=1)
        check_number("--batches", self.batches, low=1)
        for read in self.curve:
            check_number("--curve", read, above=0)

    def written(self) -> list[Made]:
        """What is written besides `json`."""
        return [Made(self.out)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Import(_Step):
    """Turn PowerInfer's model_0.pt, model_1.pt, ... into a predictor file."""

    source: Annotated[Path, tyro.conf.Positional]
    """Folder of the .pt files."""
    out: Annotated[Path, tyro.conf.Positional]
    """Predictor file to make."""

    def written(self) -> list[Made]:
        """What is written besides `json`."""
        return [Made(self.out)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(_Step):
    """Turn a predictor file into model_0.pt, model_1.pt, ... for PowerInfer."""

    source: Annotated[Path, tyro.conf.Positional]
    """Predictor file, fitted to block_input."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder to make."""

    def written(self) -> list[Made]:
        """What is written besides `json`."""
        return [Made(self.out, "model_0.pt")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Predictors of which neurons fire: record, fit, calibrate; exchange them with PowerInfer."""

    step: Annotated[
        tyro.conf.OmitSubcommandPrefixes[Record | Fit | Join | Calibrate | Import | Export], tyro.conf.arg(name="")
    ]
    """What to do; in the order of the list."""

    @property
    def output(self) -> Output:
        """What the step's arguments have in common with those of every command."""
        return self.step


def run(args: Args) -> None:
    """Runs one step, then reports."""
    step = args.step
    match step:
        case Record() | Calibrate():
            with on_devices(step) as mesh:
                report(_record(step, mesh) if isinstance(step, Record) else _calibrate(step, mesh), step)
        case Fit():
            report(_fit(step), step)
        case Join() | Import():
            config = load_config(step.model, activation=step.activation)
            if isinstance(step, Join):
                predictor = join_predictors(step.parts, config)
            else:
                predictor = import_powerinfer(step.source, config)
            save_predictor(predictor, step.out, replace=step.overwrite)
            report(_sizes(predictor, config), step)
        case Export():
            config = load_config(step.model, activation=step.activation)
            predictor = load_predictor(step.source, config)
            export_powerinfer(predictor, step.out, replace=step.overwrite)
            report(_sizes(predictor, config), step)


def _record(step: Record, mesh: Mesh) -> dict[str, Any]:
    check_shared(mesh, step.batch_size)
    data, manifests = open_folders([step.data], step.batch_size)
    batches = train_batches(data, manifests=manifests)
    config, params = load_model(step.model, activation=step.activation, dtype=stored_as(step.dtype), mesh=mesh)
    recording = record_activations(
        config,
        params,
        batches,
        step.out,
        tokens=step.tokens,
        input=step.input,
        dtype=jnp.dtype(step.dtype),
        replace=step.overwrite,
    )
    if jax.process_index():
        return {}
    size = sum(file.stat().st_size for file in recording.folder.iterdir())
    return {
        "tokens": recording.tokens,
        "GB": size / 1e9,
        "layers": [_firing(recording, i) for i in range(config.n_layers)],
    }


def _firing(recording: Recording, i: int) -> dict[str, Any]:
    """How much of a layer fires, on its first tokens."""
    rates_F = (recording.layer(i)[1][:_SHOWN_TOKENS] != 0).mean(0)
    return {
        "layer": i,
        "fired": float(rates_F.mean()),
        "never": float((rates_F == 0).mean()),
        "always": float((rates_F == 1).mean()),
    }


def _fit(step: Fit) -> dict[str, Any]:
    index, count = part = parse_shard(step.shard)
    check_part(part)
    recording = open_recording(step.recording)
    with open_model(step.model, activation=step.activation) as stored:  # only the layers that are fitted are read
        config, params = stored.config, layered_params(stored)
        recording.check(config)
        if step.rank is not None:
            check_rank(step.rank, recording.d_model)
        if count > config.n_layers:
            raise FalconError(f"--shard {step.shard}: n can be at most the {config.n_layers} layers")
        layers = range(config.n_layers * index // count, config.n_layers * (index + 1) // count)
        tried: list[dict[str, Any]] = []
        if step.rank is None:
            tried = _sweep(step, recording, config, params, layers)
        chosen = {row["layer"]: row["rank"] for row in tried if row["chosen"]}
        ranks = [step.rank if step.rank is not None else chosen[i] for i in layers]
        predictor = fit_predictor(recording, config, params, ranks, step.how, first_layer=layers.start)
    first = layers.start if count > 1 else None
    save_predictor(predictor, step.out, replace=step.overwrite, first_layer=first)
    tables = {"ranks tried": tried, "held out, as many read as fire": _rows(predictor, config, layers.start)}
    return _sizes(predictor, config) | {name: table for name, table in tables.items() if table}


def _sweep(
    step: Fit, recording: Recording, config: FalconConfig, params: Params, layers: range
) -> list[dict[str, Any]]:
    """A row a layer and rank: D / 16 to D / 2, and what a token would read."""
    candidates = sorted({max(config.d_model // part // 2 * 2, 2) for part in (16, 8, 4, 2)})
    rows = []
    with progress("choose ranks", len(layers), "layers") as advance:
        for i in layers:
            up_FxD = up_rows(config, params, i, recording.input)
            rank, tried = choose_rank(recording, i, up_FxD, candidates, energy=step.rank_energy, how=step.how)
            rows += [
                {
                    "layer": i,
                    "rank": row["rank"],
                    "read": row["read"] / config.d_ff,
                    "weights a token": row["weights"],
                    "chosen": row["rank"] == rank,
                }
                for row in tried
            ]
            advance(note=f"layer {i}: {rank}")
    return rows


def _calibrate(step: Calibrate, mesh: Mesh) -> dict[str, Any]:
    check_shared(mesh, step.batch_size)
    recording = open_recording(step.recording)
    config = load_config(step.model, activation=step.activation)
    recording.check(config)
    predictor = load_predictor(step.predictor, config)
    if not predictor.measured:
        predictor = calibrate_predictor(predictor, recording, energy=_FIRST_ENERGY)
    data, manifests = open_folders([step.data], step.batch_size)
    config, params = load_model(step.model, activation=step.activation, dtype=stored_as(step.dtype), mesh=mesh)
    dtype = jnp.dtype(step.dtype)
    neurons = step.neurons
    if step.megabytes is not None:
        neurons = neurons_for_bytes(predictor, step.megabytes * 1e6, step.weight_bytes)
    weighing = list(itertools.islice(train_batches(data, manifests=manifests), _WEIGHING_BATCHES))
    weights = sensitivity(config, params, predictor, weighing, dtype=dtype)
    calibrated = calibrate_predictor(
        predictor,
        recording,
        energy=step.energy,
        recall=step.recall,
        neurons=neurons,
        kl=step.kl,
        sensitivity=weights,
    )
    rows = list(itertools.islice(validation_batches(data, manifests=manifests), step.batches))
    quality = compare_sparse(config, params, calibrated, rows, dtype=dtype)
    if jax.process_index() == 0:
        save_predictor(calibrated, step.out, replace=step.overwrite)
    curve = []
    points = reading_curve(config, params, predictor, recording, rows, step.curve, sensitivity=weights, dtype=dtype)
    with progress("quality against neurons read", len(step.curve), "points") as advance:
        for _, found in points:
            curve.append({name: value for name, value in found.items() if not isinstance(value, list)})
            advance()
    scalars = {name: value for name, value in quality.items() if not isinstance(value, list)}
    tables = {"held out": _rows(calibrated, config), "quality against neurons read": curve}
    return _sizes(calibrated, config) | scalars | tables


def _sizes(predictor: Predictor, config: FalconConfig) -> dict[str, Any]:
    weights = sum(predictor.ranks) * (config.d_model + config.d_ff)
    return {
        "input": predictor.input,
        "predictor weights": weights,
        "share of the MLPs' weights": weights / (config.n_layers * 2 * config.d_model * config.d_ff),
    }


def _rows(predictor: Predictor, config: FalconConfig, first_layer: int = 0) -> list[dict[str, Any]]:
    """A row a layer: shares of the neurons that fire and are read; recall, energy, and those of the untrained SVD."""
    columns = zip(predictor.ranks, predictor.thresholds, predictor.budgets, predictor.measured, strict=True)
    names = {"recall": "recall", "precision": "precision", "energy": "energy"}
    names |= {"start_recall": "SVD recall", "start_energy": "SVD energy"}
    return [
        {"layer": i, "rank": rank, "threshold": threshold, "budget": budget}
        | {"fired": found["fired"] / config.d_ff, "read": found["read"] / config.d_ff}
        | {name: found[key] for key, name in names.items() if key in found}
        for i, (rank, threshold, budget, found) in enumerate(columns, first_layer)
    ]
