"""Caching a teacher's top-k log-probabilities for token shards, so that training need not run the teacher.

The format is in `train.data.teacher_shards`. The unit of work is a file of token shards: it is finished once its record
in `units/` exists, and a later call keeps the finished ones. The jobs of an array divide the files among them; the job
that finds all files finished writes the manifest.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from array_record.python.array_record_module import ArrayRecordReader
from jax.sharding import Mesh

from falcon_relu.checkpoints.load import load_model
from falcon_relu.checkpoints.schema import read_as, seal
from falcon_relu.config import Activation
from falcon_relu.errors import FalconError, check_number, check_part
from falcon_relu.files import lock_part, read_json
from falcon_relu.model import Falcon, Params, head_kernel, join_chunks, largest_divisor, next_tokens, split_chunks
from falcon_relu.progress import progress
from falcon_relu.sharding import batch_sharding, check_shared, make_mesh, on_host, param_shardings, place, use_mesh
from train.data.batches import Batch, unpack
from train.data.shards import (
    Manifest,
    Shard,
    check_shard,
    decode_row,
    manifest_path,
    read_manifest,
    token_dtype,
    write_records,
    write_shared,
)
from train.data.teacher_shards import TEACHER_CACHE, LogProbDtype, TeacherManifest, encode_targets
from train.distributed import of_first
from train.folder.checkpoints import fingerprint
from train.loss import CachedTeacher

# (teacher's parameters, batch) -> (its top-k targets, logsumexp of its logits [B, T]).
_Predict = Callable[[Params, Batch], tuple[CachedTeacher, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherCacheConfig:
    """Which teacher to cache for which tokens, and how.

    Attributes:
      teacher: native weights, Hugging Face folder or hub id.
      tokens: folders of token shards that `falcon-relu prepare` finished; each gets its own cache.
      name: name of the folder that is made in each of them.
      teacher_activation: the teacher's activation, if its config does not state it.
      top_k: k, the number of tokens whose log-probabilities are kept at each position; all others are one bucket.
      temperature: the temperature of the distillation; a cache can also be used at temperature 1.
      dtype: of the stored log-probabilities.
      compute_dtype: of the teacher's parameters and products.
      batch_size: rows that the teacher processes at a time.
      chunk: positions of each row whose logits are computed at a time.
      query_chunk: queries that attention processes at a time; None for all.
      mesh: devices along (data, fsdp, tensor); a -1 takes the devices that are left.

    Raises:
      FalconError: a field is out of range; the message names it.
    """

    teacher: str
    tokens: tuple[Path, ...]
    name: str = "teacher"
    teacher_activation: Activation | None = None
    top_k: int = 64
    temperature: float = 1.0
    dtype: LogProbDtype = "bfloat16"
    compute_dtype: LogProbDtype = "bfloat16"
    batch_size: int = 8
    chunk: int = 256
    query_chunk: int | None = None
    mesh: tuple[int, int, int] = (1, -1, 1)

    def __post_init__(self) -> None:
        for field in ("top_k", "batch_size", "chunk"):
            check_number(field, getattr(self, field), low=1)
        if self.query_chunk is not None:
            check_number("query_chunk", self.query_chunk, low=1)
        check_number("temperature", self.temperature, above=0)
        if not self.tokens:
            raise FalconError("no folder of token shards given")
        if self.name in ("", ".", "..", "units") or Path(self.name).name != self.name:
            raise FalconError(f"name must be a folder's name, not a path, got {self.name!r}")


class Cached(NamedTuple):
    """The result of a call.

    Attributes:
      manifests: of each folder; None where other jobs' files are not finished, and in processes other than the first.
      new_rows: number of rows that the teacher processed.
      bytes: number of bytes written.
      seconds: duration, loading included.
    """

    manifests: tuple[TeacherManifest | None, ...]
    new_rows: int
    bytes: int
    seconds: float


def write_teacher_cache(config: TeacherCacheConfig, shard: tuple[int, int] = (0, 1)) -> Cached:
    """Runs the teacher over all rows of `config.tokens` and stores its top-k targets; finished files are kept.

    Every process of a job calls it, with the same arguments; the first one writes.

    Args:
      config: which teacher, which tokens, and how.
      shard: (i, n): this job's part, every n-th file from the i-th on, counted from 0.

    Raises:
      FalconError: an input is missing, damaged or does not fit; the cache was begun with other settings, tokens or
        teacher; or another process works on the same part.
    """
    started = time.monotonic()
    index, count = shard
    check_part(shard)
    tokens = [read_manifest(folder) for folder in config.tokens]
    mesh = make_mesh(config.mesh)
    check_shared(mesh, config.batch_size)
    first = jax.process_index() == 0
    dtype = jnp.dtype(config.compute_dtype)
    with use_mesh(mesh), contextlib.ExitStack() as locks:
        for path in config.tokens if first else ():
            locks.enter_context(lock_part(Path(path) / config.name, index, count))
        architecture, params = load_model(config.teacher, activation=config.teacher_activation, dtype=dtype, mesh=mesh)
        if architecture.vocab_size < max(config.top_k, *(manifest.vocab_size for manifest in tokens)):
            raise FalconError(
                f"the teacher's vocabulary of {architecture.vocab_size} is smaller than the tokenizer's, or than top_k"
            )
        digest = hashlib.sha256(json.dumps(fingerprint(params), sort_keys=True).encode()).hexdigest()
        teacher = {"source": config.teacher, "config": dataclasses.asdict(architecture), "weights": digest}
        predict = _make_predict(Falcon(architecture, dtype, query_chunk=config.query_chunk), config, mesh)
        folders = [
            _Folder(config, path, manifest, teacher, job=index)
            for path, manifest in zip(config.tokens, tokens, strict=True)
        ]
        own = [(folder, file) for folder in folders for file in folder.files()][index::count]
        unfinished = [first and not folder.is_finished(file) for folder, file in own]
        unfinished = of_first(unfinished, "a look at what is cached")  # the others may see an older state of the disk
        missing = [one for one, wanted in zip(own, unfinished, strict=True) if wanted]
        rows, all_rows = (sum(file.rows for _, file in files) for files in (missing, own))
        size = 0
        with progress("teacher-cache", all_rows, "tokens", scale=tokens[0].seq_len, done=all_rows - rows) as advance:
            for folder, file in missing:
                size += folder.write(file, functools.partial(predict, params), advance)
        manifests = tuple(folder.finish() if first else None for folder in folders)
    return Cached(manifests, rows, size, time.monotonic() - started)


def top_k_targets(
    hidden_BxTxD: jax.Array, head_VxD: jax.Array, targets_BxT: jax.Array, *, top_k: int, temperature: float, chunk: int
) -> tuple[CachedTeacher, jax.Array]:
    """A teacher's targets from its final hidden states, and the logsumexp of its logits [B, T].

    Products are in the dtype of the hidden states, all else in float32. B x chunk x V logits are held at a time.

    Args:
      hidden_BxTxD: final hidden states.
      head_VxD: vocabulary head.
      targets_BxT: next tokens.
      top_k: k.
      temperature: T of the second column of `CachedTeacher.log_rest_BxTx2`.
      chunk: positions processed at a time.
    """
    head = head_VxD.astype(hidden_BxTxD.dtype)

    def of_chunk(piece: tuple[jax.Array, jax.Array]) -> tuple[CachedTeacher, jax.Array]:
        h_BxCxD, targets_BxC = piece
        logits = jnp.einsum("bcd,vd->bcv", h_BxCxD, head, preferred_element_type=jnp.float32)
        total_BxC = jax.nn.logsumexp(logits, axis=-1)
        log_p_BxCxV = logits - total_BxC[..., None]
        top_BxCxk, ids_BxCxk = jax.lax.top_k(log_p_BxCxV, top_k)
        drop = jax.vmap(jax.vmap(lambda row_V, ids_k: row_V.at[ids_k].set(-jnp.inf)))
        others_BxCxV = drop(log_p_BxCxV, ids_BxCxk)
        rest = [jax.nn.logsumexp(others_BxCxV / t, axis=-1) for t in (1.0, temperature)]
        log_next_BxC = jnp.take_along_axis(log_p_BxCxV, targets_BxC[..., None], axis=-1)[..., 0]
        return CachedTeacher(ids_BxCxk, top_BxCxk, jnp.stack(rest, axis=-1), log_next_BxC), total_BxC

    size = largest_divisor(hidden_BxTxD.shape[1], chunk)
    return join_chunks(jax.lax.map(of_chunk, split_chunks((hidden_BxTxD, targets_BxT), size)))


def _make_predict(teacher: Falcon, config: TeacherCacheConfig, mesh: Mesh) -> _Predict:
    def predict(params: Params, batch: Batch) -> tuple[CachedTeacher, jax.Array]:
        rows: Any = batch
        tokens, segments = rows["tokens_BxT"], rows["segment_ids_BxT"]
        hidden: Any = teacher.apply({"params": params}, tokens, rows["positions_BxT"], segments, method="hidden")
        head, (targets_BxT, _) = head_kernel(teacher.config, params), next_tokens(tokens, segments)
        targets, total_BxT = top_k_targets(
            hidden, head, targets_BxT, top_k=config.top_k, temperature=config.temperature, chunk=config.chunk
        )
        ids = targets.ids_BxTxk.astype(token_dtype(teacher.config.vocab_size))
        log_probs = targets.log_probs_BxTxk.astype(config.dtype)
        return dataclasses.replace(targets, ids_BxTxk=ids, log_probs_BxTxk=log_probs), total_BxT

    rows = batch_sharding(mesh)
    jitted = jax.jit(predict, in_shardings=(param_shardings(teacher.config, mesh), rows))
    return lambda params, batch: jitted(params, jax.tree.map(lambda array: place(array, rows), batch))


class _Folder:
    """The cache of one folder of token shards."""

    def __init__(
        self, config: TeacherCacheConfig, tokens_path: Path, tokens: Manifest, teacher: dict[str, Any], job: int
    ):
        """Makes the folder, or checks that it was begun with the same tokens, teacher and settings."""
        self._config, self._tokens_path, self._tokens, self._job = config, Path(tokens_path), tokens, job
        self.path = self._tokens_path / config.name
        self._manifest = TeacherManifest(
            top_k=config.top_k,
            dtype=config.dtype,
            temperature=config.temperature,
            seq_len=tokens.seq_len,
            vocab_size=teacher["config"]["vocab_size"],
            teacher=teacher,
            tokens=tokens.digest(),
            splits={},
        )
        if jax.process_index():
            return  # the first process writes
        path, settings = self.path / "settings.json", self._manifest.to_json()
        if path.exists():
            found = read_json(path)
            known = found if isinstance(found, dict) else {}
            before = known.get("teacher")
            if isinstance(before, dict):
                before["source"] = teacher["source"]  # the same weights may have moved
            changed = [name for name in settings if known.get(name) != settings[name]]
            if changed:
                raise FalconError(
                    f"{self.path} was begun with other settings ({', '.join(changed)}): choose another --name, or "
                    "remove it"
                )
        else:
            write_shared(path, settings, self._job)

    def files(self) -> Iterator[Shard]:
        """The files of token shards, of all splits."""
        for split in self._tokens.splits.values():
            yield from split.shards

    def is_finished(self, file: Shard) -> bool:
        """Whether the targets of a file of token shards are stored and undamaged."""
        unit = self._unit(file)
        if not unit.exists():
            return False
        try:
            check_shard(self.path, self._read(unit, file), TEACHER_CACHE)
        except FalconError:
            return False  # damaged or missing, and written again
        return True

    def write(self, file: Shard, predict: Callable[[Batch], tuple[CachedTeacher, jax.Array]], advance: Any) -> int:
        """Stores the targets of a file of token shards; returns the number of bytes that this process wrote."""
        if jax.process_index():
            collections.deque(self._records(file, predict, advance), maxlen=0)
            return 0
        written = write_records(self.path / file.file, self._records(file, predict, advance))
        write_shared(self._unit(file), dataclasses.asdict(written), self._job)
        return written.bytes

    def finish(self) -> TeacherManifest | None:
        """Writes the manifest if all files are finished."""
        if not all(self._unit(file).exists() for file in self.files()):
            return None
        splits = {
            name: tuple(self._read(self._unit(file), file) for file in split.shards)
            for name, split in self._tokens.splits.items()
        }
        manifest = dataclasses.replace(self._manifest, splits=splits)
        write_shared(manifest_path(self.path), seal(manifest.to_json()), self._job)
        return manifest

    def _unit(self, file: Shard) -> Path:
        return self.path / "units" / f"{file.file}.json"

    def _read(self, unit: Path, file: Shard) -> Shard:
        """The record in `units/` of the targets of a file of token shards."""
        written = read_as(Shard, unit)
        if (written.file, written.rows) != (file.file, file.rows):
            raise FalconError(f"{unit} belongs to another file: remove it and run the same `{TEACHER_CACHE}` again")
        return written

    def _records(
        self, file: Shard, predict: Callable[[Batch], tuple[CachedTeacher, jax.Array]], advance: Any
    ) -> Iterator[bytes]:
        """The records of a file, each batch fetched while the next one is computed."""
        records = _read_records(self._tokens_path / file.file)
        pending: list[tuple[list[bytes], tuple[CachedTeacher, jax.Array]]] = []
        for start in range(0, len(records), self._config.batch_size):
            now = records[start : start + self._config.batch_size]
            pending.append((now, predict(self._batch(now))))
            if len(pending) > 1:
                yield from _encode(*pending[0])
                advance(len(pending.pop(0)[0]))
        for before, predicted in pending:
            yield from _encode(before, predicted)
            advance(len(before))

    def _batch(self, records: list[bytes]) -> Batch:
        rows = [decode_row(record, self._tokens.seq_len, self._tokens.vocab_size) for record in records]
        return unpack([*rows, *[None] * (self._config.batch_size - len(rows))], self._tokens.seq_len)


def _read_records(path: Path) -> list[bytes]:
    reader = ArrayRecordReader(str(path))
    try:
        records: list[bytes] = reader.read_all()
    except (RuntimeError, ValueError) as error:
        raise FalconError(f"cannot read {path}: {error}; copy it again, or prepare the text again") from None
    finally:
        reader.close()
    return records


def _encode(records: list[bytes], predicted: tuple[CachedTeacher, jax.Array]) -> Iterator[bytes]:
    targets, total_BxT = on_host(predicted)
    for b, record in enumerate(records):
        row: Any = {name: array[b] for name, array in vars(targets).items()}
        yield encode_targets(row, total_BxT[b], record)
