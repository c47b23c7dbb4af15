"""What a model card is made from: the JSON files of other commands, checked, their text made safe for Markdown."""

from __future__ import annotations

import dataclasses
import html
import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field

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
    fires: _Share


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allowed:
    """A budget for an allowed error, in `sparsity.json`."""

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speeds:
    """JSON of falcon-relu bench or decode: the table is under "tokens", or its one row is the file itself."""

    machine: Machine = Machine()
    model: _Text | None = None
    layers: _Count | None = None
    tokens: list[dict[str, Any]] | _Count | None = None


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
    speeds: list[dict[str, Any]] = dataclasses.field(default_factory=list)
