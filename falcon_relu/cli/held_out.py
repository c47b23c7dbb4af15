"""`falcon-relu held-out`: perplexity on held-out text, KL from a teacher, and the cost of sparse decoding."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import tyro
from jax.sharding import Mesh

from falcon_relu.checkpoints.load import load_config, load_model
from falcon_relu.cli.devices import Devices, Dtype, on_devices, stored_as
from falcon_relu.cli.report import report
from falcon_relu.config import Activation, FalconConfig
from falcon_relu.errors import FalconError, check_number
from falcon_relu.model import Falcon
from falcon_relu.sharding import check_shared
from infer.predictor.predictor import load_predictor
from infer.predictor.quality import compare_sparse
from train.data.batches import open_folders, validation_batches
from train.validation import check_same_vocabulary, measure_held_out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(Devices):
    """Measure a model on the validation rows of token shards, on all devices.

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
    dtype: Dtype = "float32"
    """Dtype of products; weights are kept as stored for float32."""

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
            taught = load_config(args.teacher, activation=args.teacher_activation)
        except FalconError as error:  # which advises the flag of other commands
            raise FalconError(f"the teacher: {error}".replace(" --activation", " --teacher-activation")) from None
        check_same_vocabulary(taught, config)
    with on_devices(args) as mesh:
        _run(args, config, mesh)


def _run(args: Args, config: FalconConfig, mesh: Mesh) -> None:
    predictor = None if args.predictor is None else load_predictor(args.predictor, config)
    check_shared(mesh, args.batch_size)
    data, manifests = open_folders(args.data, args.batch_size)
    dtype = jnp.dtype(args.dtype)
    _, params = load_model(args.model, activation=args.activation, dtype=stored_as(args.dtype), mesh=mesh)
    teacher = None
    if args.teacher is not None:
        stated = args.teacher_activation
        same = args.teacher == args.model  # under another activation: the weights are read once
        teacher_params = (
            params if same else load_model(args.teacher, activation=stated, dtype=stored_as(args.dtype), mesh=mesh)[1]
        )
        teacher = Falcon(load_config(args.teacher, activation=stated), dtype), teacher_params
    means = measure_held_out(Falcon(config, dtype), params, data, mesh=mesh, teacher=teacher, manifests=manifests)
    results: dict[str, Any] = {"model": args.model, "teacher": args.teacher, "activation": config.activation}
    results |= {"perplexity": math.exp(means["cross_entropy"]), "cross_entropy": means["cross_entropy"]}
    results |= {name: means[name] for name in ("accuracy", "kl", "agreement") if name in means}
    sparse = None
    if predictor is not None:
        rows = itertools.islice(validation_batches(data, manifests=manifests), args.batches)
        sparse = compare_sparse(config, params, predictor, rows, dtype=dtype)
        names = ("kl", "agreement", "dense_loss", "sparse_loss", "read", "fired")
        results["dense against sparse"] = [{name: sparse[name] for name in names}]
    report(results, args, also={"zeros": means["zeros"], "sparse": sparse})
