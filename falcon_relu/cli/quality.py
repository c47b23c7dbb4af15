"""`falcon-relu quality`: what number formats and decoding modes cost in quality, on held-out text."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from falcon_relu.checkpoints.load import load_config
from falcon_relu.cli.outputs import Output
from falcon_relu.cli.pack import calibration
from falcon_relu.cli.report import report
from falcon_relu.config import Activation
from falcon_relu.errors import FalconError, check_number
from falcon_relu.progress import track
from infer import kernels
from infer.predictor.predictor import load_predictor
from infer.quality import DecodeSetting, measure_quality, one_kind
from infer.step import Mode
from infer.weights.layout import KINDS, DecodeWeights, Formats, weights_from_checkpoint
from train.data.batches import DataConfig, Source, validation_batches
from train.data.shards import read_manifest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(Output):
    """Decode held-out text in every mode and format; measure how far each is from dense decoding in a reference format.

    KL is KL(reference || measured) in nats a token; agreement is how often both have the same most likely token. Each
    kind of matrix is also measured with only that kind in the measured format. The model is held in both formats.
    """

    model: Annotated[str, tyro.conf.Positional]
    """Native weights, Hugging Face folder or hub id."""
    data: Annotated[Path, tyro.conf.Positional]
    """Token shards made by falcon-relu prepare; the validation split is read."""
    predictor: Path | None = None
    """Predictor file, for sparse decoding."""
    format: str = "int8"
    """Number format to measure."""
    reference: str = "bf16"
    """Number format to compare with."""
    calibration: Path | None = None
    """Recording of the model, for the measured format: int4 matrices are rounded for their inputs in it."""
    tokens: int = 4096
    """Number of tokens to decode, rounded up to whole rows of the data."""
    batch: int = 1
    """Rows decoded together. What is read are the neurons that any of them needs; results do not change."""
    backend: kernels.Backend = "auto"
    """Kernels: native (C++), xla, or auto: native where it was built."""
    activation: Activation | None = None
    """MLP activation, where a Hugging Face config does not state it."""

    def __post_init__(self) -> None:
        check_number("--tokens", self.tokens, low=1)
        check_number("--batch", self.batch, low=1)


def run(args: Args) -> None:
    """Loads the model in both formats, decodes, then reports."""
    formats, reference_formats = Formats.parse(args.format), Formats.parse(args.reference)
    kernels.backend(args.backend)
    rows = list(_rows(args))
    config = load_config(args.model, activation=args.activation)
    predictor = None if args.predictor is None else load_predictor(args.predictor, config)
    recording = calibration(args.calibration, formats)
    reference, small = (
        weights_from_checkpoint(args.model, f, predictor, activation=args.activation, recording=of)
        for f, of in ((reference_formats, None), (formats, recording))
    )
    settings = _settings(reference, small, str(reference_formats), str(formats))
    found = measure_quality(reference, settings, track(rows, "decode", "batches"), backend=args.backend)
    about = {"tokens": sum(row.size for row in rows), "reference": f"{reference_formats}, dense"}
    table = []
    for (weights, mode), metrics in found.items():
        megabytes = metrics.pop("bytes") / 1e6
        table.append({"weights": weights, "mode": mode} | metrics | {"MB a step": megabytes})
    report(about | {"quality": table}, args)


def _settings(
    reference: DecodeWeights, small: DecodeWeights, reference_name: str, small_name: str
) -> dict[tuple[str, Mode], DecodeSetting]:
    """Settings by (weights, mode): both formats in every mode that the model supports, and one kind small at a time."""
    modes: list[Mode] = ["dense"]
    if reference.config.activation != "gelu":
        modes += ["exact"] if reference.predictor_input is None else ["exact", "sparse"]
    settings = {
        (name, mode): DecodeSetting(w, mode)
        for name, w in ((reference_name, reference), (small_name, small))
        for mode in modes
    }
    for kind in KINDS:
        if kind != "predictor":
            settings[f"{small_name} in {kind} alone", "dense"] = DecodeSetting(one_kind(reference, small, kind))
        elif "sparse" in modes:
            alone = DecodeSetting(one_kind(reference, small, kind), "sparse")
            settings[f"{small_name} in {kind} alone", "sparse"] = alone
    return settings


def _rows(args: Args) -> Iterator[np.ndarray]:
    """Held-out batches [B, T] whose rows are all full."""
    seq_len = read_manifest(args.data).seq_len
    wanted = -(-args.tokens // (seq_len * args.batch))
    data = DataConfig(sources=(Source(args.data),), seq_len=seq_len, batch_size=args.batch)
    full = (batch["tokens_BxT"] for batch in validation_batches(data) if (batch["segment_ids_BxT"] != 0).all())
    rows = list(itertools.islice(full, wanted))
    if not rows:
        raise FalconError(f"{args.data} has no batch of {args.batch} full validation rows; prepare more text")
    yield from rows
