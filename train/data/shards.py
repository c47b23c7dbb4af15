"""Token shards, the prepared form of training text: record format and manifest.

A prepared folder holds `manifest.json` and, for each split, ArrayRecord files. A record is one row of T = `seq_len`
tokens:

    T token ids    uint16 where the vocabulary has at most 65,536 ids, else uint32; little-endian
    run lengths    uint32, little-endian, one for each document piece in the row, in order

The run lengths divide the row into documents (segments 1, 2, ...); tokens after the last run are padding (segment 0,
id 0). A document ends with the end-of-text token; one that does not fit continues in the next row, as a segment there.
The target of a token is the next token of its segment, so the last token of a row has none.
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
_ONE_ROW_A_GROUP = "group_size:1"  # for random access: ArrayRecord decompresses whole groups


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
    """Size and files of a split; `tokens` counts end-of-text tokens but not padding."""

    rows: int
    tokens: int
    documents: int
    shards: tuple[Shard, ...]

    def __post_init__(self) -> None:
        if self.rows != sum(shard.rows for shard in self.shards):
            raise FalconError(f"{self.rows} rows are not the sum over its {len(self.shards)} shards")
        if not 0 <= self.documents <= self.tokens:
            raise FalconError(f"a split cannot have {self.documents} documents in {self.tokens} tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of a prepared folder, and what it was made from.

    Attributes:
      seq_len: T, tokens in a row.
      vocab_size: of the tokenizer.
      eos_id: the end-of-text token.
      tokenizer_sha256: hash of the tokenizer.json.
      seed: of the choice of validation documents.
      validation_fraction: share of documents in the validation split.
      sources: the inputs, as given.
      splits: "train" and "validation".
      bad_lines: number of input lines or rows that could not be used.
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
        """A hash of the folder's content; it does not depend on the paths of the folder and the text."""
        content = {name: value for name, value in self.to_json().items() if name not in _ABOUT_INPUTS}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def manifest_path(folder: Path) -> Path:
    """The path of a folder's manifest."""
    return Path(folder) / "manifest.json"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared folder, after a check that every shard exists and has the right size.

    Raises:
      FalconError: the folder is not finished, its manifest is damaged, or shards are missing or of another size.
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
    """Writes JSON that other jobs of an array may write at the same time: each renames a file of its own.

    Args:
      path: the file.
      value: the content, the same in all jobs.
      job: number of this job.
    """
    own = path.with_suffix(f".{job}.json")
    write_json(own, value)
    own.replace(path)


def read_sealed(path: Path, form: int, again: str) -> dict[str, Any]:
    """Reads JSON that `schema.seal` gave a checksum, without its "format".

    Args:
      path: the manifest.
      form: the supported format number.
      again: the command that writes the file again, for the error.

    Raises:
      FalconError: the file has another format, or does not match its checksum.
    """
    value = read_json(path)
    if not isinstance(value, dict) or value.get("format") != form:
        raise FalconError(f"{path} is not a manifest of format {form}: remove it and run {again}")
    content = unseal(value, path, f"copy it again, or remove it and run {again}")
    del content["format"]
    return content


def check_shard(folder: Path, shard: Shard, command: str) -> None:
    """Checks that a shard exists and has the size that its manifest states.

    Args:
      folder: the shard's folder.
      shard: its entry in the manifest.
      command: the command that made it, for the error.

    Raises:
      FalconError: it is missing or has another size.
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
    """The smallest dtype for the ids of a vocabulary."""
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
    """Writes an ArrayRecord file for random access; the file appears only once it is complete.

    Raises:
      FalconError: the file could not be written completely.
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
    """Concatenates documents and cuts them into rows: every token is kept, only the last row is padded.

    Args:
      documents: token ids of each document, not empty, end-of-text included.
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
