"""`falcon-relu bench`: speed of decoding at real widths against the memory bandwidth."""

from __future__ import annotations

import dataclasses
from typing import Literal

from falcon_relu.cli.machine import machine
from falcon_relu.cli.outputs import Output
from falcon_relu.cli.report import report
from falcon_relu.config import FAMILY, family
from falcon_relu.errors import FalconError, check_number
from falcon_relu.progress import console, progress
from infer import bench, kernels
from infer.kernels.cache import CacheFormat
from infer.weights.formats import Format
from infer.weights.layout import Formats

_POSSIBLE = 1.02  # share of memory; above, what memory delivers was measured too low


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(Output):
    """Measure decoding with random weights at a model's real widths: whole decode steps, or single kernels (--micro).

    Memory bandwidth is measured with the same threads in the same run, between the steps.
    """

    model: str = "falcon-40b"
    """Member of the family whose widths are used."""
    layers: int = 4
    """Number of layers to measure; the whole model's speed is projected from them."""
    vocab_size: int | None = None
    """Vocabulary size; the model's own if not given."""
    format: Format = "bf16"
    """Number format of all matrices."""
    active: tuple[float, ...] = (0.05, 0.1, 0.2)
    """Fractions of the neurons that the predictor chooses."""
    rank: int = 1024
    """Rank of the predictor."""
    modes: tuple[Literal["dense", "exact", "sparse"], ...] = ("dense", "exact", "sparse")
    backends: tuple[Literal["native", "xla"], ...] | None = None
    """Kernels to measure; all that can be used here if not given."""
    prompt: int = 200
    """Tokens of the prompt whose prefill is measured; 0 for none."""
    context: int = 512
    """Positions in the KV cache, half of them filled."""
    cache_format: CacheFormat = "bf16"
    """Number format of the KV cache."""
    batch: int = 1
    """Sequences decoded together."""
    steps: int = 12
    """Measured steps, or calls of each kernel."""
    bandwidth: float = 67.2
    """Memory bandwidth in GB/s of the machine to project the speed to; by default, that of the published results."""
    micro: bool = False
    """Measure single kernels instead of whole decode steps."""


def run(args: Args) -> None:
    """Measures and reports."""
    _check(args)
    if args.backends is None and (notice := kernels.fallback("auto")) is not None:
        console.print(notice, style="yellow", soft_wrap=True)
    report(_kernels(args) if args.micro else _tokens(args), args, also={"machine": machine()})


def _kernels(args: Args) -> dict[str, object]:
    c = family(args.model)
    rows: list[dict[str, object]] = []
    with progress("kernels", None, "measurements") as advance:
        for row in bench.measure_kernels(c.d_model, c.d_ff, args.format, args.active, args.steps, _backends(args)):
            rows.append(row)
            advance()
    chosen = [row for share in args.active for row in bench.measure_select(c.d_ff, share, args.steps, _backends(args))]
    return {"model": args.model, "kernels": rows, "choosing neurons": chosen} | _fault(rows)


def _tokens(args: Args) -> dict[str, object]:
    full = family(args.model)
    config = full.replace(
        n_layers=args.layers, vocab_size=args.vocab_size or full.vocab_size, activation="relu", tied_embeddings=True
    )
    rows, prompts = [], []
    with progress("making weights", 1 + len(_backends(args)), "measurements") as advance:
        weights = bench.random_weights(config, Formats.parse(args.format), args.rank)
        advance(note=f"{weights.nbytes / 1e9:.1f} GB")
        settings = [
            (bench.with_active_share(weights, share), mode)
            for mode in args.modes
            for share in (args.active if mode == "sparse" else (1.0,))
        ]
        for backend in _backends(args):
            found = bench.measure_settings(settings, backend, args.context, args.steps, args.batch, args.cache_format)
            dense = next((times for times, (_, mode) in zip(found, settings, strict=True) if mode == "dense"), None)
            for times, (_, mode) in zip(found, settings, strict=True):
                name = {"backend": kernels.describe(kernels.backend(backend)), "mode": mode, "format": args.format}
                rows.append(times.row(name, dense, args.layers, full.n_layers, 1e9 * args.bandwidth))
            advance(note=backend)
        if args.prompt:
            prompts.append(bench.measure_prefill(weights, args.prompt, repeats=2))
    labels = {"model": args.model, "layers": args.layers, "rank": args.rank, "batch": args.batch}
    return labels | {"tokens": rows, "prefill": prompts} | _fault(rows)


def _fault(rows: list[dict[str, object]]) -> dict[str, object]:
    """A line on shares that cannot be: no work reads faster than memory can be read."""
    high = max(float(str(row["share of memory"])) for row in rows)
    if high <= _POSSIBLE:
        return {}
    text = (
        f"a share of memory of {high:.2f} is a fault of the yardstick: memory was slower while it was read; run again"
    )
    return {"fault": text}


def _backends(args: Args) -> tuple[kernels.Backend, ...]:
    return args.backends or kernels.available()


def _check(args: Args) -> None:
    if args.model not in FAMILY:
        raise FalconError(f"--model {args.model} is unknown; there are: {', '.join(FAMILY)}")
    if not all(0 < share <= 1 for share in args.active):
        raise FalconError(f"--active takes fractions above 0 and up to 1, got {args.active}")
    for name in ("layers", "rank", "steps", "batch"):
        check_number(f"--{name}", getattr(args, name), low=1)
    for name, least in (("prompt", 0), ("context", 2)):
        check_number(f"--{name}", getattr(args, name), low=least)
    check_number("--bandwidth", args.bandwidth, above=0)
    if args.vocab_size is not None:
        check_number("--vocab-size", args.vocab_size, low=1)
    if not args.micro:
        for backend in args.backends or ():
            kernels.backend(backend)
