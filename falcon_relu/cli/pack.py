"""`falcon-relu pack`: a checkpoint to decode weights on disk."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from falcon_relu.cli.figures import report
from falcon_relu.config import Activation
from falcon_relu.errors import FalconError
from infer.formats import Format
from infer.predictor import load
from infer.storage import save
from infer.weights import Formats, from_checkpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Lay a checkpoint out for decoding on a CPU: neuron-major rows in a small format, with its predictor.

    `falcon-relu decode` loads the result at the speed of the disk. One tensor of the source is in memory at a time.
    """

    model: Annotated[str, tyro.conf.Positional]
    """Native weights, Hugging Face folder or hub id."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder to make."""
    format: Format = "bf16"
    """Number format of all matrices."""
    predictor: Path | None = None
    """Predictor file to pack with it, for sparse decoding."""
    activation: Activation | None = None
    """MLP activation, where a Hugging Face config does not state it."""
    json: Path | None = None
    """Also write the figures to this file."""


def run(args: Args) -> None:
    """Packs, then reports."""
    if args.out.exists():
        raise FalconError(f"{args.out} exists already; choose another path or remove it first")
    weights = from_checkpoint(args.model, Formats.all(args.format), activation=args.activation)
    if args.predictor is not None:
        weights = weights.with_predictor(load(args.predictor, weights.config), args.format)
    save(weights, args.out)
    report(
        {
            "GB": weights.nbytes / 1e9,
            "format": args.format,
            "activation": weights.config.activation,
            "predictor": weights.predictor_input or "none",
        },
        args.json,
    )
