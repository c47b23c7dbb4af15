"""`falcon-relu export`: native weights to a folder that transformers loads."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Annotated

import tyro

from falcon_relu.checkpoints.convert import Float, export_hf
from falcon_relu.cli.outputs import Made, Output
from falcon_relu.cli.report import report
from falcon_relu.errors import check_number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(Output):
    """Export native weights as a folder that transformers loads, its config stating the activation.

    One shard is in memory at a time.
    """

    source: Annotated[Path, tyro.conf.Positional]
    """Folder of native weights."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder to make."""
    dtype: Float | None = None
    """Dtype of the exported weights; as stored if not given."""
    max_shard_gb: float = 5.0
    """GB that no safetensors file exceeds, unless a single tensor does."""
    tokenizer: Path | None = None
    """A tokenizer.json, or a folder with one, to put beside the weights."""

    def __post_init__(self) -> None:
        check_number("--max-shard-gb", self.max_shard_gb, above=0)

    def written(self) -> list[Made]:
        """What is written besides `json`."""
        return [Made(self.out, "config.json")]


def run(args: Args) -> None:
    """Exports, then reports."""
    start = time.perf_counter()
    max_shard_bytes = math.ceil(args.max_shard_gb * 1e9)
    config = export_hf(
        args.source,
        args.out,
        dtype=args.dtype,
        max_shard_bytes=max_shard_bytes,
        tokenizer=args.tokenizer,
        replace=args.overwrite,
    )
    results = {
        "parameters": config.n_params,
        "layers": config.n_layers,
        "activation": config.activation,
        "files": len(list(args.out.glob("*.safetensors"))),
        "tokenizer": "tokenizer.json" if args.tokenizer is not None else "none: give --tokenizer to add one",
        "seconds": time.perf_counter() - start,
    }
    report(results, args)
