"""A unit, some consecutive documents of the inputs, to one shard for each split."""

from __future__ import annotations

import dataclasses
import hashlib
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from falcon_relu.checkpoints.schema import read_as
from falcon_relu.errors import FalconError
from falcon_relu.files import remove, write_json
from falcon_relu.tokenizer import Tokenizer
from train.data.shards import PREPARE, SPLITS, Shard, check_shard, pack, token_dtype, write_shard
from train.data.text import Record, text_of

BAD_EXAMPLES = 100  # unusable lines that a unit and the manifest list; all are counted
_BATCH_BYTES = 1 << 19  # of text a call of the tokenizer, whose results take many times as much memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnitSplit:
    """A unit's documents of one split; `tokens` includes the end-of-text tokens but not the padding."""

    tokens: int
    documents: int
    shard: Shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """The file that marks a unit as finished.

    Attributes:
      settings: settings that it was made with.
      crc32: CRC-32 of its records.
      splits: the splits of its documents, by name.
      bad_lines: number of its lines or rows that could not be used.
      bad_examples: `file:line: reason` for the first of them.
    """

    settings: dict[str, Any]
    crc32: int
    splits: dict[str, UnitSplit]
    bad_lines: int
    bad_examples: tuple[str, ...]


def prepare_unit(
    number: int, records: Sequence[Record], settings: dict[str, Any], tokenizer: Tokenizer, out: Path
) -> int:
    """Tokenises and packs a unit: its shards, then the file that marks it as finished. Returns its number of tokens."""
    documents: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    bad: list[str] = []
    dtype = token_dtype(tokenizer.vocab_size)
    for texts in _batches(records, settings["text_field"], bad):
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            split = _split_of(text, settings["seed"], settings["validation_fraction"])
            documents[split].append(np.array([*ids, tokenizer.eos_id], dtype))
    splits: dict[str, UnitSplit] = {}
    for split, arrays in documents.items():
        path = out / f"{split}-{number:06d}.array_record"
        remove(path)
        if arrays:
            shard = write_shard(path, pack(arrays, settings["seq_len"]))
            splits[split] = UnitSplit(tokens=sum(map(len, arrays)), documents=len(arrays), shard=shard)
    unit = Unit(
        settings=settings,
        crc32=_crc32(records),
        splits=splits,
        bad_lines=len(bad),
        bad_examples=tuple(bad[:BAD_EXAMPLES]),
    )
    write_json(unit_path(out, number), dataclasses.asdict(unit))
    return sum(split.tokens for split in splits.values())


def _batches(records: Sequence[Record], text_field: str, bad: list[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for record in records:
        try:
            batch.append(text_of(record, text_field))
        except ValueError as error:
            bad.append(f"{record.source}:{record.number}: {error}")
            continue
        size += len(record.data)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _split_of(text: str, seed: int, validation_fraction: float) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=8, salt=seed.to_bytes(16, "little")).digest()
    return "validation" if int.from_bytes(digest, "little") < validation_fraction * 2**64 else "train"


def _crc32(records: Sequence[Record]) -> int:
    crc = 0
    for record in records:
        crc = zlib.crc32(record.data, crc)
    return crc


def unit_path(out: Path, number: int) -> Path:
    """The file that marks a unit as finished."""
    return out / "units" / f"{number:06d}.json"


def is_finished(out: Path, number: int, records: Sequence[Record], settings: dict[str, Any]) -> bool:
    """Whether a unit was finished earlier from the same records with the same settings, and its shards are there.

    Raises:
      FalconError: it was made from other records or with other settings.
    """
    path = unit_path(out, number)
    if not path.exists():
        return False
    try:
        unit = read_as(Unit, path)
    except FalconError:
        return False  # damaged, and made again
    changed = [name for name, value in settings.items() if unit.settings.get(name) != value]
    if changed:
        were = ", ".join(f"{name} was {unit.settings.get(name)}, now {settings[name]}" for name in changed)
        raise FalconError(f"{out} was begun with other settings ({were}): choose another folder or remove it")
    if unit.crc32 != _crc32(records):
        raise FalconError(
            f"the text that begins at {records[0].source}:{records[0].number} is not what {path} was made from: the "
            f"inputs or their order changed since; choose another folder or remove {out}"
        )
    try:
        for split in unit.splits.values():
            check_shard(out, split.shard, PREPARE)
    except FalconError:
        return False
    return True
