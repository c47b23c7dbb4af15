"""`falcon-relu convert`: a Hugging Face checkpoint to native weights."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated

import tyro

from falcon_relu.checkpoints.convert import Float, import_hf
from falcon_relu.cli.outputs import Made, Output
from falcon_relu.cli.report import report
from falcon_relu.config import Activation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(Output):
    """Convert a Falcon checkpoint in the Hugging Face layout (safetensors or .bin) to native weights.

    The source is a folder or a hub id, owner/name or owner/name@revision. One tensor is in memory at a time.
    """

    source: Annotated[str, tyro.conf.Positional]
    """Folder or hub id of the checkpoint."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder to make."""
    activation: Activation | None = None
    """MLP activation, where the checkpoint's config does not state it: gelu for the original models."""
    dtype: Float | None = None
    """Dtype of the converted weights; as stored if not given."""

    def written(self) -> list[Made]:
        """What is written besides `json`."""
        return [Made(self.out, "falcon.json")]


def run(args: Args) -> None:
    """Converts, then reports."""
    start = time.perf_counter()
    config = import_hf(args.source, args.out, activation=args.activation, dtype=args.dtype, replace=args.overwrite)
    results = {
        "parameters": config.n_params,
        "layers": config.n_layers,
        "activation": config.activation,
        "seconds": time.perf_counter() - start,
    }
    report(results, args)
