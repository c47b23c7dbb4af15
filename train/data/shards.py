"""Token shards, what lies between text and training: the record format and the manifest.

A prepared folder holds `manifest.json` and, for each split, ArrayRecord files. A record is one row of T = `seq_len`
tokens:

    T token ids    uint16 where the vocabulary has at most 65,536 ids, else uint32; little-endian
    run lengths    uint32, little-endian, one for each document piece in the row, in order

The runs cut the row into its documents (segments 1, 2, ...); what they leave over at the end is padding (segment 0,
id 0). A document ends with the end-of-text token; one that does not fit goes on in the next row, as a segment there.
Targets are the next tokens of the same segment, so the last token of a row has none.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from falcon_relu.checkpoints.schema import parse, unseal
from falcon_relu.errors import FalconError, check_number, check_seed
from falcon_relu.files import read_json, write_aside, write_json

FORMAT = 3
SPLITS = ("train", "validation")
MAX_SEQ_LEN = 1 << 20  # a row is held and checked whole, and padded to this length
MAX_VOCABULARY = 1 << 31  # token ids are int32
_ABOUT_INPUTS = ("sources", "bad_lines", "bad_examples")  # fields that the rows do not depend on
_RUN_DTYPE = np.dtype("<u4")
PREPARE = "falcon-relu prepare"
_ONE_ROW_A_GROUP = "group_size:1"  # so that rows can be read in any order


@dataclasses.dataclass(frozen=True)
class Shard:
    """One ArrayRecord file: its name in the folder, how many rows and bytes it has, CRC-32 of its records in order."""

    file: str
    rows: int
    bytes: int
    crc32: int

    def __post_init__(self) -> None:
        if not self.file or Path(self.file).name != self.file:
            raise FalconError(f"{self.file!r} is no file name")
        check_number(f"rows of {self.file}", self.rows, low=1)
        check_number(f"bytes of {self.file}", self.bytes, low=1)


@dataclasses.dataclass(frozen=True)
class Split:
    """What a split holds; `tokens` counts the end-of-text tokens and not the padding."""

    rows: int
    tokens: int
    documents: int
    shards: tuple[Shard, ...]

    def __post_init__(self) -> None:
        if self.rows != sum(shard.rows for shard in self.shards):
            raise FalconError(f"{self.rows} rows are not what {len(self.shards)} shards hold together")
        if not 0 <= self.documents <= self.tokens:
            raise FalconError(f"a split cannot have {self.documents} documents in {self.tokens} tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a prepared folder holds, and what it was made from.

    Attributes:
      seq_len: T, tokens in a row.
      vocab_size: of the tokenizer.
      eos_id: the end-of-text token.
      tokenizer_sha256: hash of the tokenizer.json.
      seed: of the draw of the validation documents.
      validation_fraction: share of documents that went to the validation split.
      sources: the inputs, as they were given.
      splits: "train" and "validation".
      bad_lines: how many lines or rows could not be used.
      bad_examples: `file:line: reason` for the first of them.

    Raises:
      FalconError: a field is out of range, or two do not agree.
    """

    seq_len: int
    vocab_size: int
    eos_id: int
    tokenizer_sha256: str
    seed: int
    validation_fraction: float
    sources: tuple[str, ...]
    splits: Mapping[str, Split]
    bad_lines: int
    bad_examples: tuple[str, ...]

    def __post_init__(self) -> None:
        check_number("seq_len", self.seq_len, low=2, high=MAX_SEQ_LEN)
        check_number("vocab_size", self.vocab_size, low=1, high=MAX_VOCABULARY)
        check_number("eos_id", self.eos_id, low=0, high=self.vocab_size - 1)
        check_number("bad_lines", self.bad_lines, low=len(self.bad_examples))
        check_seed("seed", self.seed)
        if sorted(self.splits) != sorted(SPLITS):
            raise FalconError(f"splits must be {' and '.join(SPLITS)}, got {sorted(self.splits)}")
        for name, split in self.splits.items():
            if split.tokens > split.rows * self.seq_len:
                raise FalconError(f"{split.tokens} {name} tokens do not fit {split.rows} rows of {self.seq_len}")

    def to_json(self) -> dict[str, Any]:
        """The content of `manifest.json`."""
        return {"format": FORMAT} | dataclasses.asdict(self)

    def digest(self) -> str:
        """A hash of what the folder holds, the same wherever it and the text lie."""
        content = {name: value for name, value in self.to_json().items() if name not in _ABOUT_INPUTS}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def manifest_path(folder: Path) -> Path:
    """Where a folder keeps its manifest."""
    return Path(folder) / "manifest.json"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared folder, with every shard's presence and size checked.

    Raises:
      FalconError: the folder was not prepared to its end, its manifest is damaged, or shards are missing or cut short.
    """
    path = manifest_path(folder)
    if not path.exists():
        raise FalconError(
            f"{folder} holds no finished token shards (no manifest.json): run `falcon-relu prepare` first"
        )
    value = read_sealed(path, FORMAT, f"the same `{PREPARE}` again")
    manifest = parse(Manifest, value, path)
    for split in manifest.splits.values():
        for shard in split.shards:
            check_shard(Path(folder), shard, PREPARE)
    return manifest


def write_shared(path: Path, value: Mapping[str, Any], job: int) -> None:
    """Writes JSON that other jobs of an array may write at the same moment: each renames a file of its own.

    Args:
      path: the file.
      value: the same in all jobs.
      job: which of them this is.
    """
    own = path.with_suffix(f".{job}.json")
    write_json(own, value)
    own.replace(path)


def read_sealed(path: Path, form: int, again: str) -> dict[str, Any]:
    """What was given to `schema.seal`, without its format.

    Args:
      path: the manifest.
      form: the one format that is known.
      again: the command that writes it again.

    Raises:
      FalconError: the file is of another format, or was changed since.
    """
    value = read_json(path)
    if not isinstance(value, dict) or value.get("format") != form:
        raise FalconError(f"{path} is not a manifest of format {form}: remove it and run {again}")
    content = unseal(value, path, f"copy it again, or remove it and run {again}")
    del content["format"]
    return content


def check_shard(folder: Path, shard: Shard, command: str) -> None:
    """Makes sure that a shard is there, and whole by its size.

    Args:
      folder: where it lies.
      shard: what its manifest says of it.
      command: that made it, for the error.

    Raises:
      FalconError: it is not.
    """
    path = folder / shard.file
    if not path.is_file():
        raise FalconError(f"{path} is missing: copy it again, or run the same `{command}` again")
    if path.stat().st_size != shard.bytes:
        raise FalconError(
            f"{path} has {path.stat().st_size:,} bytes, not the {shard.bytes:,} of its manifest: remove it and run the "
            f"same `{command}` again"
        )


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def encode_row(tokens_T: np.ndarray, runs: np.ndarray) -> bytes:
    """One record: token ids of `token_dtype`, then the lengths of the document pieces."""
    return tokens_T.tobytes() + runs.astype(_RUN_DTYPE).tobytes()


def decode_row(record: bytes, seq_len: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [T] and the lengths of the document pieces of one record.

    Raises:
      FalconError: the record is not a row of `seq_len` tokens of this vocabulary.
    """
    dtype = token_dtype(vocab_size)
    token_bytes = seq_len * dtype.itemsize
    if len(record) < token_bytes or (len(record) - token_bytes) % _RUN_DTYPE.itemsize:
        raise FalconError(f"a record of {len(record)} bytes is no row of {seq_len} {dtype.name} tokens")
    tokens_T = np.frombuffer(record, dtype, count=seq_len)
    runs = np.frombuffer(record, _RUN_DTYPE, offset=token_bytes)
    if not runs.all() or int(runs.sum(dtype=np.int64)) > seq_len:
        raise FalconError(f"a record's documents do not fit a row of {seq_len} tokens")
    if tokens_T.max() >= vocab_size:
        raise FalconError(f"a record holds the token id {tokens_T.max()}, beyond the vocabulary of {vocab_size}")
    return tokens_T, runs


