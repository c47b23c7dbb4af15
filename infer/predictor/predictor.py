"""The predictor of the neurons that will fire in a layer, from the layer's input, by two small linear maps.

For every layer, logits = relu(x @ fc1.T) @ fc2.T without biases (the format that PowerInfer released for
ReluFalcon-40B). The neurons whose logit reaches the layer's threshold are read, but at most `budget` of them, those
with the highest logits.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from safetensors import safe_open
from safetensors.flax import save_file

from falcon_relu.checkpoints.digests import bytes_digest
from falcon_relu.checkpoints.load import check_finite
from falcon_relu.checkpoints.schema import parse, seal, unseal
from falcon_relu.checkpoints.torch_files import as_numpy, first_line, load_torch
from falcon_relu.config import FalconConfig
from falcon_relu.errors import FalconError
from falcon_relu.files import regular_file, write_aside

# What a predictor reads: the residual stream before the block's LayerNorms, or the MLP's own input after its LayerNorm.
PredictorInput = Literal["block_input", "mlp_input"]

EVERY = -1e30  # the threshold at which every neuron is selected

_VERSION = 2
_METADATA = "falcon_relu_predictor"
_ADVICE = "copy or fit it again"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Metadata:
    """Schema of a predictor file's metadata: the fields of Predictor without its maps, and the CRC-32 of every map.

    `first_layer` is that of a file which holds some layers of a model only; None for a whole predictor.
    """

    version: Literal[2]
    input: PredictorInput
    thresholds: tuple[float, ...]
    budgets: tuple[int, ...]
    measured: tuple[dict[str, float], ...]
    crc32: dict[str, int]
    first_layer: int | None = None


@struct.dataclass
class LayerPredictor:
    """The two maps of one layer's predictor, or of all layers stacked.

    Attributes:
      fc1_RxD: first map.
      fc2_FxR: second map, one row a neuron.
    """

    fc1_RxD: jax.Array
    fc2_FxR: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predictor:
    """The predictors of all layers of a model, with thresholds and budgets.

    Attributes:
      layers: the maps of each layer; ranks may differ.
      input: which activations they take as input.
      thresholds: of each layer: the lowest logit of a neuron that is read.
      budgets: of each layer: the most neurons that are read for one token.
      measured: metrics of each layer on held-out tokens, by name; may be empty.
    """

    layers: tuple[LayerPredictor, ...]
    input: PredictorInput
    thresholds: tuple[float, ...]
    budgets: tuple[int, ...]
    measured: tuple[Mapping[str, float], ...] = ()

    def __repr__(self) -> str:
        first, width = self.layers[0], self.layers[0].fc1_RxD.shape[1]
        return (
            f"Predictor(L={len(self.layers)}, D={width}, F={first.fc2_FxR.shape[0]}, R={_range(self.ranks)}, "
            f"{first.fc1_RxD.dtype}; reads {self.input}; thresholds {_range(self.thresholds)}, "
            f"budgets {_range(self.budgets)})"
        )

    @property
    def ranks(self) -> tuple[int, ...]:
        """R of each layer."""
        return tuple(layer.fc1_RxD.shape[0] for layer in self.layers)

    def replace(self, **changes: Any) -> Predictor:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def astype(self, dtype: Any) -> Predictor:
        """A copy with its maps in another dtype."""
        return self.replace(layers=tuple(jax.tree.map(lambda w: w.astype(dtype), layer) for layer in self.layers))


def uncalibrated(
    layers: Sequence[LayerPredictor], input: PredictorInput, measured: Sequence[Mapping[str, float]] = ()
) -> Predictor:
    """A predictor with threshold 0 in every layer and a budget of all neurons."""
    budgets = tuple(layer.fc2_FxR.shape[0] for layer in layers)
    return Predictor(
        layers=tuple(layers), input=input, thresholds=(0.0,) * len(layers), budgets=budgets, measured=tuple(measured)
    )


def score(layer: LayerPredictor, x: jax.Array) -> jax.Array:
    """Logits [..., F] of inputs [..., D], computed in float32 whatever the dtypes."""
    fc1_RxD, fc2_FxR = layer.fc1_RxD.astype(jnp.float32), layer.fc2_FxR.astype(jnp.float32)
    hidden = jax.nn.relu(jnp.einsum("...d,rd->...r", x.astype(jnp.float32), fc1_RxD))
    return jnp.einsum("...r,fr->...f", hidden, fc2_FxR)


def stack(layers: Sequence[LayerPredictor]) -> LayerPredictor:
    """All layers in one tree with a leading axis L; smaller ranks are padded with zeros, which changes no logit."""
    R = max(layer.fc1_RxD.shape[0] for layer in layers)

    def widen(layer: LayerPredictor) -> LayerPredictor:
        missing = R - layer.fc1_RxD.shape[0]
        return LayerPredictor(
            jnp.pad(layer.fc1_RxD, ((0, missing), (0, 0))), jnp.pad(layer.fc2_FxR, ((0, 0), (0, missing)))
        )

    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(widen, layers))


def save_predictor(predictor: Predictor, path: Path, *, replace: bool = False, first_layer: int | None = None) -> None:
    """Writes one safetensors file: `layers.{i}.fc1.weight` [R, D], `layers.{i}.fc2.weight` [F, R], metadata.

    Args:
      predictor: what to write.
      path: the file.
      replace: whether an existing file may be replaced.
      first_layer: of a part of a predictor, which `join_predictors` puts together with the others.

    Raises:
      FalconError: the file exists and may not be replaced.
    """
    layers = enumerate(predictor.layers, first_layer or 0)
    tensors = {name: tensor for i, layer in layers for name, tensor in _named(i, layer).items()}
    metadata = {
        "version": _VERSION,
        "input": predictor.input,
        "thresholds": list(predictor.thresholds),
        "budgets": list(predictor.budgets),
        "measured": [dict(metrics) for metrics in predictor.measured],
        "crc32": {name: bytes_digest(np.asarray(tensor))[1] for name, tensor in tensors.items()},
    }
    if first_layer is not None:
        metadata["first_layer"] = first_layer
    parse(_Metadata, metadata, "the predictor")
    with write_aside(path, replace=replace) as aside:
        save_file(tensors, aside, {_METADATA: json.dumps(seal(metadata))})


def load_predictor(path: Path, config: FalconConfig) -> Predictor:
    """Reads a predictor and checks that it is undamaged and fits the model.

    Raises:
      FalconError: no such file, not a predictor, a part of one, damaged, or made for another model; the message says
        which.
    """
    predictor, layers, is_part = _read(path, config)
    if is_part:
        raise FalconError(
            f"{path} is a part of a predictor, layers {layers.start} to {layers.stop - 1} of {config.n_layers}: put "
            "all parts together with falcon-relu predictor join"
        )
    return _checked(predictor, config, path)


def join_predictors(paths: Sequence[Path], config: FalconConfig) -> Predictor:
    """One predictor from files that hold some layers each, in any order.

    Raises:
      FalconError: as `load_predictor`, or a layer is missing or twice there, or the parts take different inputs.
    """
    parts = sorted((_read(path, config)[:2] for path in paths), key=lambda part: part[1].start)
    held = [i for _, layers in parts for i in layers]
    if held != [*range(config.n_layers)]:
        wrong = next((i for i in range(config.n_layers) if held.count(i) != 1), 0)
        raise FalconError(
            f"the parts hold layer {wrong} {held.count(wrong)} times: give each part once, and all of them"
        )
    if len({part.input for part, _ in parts}) > 1:
        raise FalconError("the parts were fitted to recordings of different inputs: fit all to one recording")
    first, joined = parts[0][0], {}
    for name in ("layers", "thresholds", "budgets", "measured"):
        joined[name] = tuple(itertools.chain.from_iterable(getattr(part, name) for part, _ in parts))
    return _checked(first.replace(**joined), config, paths[0])


def _read(path: Path, config: FalconConfig) -> tuple[Predictor, range, bool]:
    """What a predictor file holds: the predictor, its layers, and whether they are said to be a part of the model's."""
    try:
        with safe_open(regular_file(path), framework="flax") as file:
            text = (file.metadata() or {}).get(_METADATA)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except Exception as error:  # the library's, and jax's for dtypes that it lacks
        if isinstance(error, FalconError):
            raise
        raise FalconError(f"{path} cannot be read as a predictor: {first_line(error)}") from None
    if text is None:
        raise FalconError(f"{path} is a safetensors file but not a predictor; make one with falcon-relu predictor")
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError):
        raise FalconError(f"{path} is damaged: its metadata are not JSON; {_ADVICE}") from None
    metadata = parse(_Metadata, unseal(stored, path, _ADVICE, version=("version", _VERSION)), path)
    held, L = range(config.n_layers), config.n_layers
    if (first := metadata.first_layer) is not None:
        held = range(first, first + len(metadata.thresholds))
        if not 0 <= held.start < held.stop <= L:
            raise FalconError(f"{path} holds layers {held.start} to {held.stop - 1}, but the model has only {L} layers")

    layers = tuple(_layer(tensors, f"layers.{i}.", config, path) for i in held)
    if unknown := sorted(
        tensors.keys() - {name for i, layer in zip(held, layers, strict=True) for name in _named(i, layer)}
    ):
        raise FalconError(f"{path} holds {unknown[0][:80]!r}, but the model has only {L} layers")
    for name, tensor in tensors.items():
        if metadata.crc32.get(name) != bytes_digest(np.asarray(tensor))[1]:
            raise FalconError(f"{path} is damaged: the checksum of {name} does not match; {_ADVICE}")
    predictor = Predictor(
        layers=layers,
        input=metadata.input,
        thresholds=metadata.thresholds,
        budgets=metadata.budgets,
        measured=metadata.measured,
    )
    return predictor, held, first is not None


