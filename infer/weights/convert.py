"""The matrices of a model in number formats, rounded for what they are multiplied with in recorded text."""

from __future__ import annotations

import jax
import numpy as np

from falcon_relu.errors import FalconError
from infer.predictor.predictor import LayerPredictor
from infer.predictor.recording import HEAD, MATRICES, Recording
from infer.weights.formats import Array, Format, Rows
from infer.weights.rounding import Inputs, quantise


def convert_matrix(
    name: str, field: str, layer: int | None, matrix: Array, format: Format, recording: Recording | None
) -> Rows:
    """A matrix in `format`, in int4 rounded for its recorded inputs.

    Args:
      name: shown in errors.
      field: which it is of LayerWeights or DecodeWeights.
      layer: its layer.
      matrix: [M, D].
      format: number format.
      recording: of the model.

    Raises:
      FalconError: a number is not finite or does not fit the format; the message has the matrix's name.
    """
    return _rows(
        name, matrix, format, _inputs(recording, field, layer, matrix) if recording and format == "int4" else None
    )


def convert_predictor(
    layer: int, maps: LayerPredictor, format: Format, recording: Recording | None
) -> tuple[Rows, Rows]:
    """fc1 and fc2 of a layer's predictor, which reads what was recorded. Errors as `convert_matrix`."""
    first = second = None
    if recording is not None and format == "int4":
        x_NxD = np.asarray(recording.layer(layer)[0][: recording.matrix_tokens], np.float32)
        first = Inputs(x_NxD)
        second = Inputs(np.maximum(x_NxD @ np.asarray(maps.fc1_RxD, np.float32).T, 0))
    name = f"layers.{layer}.predictor"
    return _rows(f"{name}.fc1", maps.fc1_RxD, format, first), _rows(f"{name}.fc2", maps.fc2_FxR, format, second)


def _inputs(recording: Recording, field: str, layer: int | None, matrix: Array) -> Inputs | None:
    """Inputs of a matrix; None of an embedding, also where it is the head."""
    if field == "down" and layer is not None:
        contribution_NxF = np.asarray(recording.layer(layer)[1][: recording.matrix_tokens], np.float32)
        length_F = np.linalg.norm(np.asarray(matrix, np.float32), axis=1)
        return Inputs(contribution_NxF / np.maximum(length_F, np.finfo(np.float32).tiny)[None], weigh_rows=True)
    return Inputs(recording.matrix_inputs(field, layer)) if field in (*MATRICES, HEAD) else None


def _rows(name: str, matrix: Array, format: Format, inputs: Inputs | None) -> Rows:
    """Rows as arrays of the CPU device, which uses aligned memory without a copy."""
    try:
        rows = quantise(matrix, format, inputs)
    except FalconError as error:
        raise FalconError(f"{name}: {error}") from None
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf)), rows)
