"""`falcon-relu pack`: a checkpoint to decode weights on disk."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from falcon_relu.checkpoints.load import load_config
from falcon_relu.cli.outputs import Made, Output
from falcon_relu.cli.report import report
from falcon_relu.config import Activation
from falcon_relu.errors import FalconError
from infer.predictor.predictor import load_predictor
from infer.predictor.recording import Recording, open_recording
from infer.weights.layout import Formats, weights_from_checkpoint
from infer.weights.storage import save_weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(Output):
    """Convert a checkpoint to decode weights: one row a neuron, in a chosen number format, with the predictor.

    `falcon-relu decode` loads the result as fast as the disk reads. The source is read one tensor at a time.
    """

    model: Annotated[str, tyro.conf.Positional]
    """Native weights, Hugging Face folder or hub id."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder to write."""
    format: str = "bf16"
    """Number format of the matrices: f32, bf16, f16, int8 or int4 (with an int8 head), also with exceptions:
    "int8,head=bf16" (kinds: attention, mlp, predictor, head)."""
    predictor: Path | None = None
    """Predictor file to pack with it, for sparse decoding."""
    calibration: Path | None = None
    """Recording of the model (falcon-relu predictor record): int4 matrices are rounded for their inputs in it."""
    activation: Activation | None = None
    """MLP activation, where a Hugging Face config does not state it."""

    def written(self) -> list[Made]:
        """What is written besides `json`."""
        return [Made(self.out, "decode.json")]


def run(args: Args) -> None:
    """Packs, then reports."""
    formats = Formats.parse(args.format)
    predictor = None
    if args.predictor is not None:
        predictor = load_predictor(args.predictor, load_config(args.model, activation=args.activation))
    recording = calibration(args.calibration, formats)
    weights = weights_from_checkpoint(args.model, formats, predictor, activation=args.activation, recording=recording)
    save_weights(weights, args.out, replace=args.overwrite)
    report(
        {
            "GB": weights.nbytes / 1e9,
            "format": str(formats),
            "activation": weights.config.activation,
            "predictor": weights.predictor_input or "none",
        },
        args,
    )


def calibration(folder: Path | None, formats: Formats) -> Recording | None:
    """The recording for `--calibration`.

    Raises:
      FalconError: it cannot be opened, or no matrix is to be int4.
    """
    if folder is None:
        return None
    if "int4" not in dataclasses.asdict(formats).values():
        raise FalconError(f"--calibration is for int4 matrices, and format {formats} has none; leave it out")
    return open_recording(folder)