def write_shard(path: Path, rows: Iterable[tuple[np.ndarray, np.ndarray]]) -> Shard:
    """Writes rows (token ids [T], lengths of the document pieces) as `write_records` does."""
    return write_records(path, (encode_row(tokens_T, runs) for tokens_T, runs in rows))


def write_records(path: Path, records: Iterable[bytes]) -> Shard:
    """Writes an ArrayRecord file whose records can be read in any order, whole or not at all.

    Raises:
      FalconError: the file could not be written whole.
    """
    count = crc = 0
    with write_aside(path, replace=True) as aside:
        try:
            writer = ArrayRecordWriter(str(aside), _ONE_ROW_A_GROUP)
            for record in records:
                writer.write(record)
                count += 1
                crc = zlib.crc32(record, crc)
            writer.close()
            written = _count(aside)
        except (OSError, RuntimeError, ValueError) as error:
            raise FalconError(f"could not write {path} (disk full?): {error}") from None
        if written != count:
            raise FalconError(f"could not write {path}: {written} of {count} rows can be read back")
        size = aside.stat().st_size
    return Shard(path.name, count, size, crc)


def _count(path: Path) -> int:
    reader = ArrayRecordReader(str(path))
    try:
        return reader.num_records()
    finally:
        reader.close()


def pack(documents: Sequence[np.ndarray], seq_len: int) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Lays documents end to end and cuts them into rows: every token is kept, only the last row is padded.

    Args:
      documents: token ids of each, not empty, end-of-text included.
      seq_len: T.

    Yields:
      (token ids [T], lengths of the document pieces in the row).
    """
    if not documents:
        return
    tokens = np.concatenate(documents)
    ends = np.cumsum([len(document) for document in documents])
    cuts = np.union1d(ends, np.arange(seq_len, len(tokens), seq_len))
    runs = np.diff(cuts, prepend=0)
    row_of_run = (cuts - 1) // seq_len
    rows = -(-len(tokens) // seq_len)
    tokens_RxT = np.pad(tokens, (0, rows * seq_len - len(tokens))).reshape(rows, seq_len)
    yield from zip(tokens_RxT, np.split(runs, np.searchsorted(row_of_run, np.arange(1, rows))), strict=True)