def import_powerinfer(folder: Path, config: FalconConfig) -> Predictor:
    """Reads the `model_{i}.pt` files that PowerInfer releases, by torch's weights-only load.

    Raises:
      FalconError: torch is not installed, or a file is missing, damaged, of the wrong shape, or has biases, which
        predictors here do not.
    """
    layers = []
    for i in range(config.n_layers):
        path = Path(folder) / f"model_{i}.pt"
        if not os.path.lexists(path):
            raise FalconError(f"{path} does not exist; a model of {config.n_layers} layers needs one file each")
        tensors = load_torch(path)
        if unknown := sorted(tensors.keys() - {"fc1.weight", "fc2.weight"}):
            raise FalconError(f"{path} has {unknown[0][:80]!r}: only predictors of two maps without biases are read")
        arrays = {name: jnp.asarray(as_numpy(tensor.float())) for name, tensor in tensors.items()}
        layers.append(_layer(arrays, "", config, path))
    return uncalibrated(layers, "block_input")


def export_powerinfer(predictor: Predictor, folder: Path, *, replace: bool = False) -> None:
    """Writes `model_{i}.pt` files for PowerInfer's converter.

    PowerInfer has one threshold for all layers and no budgets, so thresholds and budgets are not exported.

    Raises:
      FalconError: torch is not installed, the folder exists and may not be replaced, or the predictor does not read the
        block input, as PowerInfer's must.
    """
    torch = _torch()
    if predictor.input != "block_input":
        raise FalconError(f"PowerInfer's predictors read block_input, this one reads {predictor.input}; fit another")
    with write_aside(folder, folder=True, replace=replace, marker="model_0.pt") as aside:
        aside.mkdir()
        for i, layer in enumerate(predictor.layers):
            tensors = {name: torch.from_numpy(np.array(w, np.float32)).half() for name, w in _named(i, layer).items()}
            torch.save({name.removeprefix(f"layers.{i}."): w for name, w in tensors.items()}, aside / f"model_{i}.pt")


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _named(i: int, layer: LayerPredictor) -> dict[str, jax.Array]:
    return {f"layers.{i}.fc1.weight": layer.fc1_RxD, f"layers.{i}.fc2.weight": layer.fc2_FxR}


