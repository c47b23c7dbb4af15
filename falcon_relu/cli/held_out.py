"""`falcon-relu held-out`: perplexity on held-out text, KL from a teacher, and the cost of sparse decoding."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Annotated, Any

import tyro

from falcon_relu.checkpoints.load import load_config, load_model
from falcon_relu.cli.outputs import Output
from falcon_relu.cli.report import report
from falcon_relu.config import Activation
from falcon_relu.errors import FalconError, check_number
from infer.predictor.predictor import load_predictor
from infer.predictor.quality import compare_sparse
from train.data.batches import DataConfig, Source, validation_batches
from train.data.shards import read_manifest
from train.validation import validate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(Output):
    """Measure a model on the validation rows of token shards, in float32 on all devices.

    KL is KL(teacher || model) in nats a token, at temperature 1; agreement is how often both have the same most likely
    next token. With a predictor, the model is also run with only the neurons that it selects and compared with itself.
    """

    model: Annotated[str, tyro.conf.Positional]
    """Native weights, Hugging Face folder or hub id."""
    data: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of token shards made by falcon-relu prepare."""
    activation: Activation | None = None
    """MLP activation, where a Hugging Face config does not state it: gelu for the original models."""
    swap_to: Activation | None = None
    """Run the model under this activation instead: the swapped but untuned student."""
    teacher: str | None = None
    """Model to compare with."""
    teacher_activation: Activation | None = None
    """MLP activation of the teacher, where a Hugging Face config does not state it."""
    predictor: Path | None = None
    """Predictor file of the model."""
    batch_size: int = 8
    """Rows run together."""
    batches: int = 64
    """Batches that a predictor is measured on, at most."""

    def __post_init__(self) -> None:
        check_number("--batch-size", self.batch_size, low=1)
        check_number("--batches", self.batches, low=1)


def run(args: Args) -> None:
    """Measures and reports."""
    if not args.data:
        raise FalconError("name at least one folder of token shards")
    if args.teacher is None and args.teacher_activation is not None:
        raise FalconError("--teacher-activation is the activation of a --teacher; give one, or leave it out")
    config = load_config(args.model, activation=args.activation)  # its errors come before weights are read
    config = config if args.swap_to is None else config.with_activation(args.swap_to)
    if args.teacher is not None:
        try:
            load_config(args.teacher, activation=args.teacher_activation)
        except FalconError as error:  # which advises the flag of other commands
            raise FalconError(f"the teacher: {error}".replace(" --activation", " --teacher-activation")) from None
    predictor = None if args.predictor is None else load_predictor(args.predictor, config)
    seq_len = read_manifest(args.data[0]).seq_len
    data = DataConfig(sources=tuple(map(Source, args.data)), seq_len=seq_len, batch_size=args.batch_size)
    found = validate(
        args.model,
        data,
        source_activation=args.activation,
        activation=args.swap_to,
        teacher=args.teacher,
        teacher_activation=args.teacher_activation,
    )
    results: dict[str, Any] = {"model": args.model, "teacher": args.teacher, "activation": config.activation}
    results |= {"perplexity": math.exp(found["cross_entropy"]), "cross_entropy": found["cross_entropy"]}
    results |= {name: found[name] for name in ("accuracy", "kl", "agreement") if name in found}
    sparse = None
    if predictor is not None:
        _, params = load_model(args.model, activation=args.activation)
        rows = itertools.islice(validation_batches(data), args.batches)
        sparse = compare_sparse(config, params, predictor, rows)
        names = ("kl", "agreement", "dense_loss", "sparse_loss", "read", "fired")
        results["dense against sparse"] = [{name: sparse[name] for name in names}]
    report(results, args, also={"zeros": found["zeros"], "sparse": sparse})
