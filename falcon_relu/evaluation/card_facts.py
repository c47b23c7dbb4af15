"""What a model card is made from: the JSON files of other commands, checked, their text made safe for Markdown."""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple, NotRequired

from pydantic import AfterValidator, Field
from typing_extensions import TypedDict  # pydantic does not take that of typing before Python 3.12

from falcon_relu.checkpoints.schema import parse
from falcon_relu.config import Activation

_LONGEST = 300  # characters of a text from outside


def markdown_text(value: str) -> str:
    """Text from outside as one line of Markdown that shows it as it is: no markup, HTML, table or line of its own."""
    line = " ".join(value.split())[:_LONGEST]
    line = "".join(letter if letter.isprintable() else "\ufffd" for letter in line)
    # An underscore inside a word is no markup; elsewhere it is.
    return re.sub(r"[\\`*\[\]|~$#!]|(?<!\w)_|_(?!\w)", r"\\\g<0>", html.escape(line, quote=False))


_Text = Annotated[str, AfterValidator(markdown_text)]
_Number = Annotated[float, Field(ge=-1e15, le=1e15)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Count = Annotated[int, Field(ge=0, le=10**15)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """A row of `results.json`."""

    benchmark: _Text
    metric: _Text | None = None
    shots: _Count | None = None
    value: _Number | None = None
    error: _Number | None = None
    note: _Text = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """`results.json` of falcon-relu eval."""

    rows: list[Figure]
    average: _Number | None = None
    limit: _Count | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseText:
    """Dense against sparse decoding, in the JSON of falcon-relu held-out."""

    kl: _Number | None = None
    agreement: _Share | None = None
    read: _Share | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
    """JSON of falcon-relu held-out."""

    perplexity: _Number | None
    kl: _Number | None = None
    agreement: _Share | None = None
    sparse: SparseText | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer of `sparsity.json`."""

    layer: _Count
    zeros: _Share


@dataclasses.dataclass(frozen=True, kw_only=True)
class Union:
    """Sequences decoded together, in `sparsity.json`."""

    batch: _Count
    fired: _Share


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allowed:
    """The budgets for an allowed KL(dense || sparse), in `sparsity.json`."""

    allowed: Annotated[float, Field(validation_alias="allowed kl", ge=0, le=1e15)]
    kl: _Number
    read: _Share


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparsity:
    """`sparsity.json` of falcon-relu sparsity."""

    zeros: _Share
    layers: list[Layer] = dataclasses.field(default_factory=list)
    union: list[Union] = dataclasses.field(default_factory=list)
    allowed: list[Allowed] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Data of a training run."""

    batch_size: _Count | None = None
    seq_len: _Count | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
    """Loss of a training run."""

    lm_weight: _Number | None = None
    kd_weight: _Number | None = None
    temperature: _Number | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Optimizer of a training run."""

    learning_rate: _Number | None = None
    final_learning_rate: _Number | None = None
    warmup_steps: _Count | None = None
    weight_decay: _Number | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """`config.json` of a training run."""

    steps: _Count | None
    activation: Activation | None = None
    teacher: _Text | None = None
    compute_dtype: _Text | None = None
    data: Batch = Batch()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """A split of token shards."""

    tokens: _Count | None = None
    documents: _Count | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """`manifest.json` of token shards."""

    splits: dict[str, Split]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What speeds were measured on."""

    cpu: _Text | None = None
    cores: _Count | None = None
    memory_gb: _Number | None = None


# Rows of the tables of speeds: the columns that the card shows. What the commands compute from their measurements, as
# the speed on a machine with another memory bandwidth, is left out.
_StepRow = TypedDict(
    "_StepRow",
    {
        "backend": _Text,
        "mode": _Text,
        "format": _Text,
        "active": _Share,
        "ms/token": _Number,
        "GB/token": _Number,
        "memory GB/s": _Number,
        "share of memory": _Number,
        "layers, times dense": _Number | None,
    },
)
_KernelRow = TypedDict(
    "_KernelRow",
    {
        "kernel": _Text,
        "backend": _Text,
        "format": _Text,
        "active": _Share | None,
        "GB/s": _Number,
        "memory GB/s": _Number,
        "share of memory": _Number,
    },
)
_TextRow = TypedDict(
    "_TextRow",
    {
        "prompt tokens": _Count,
        "prompt tokens/s": _Number,
        "tokens": _Count,
        "tokens/s": _Number,
        "MB a step": _Number,
        "neurons read": _Share,
        "GB/s": _Number,
        "memory GB/s": _Number | None,
    },
)


class _Measured(TypedDict):
    machine: NotRequired[Machine]


class _Bench(_Measured):
    model: _Text
    layers: _Count
    tokens: Annotated[list[_StepRow], Field(min_length=1)]


class _BenchKernels(_Measured):
    model: _Text
    kernels: Annotated[list[_KernelRow], Field(min_length=1)]


class _Decode(_Measured, _TextRow):
    mode: _Text
    kernels: _Text


class _Chat(_Measured):
    mode: _Text
    kernels: _Text
    turns: Annotated[list[_TextRow], Field(min_length=1)]


class Speeds(NamedTuple):
    """What falcon-relu bench or decode measured.

    Attributes:
      machine: what it ran on.
      what: what was measured, a sentence of Markdown.
      rows: the table, its columns by name.
    """

    machine: Machine
    what: str
    rows: Sequence[Mapping[str, Any]]  # str, float or None


def speeds_of(value: Any, where: object) -> Speeds:
    """The speeds in the parsed JSON of falcon-relu bench or decode.

    Raises:
      FalconError: it is not what one of these commands writes; the message names the first field that is not.
    """
    keys = value if isinstance(value, dict) else {}
    if isinstance(keys.get("tokens"), list):
        bench = parse(_Bench, value, where, unknown_keys=True)
        what = f"Random weights at the widths of {bench['model']}, {bench['layers']:,} layers."
        return Speeds(bench.get("machine", Machine()), what, bench["tokens"])
    if isinstance(keys.get("kernels"), list):
        kernels = parse(_BenchKernels, value, where, unknown_keys=True)
        what = f"Single kernels, on random matrices of the widths of {kernels['model']}."
        return Speeds(kernels.get("machine", Machine()), what, kernels["kernels"])
    decode: Any = parse(_Chat if "turns" in keys else _Decode, value, where, unknown_keys=True)
    what = f"Texts decoded in {decode['mode']} mode, kernels: {decode['kernels']}."
    columns = _TextRow.__annotations__
    rows = [{name: row[name] for name in columns} for row in decode.get("turns", [decode])]
    return Speeds(decode.get("machine", Machine()), what, rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """All that a card is made from; see `card.render`."""

    name: _Text
    base: str | None = None
    training: Training | None = None
    data: dict[_Text, Manifest] = dataclasses.field(default_factory=dict)
    relu: Results | None = None
    original: Results | None = None
    sparse: Results | None = None
    held_out: HeldOut | None = None
    sparsity: Sparsity | None = None
    speeds: list[Any] = dataclasses.field(default_factory=list)