def _layer(tensors: Mapping[str, jax.Array], prefix: str, config: FalconConfig, path: Path) -> LayerPredictor:
    """One layer's maps out of named tensors, shapes checked."""
    names = (f"{prefix}fc1.weight", f"{prefix}fc2.weight")
    if missing := [name for name in names if name not in tensors]:
        raise FalconError(f"{path} has no {missing[0]}")
    fc1_RxD, fc2_FxR = (tensors[name] for name in names)
    R, D, F = fc1_RxD.shape[:1], config.d_model, config.d_ff
    for name, tensor, shape in ((names[0], fc1_RxD, (*R, D)), (names[1], fc2_FxR, (F, *R))):
        if tensor.shape != shape or not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise FalconError(
                f"{path}: {name} is {tensor.dtype}{list(tensor.shape)}, the model needs floats of {list(shape)}"
            )
        check_finite(f"{path}: {name}", np.asarray(tensor))
    return LayerPredictor(fc1_RxD, fc2_FxR)


def _checked(predictor: Predictor, config: FalconConfig, path: Path) -> Predictor:
    """The predictor, after a check that thresholds, budgets and metrics have one entry a layer, within bounds."""
    L, F = config.n_layers, config.d_ff
    if len(predictor.thresholds) != L:
        raise FalconError(f"{path}: thresholds must be {L} numbers, got {predictor.thresholds[:8]}")
    if len(predictor.budgets) != L or not all(0 <= k <= F for k in predictor.budgets):
        raise FalconError(f"{path}: budgets must be {L} whole numbers from 0 to {F}, got {predictor.budgets[:8]}")
    if len(predictor.measured) not in (0, L):
        raise FalconError(f"{path}: measured must be of {L} layers or none, got {len(predictor.measured)}")
    return predictor


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise FalconError(
            "PowerInfer's files need torch; install the extra: pip install 'falcon-relu[parity]'"
        ) from None
    return torch
