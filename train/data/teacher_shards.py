"""Teacher shards, the cached top-k predictions of a teacher for token shards: record format and manifest.

They lie in a folder of their own within the folder of the token shards: a `manifest.json`, and for each file of token
shards a file of the same name with as many records. Record i belongs to row i. With T = `seq_len` positions, V the
vocabulary size and k = `top_k`; little-endian, no padding:

    token ids            [T, k] uint16 where V is at most 65,536, else uint32; likeliest first
    log-probabilities    [T, k] bfloat16 or float32, at temperature 1
    log-sum-exp          [T] float32, of the teacher's logits: logit = log-probability + log-sum-exp
    next                 [T] float32, log-probability of the row's next token, whether or not it is among the k
    rest                 [T, 2] float32, log of the sum over all other tokens of p and of p^(1/temperature), p at
                         temperature 1; -inf where k = V
    CRC-32               uint32, of the row's record in the token shards

The second column of `rest` gives the distribution at that temperature: a token of log-probability l has the probability
exp(l / temperature) / Z and the rest exp(rest) / Z, where Z normalises the sum to 1.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict

import ml_dtypes
import numpy as np

from falcon_relu.checkpoints.schema import parse
from falcon_relu.errors import FalconError, check_number
from train.data.shards import (
    MAX_SEQ_LEN,
    MAX_VOCABULARY,
    Manifest,
    Shard,
    check_shard,
    manifest_path,
    read_sealed,
    token_dtype,
)

FORMAT = 2
TEACHER_CACHE = "falcon-relu teacher-cache"
LogProbDtype = Literal["bfloat16", "float32"]
_FLOATS = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype("<f4")}
_CRC_BYTES = 4


class Targets(TypedDict):
    """The fields of `train.loss.CachedTeacher` as numpy arrays, of one row (T) or of a batch (B, T)."""

    ids_BxTxk: np.ndarray
    log_probs_BxTxk: np.ndarray
    log_rest_BxTx2: np.ndarray
    log_next_BxT: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherManifest:
    """What a folder of teacher shards holds, and what it was made from.

    Attributes:
      top_k: k.
      dtype: of the log-probabilities.
      temperature: of the second column of `rest`.
      seq_len: T.
      vocab_size: V, of the teacher, which may be larger than the tokenizer's.
      teacher: the teacher's source, architecture, and a fingerprint of its weights.
      tokens: `Manifest.digest()` of the token shards.
      splits: the files of each split, in the order of the token shards.

    Raises:
      FalconError: a field is out of range.
    """

    top_k: int
    dtype: LogProbDtype
    temperature: float
    seq_len: int
    vocab_size: int
    teacher: Mapping[str, Any]
    tokens: str
    splits: Mapping[str, tuple[Shard, ...]]

    def __post_init__(self) -> None:
        check_number("vocab_size", self.vocab_size, low=1, high=MAX_VOCABULARY)
        check_number("top_k", self.top_k, low=1, high=self.vocab_size)
        check_number("temperature", self.temperature, above=0)
        check_number("seq_len", self.seq_len, low=2, high=MAX_SEQ_LEN)
        if not isinstance(self.teacher.get("weights"), str):
            raise FalconError("teacher.weights must be the fingerprint of the teacher's weights")

    def to_json(self) -> dict[str, Any]:
        """The content of `manifest.json`."""
        return {"format": FORMAT} | dataclasses.asdict(self)

    def digest(self) -> str:
        """A hash of the folder's content; it does not depend on the paths of folder and teacher."""
        content = {name: value for name, value in self.to_json().items() if name != "teacher"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def targets(self, rows: int) -> Targets:
        """Placeholder arrays for `rows` rows, to be filled in or masked out."""
        shape = (rows, self.seq_len)
        return Targets(
            ids_BxTxk=np.broadcast_to(np.arange(self.top_k, dtype=np.int32), (*shape, self.top_k)).copy(),
            log_probs_BxTxk=np.zeros((*shape, self.top_k), _FLOATS[self.dtype]),
            log_rest_BxTx2=np.zeros((*shape, 2), np.float32),
            log_next_BxT=np.zeros(shape, np.float32),
        )


def read_teacher_manifest(folder: Path, tokens: Manifest) -> TeacherManifest:
    """The manifest of a folder of teacher shards, checked to be complete and to belong to the token shards.

    Raises:
      FalconError: the folder is unfinished or damaged, or belongs to other token shards.
    """
    path = manifest_path(folder)
    if not path.exists():
        raise FalconError(f"{folder} holds no finished teacher shards: run `falcon-relu teacher-cache` first")
    value = read_sealed(path, FORMAT, f"the same `{TEACHER_CACHE}` again")
    manifest = parse(TeacherManifest, value, path)
    counts = {name: [(shard.file, shard.rows) for shard in shards] for name, shards in manifest.splits.items()}
    belongs = {name: [(shard.file, shard.rows) for shard in split.shards] for name, split in tokens.splits.items()}
    if manifest.tokens != tokens.digest() or manifest.seq_len != tokens.seq_len or counts != belongs:
        raise FalconError(
            f"{folder} was written for other token shards than those that lie beside it: remove it and run "
            "`falcon-relu teacher-cache` again"
        )
    for shards in manifest.splits.values():
        for shard in shards:
            check_shard(folder, shard, TEACHER_CACHE)
    return manifest


def encode_targets(row: Targets, logsumexp_T: np.ndarray, tokens_record: bytes) -> bytes:
    """One record, from arrays without B; `log_probs_BxTxk` are stored in the dtype that they have."""
    ids_Txk = row["ids_BxTxk"]
    floats = (logsumexp_T, row["log_next_BxT"], row["log_rest_BxTx2"])
    return b"".join(
        (
            ids_Txk.tobytes(),
            row["log_probs_BxTxk"].tobytes(),
            *(array.astype("<f4").tobytes() for array in floats),
            zlib.crc32(tokens_record).to_bytes(_CRC_BYTES, "little"),
        )
    )


def decode_targets(record: bytes, manifest: TeacherManifest, tokens_record: bytes) -> Targets:
    """The teacher's targets for one row.

    Raises:
      FalconError: the record does not have the manifest's format, or does not belong to that row.
    """
    T, k = manifest.seq_len, manifest.top_k
    fields: Iterable[tuple[str, np.dtype, tuple[int, ...]]] = (
        ("ids_BxTxk", token_dtype(manifest.vocab_size), (T, k)),
        ("log_probs_BxTxk", _FLOATS[manifest.dtype], (T, k)),
        ("logsumexp", np.dtype("<f4"), (T,)),
        ("log_next_BxT", np.dtype("<f4"), (T,)),
        ("log_rest_BxTx2", np.dtype("<f4"), (T, 2)),
    )
    sizes = [int(np.prod(shape)) * dtype.itemsize for _, dtype, shape in fields]
    if len(record) != sum(sizes) + _CRC_BYTES:
        raise FalconError(f"a record of {len(record)} bytes is no top {k} of {T} positions")
    if int.from_bytes(record[-_CRC_BYTES:], "little") != zlib.crc32(tokens_record):
        raise FalconError("the teacher's record is of another row")
    found, place = {}, 0
    for (name, dtype, shape), size in zip(fields, sizes, strict=True):
        found[name] = np.frombuffer(record, dtype, int(np.prod(shape)), place).reshape(shape)
        place += size
    del found["logsumexp"]
    if found["ids_BxTxk"].max() >= manifest.vocab_size:
        raise FalconError(f"a record holds a token id beyond the vocabulary of {manifest.vocab_size}")
    targets: Any = found
    return targets
