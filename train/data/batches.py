"""Token shards to batches: a mixture of sources through Grain, shuffled, resumable, for any number of processes.

The order of rows is a cheap pipeline of row addresses. Only its last step reads records, and a process reads only its
own rows of a batch: the global batch is the same whatever the process count, and a position in the data is one number.
"""

from __future__ import annotations

import contextlib
import dataclasses
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict

import grain
import numpy as np

from falcon_relu.errors import FalconError, check_number, check_seed
from train.data.shards import MAX_SEQ_LEN, Manifest, Shard, decode_row, read_manifest
from train.data.teacher_shards import Targets, TeacherManifest, decode_targets, read_teacher_manifest

_OTHER_FILES = 512  # open at a time, at most: libraries, sockets, checkpoints
Address = tuple[int, int]  # (source, row)
Row = tuple[np.ndarray, np.ndarray]  # token ids [T], lengths of the document pieces


class Batch(TypedDict):
    """Rows of packed documents; int32 [B, T] each.

    tokens_BxT: token ids, 0 where padded. segment_ids_BxT: 1, 2, ... for the documents of a row, 0 where padded.
    positions_BxT: 0, 1, ... within each document, 0 where padded. teacher: a cached teacher's targets, where the run
    distils from one.
    """

    tokens_BxT: np.ndarray
    segment_ids_BxT: np.ndarray
    positions_BxT: np.ndarray
    teacher: NotRequired[Targets]


@dataclasses.dataclass(frozen=True)
class Source:
    """One folder of token shards.

    Attributes:
      path: a folder that `falcon-relu prepare` finished.
      weight: its proportion of the rows, relative to the other sources' weights.
    """

    path: Path
    weight: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data of a run.

    Attributes:
      sources: folders of token shards and their weights.
      seq_len: T; must be that of the shards.
      batch_size: B, rows in a global batch, over all processes.
      seed: of the order of rows.
      teacher_cache: name of the folder in each source where `falcon-relu teacher-cache` stored the teacher's targets;
        None for no cached teacher.
      threads: number of threads that read ahead.
      prefetch: number of batches read ahead, at least one a thread.

    Raises:
      FalconError: a field is out of range; the message names it.
    """

    sources: tuple[Source, ...]
    seq_len: int = 2048
    batch_size: int = 8
    seed: int = 0
    teacher_cache: str | None = None
    threads: int = 2
    prefetch: int = 8

    def __post_init__(self) -> None:
        if not self.sources:
            raise FalconError("DataConfig.sources is empty: name at least one folder of token shards")
        for source in self.sources:
            check_number(f"DataConfig.sources: the weight of {source.path}", source.weight, above=0)
        check_number("DataConfig.seq_len", self.seq_len, low=1, high=MAX_SEQ_LEN)
        for name in ("batch_size", "threads", "prefetch"):
            check_number(f"DataConfig.{name}", getattr(self, name), low=1)
        if self.prefetch < self.threads:
            raise FalconError(f"DataConfig.prefetch must be at least threads ({self.threads}), got {self.prefetch}")
        check_seed("DataConfig.seed", self.seed)
        if self.teacher_cache is not None and Path(self.teacher_cache).name != self.teacher_cache:
            raise FalconError(f"DataConfig.teacher_cache must be a folder's name, got {self.teacher_cache!r}")


class Manifests(NamedTuple):
    """The manifests of a config's folders.

    Attributes:
      tokens: of each source's token shards.
      teachers: of each source's teacher shards; empty without a cached teacher.
    """

    tokens: list[Manifest]
    teachers: list[TeacherManifest]

    @property
    def vocab_size(self) -> int:
        """Number of entries in the tokenizer's vocabulary."""
        return self.tokens[0].vocab_size

    def rows(self, split: str) -> int:
        """Number of rows of a split, over all sources."""
        return sum(manifest.splits[split].rows for manifest in self.tokens)

    def digests(self) -> dict[str, str]:
        """A hash of each folder's content, whatever its path; a resumed run compares them."""
        tokens = {f"source {i}": manifest.digest() for i, manifest in enumerate(self.tokens)}
        return tokens | {f"source {i}'s teacher": teacher.digest() for i, teacher in enumerate(self.teachers)}


def read_manifests(config: DataConfig) -> Manifests:
    """The manifests of all folders, checked against the config and each other.

    Raises:
      FalconError: a folder is unfinished, damaged or of another row length; or two were made by different tokenizers,
        or by different teachers, or with different settings of the teacher's cache.
    """
    return _fitting(config, [read_manifest(source.path) for source in config.sources])


def open_folders(paths: Sequence[Path], batch_size: int) -> tuple[DataConfig, Manifests]:
    """A config that reads folders of token shards as they are, and their manifests, to measure on.

    Raises:
      FalconError: no folder is given, or as `read_manifests`.
    """
    manifests = [read_manifest(path) for path in paths]
    seq_len = manifests[0].seq_len if manifests else 1
    config = DataConfig(sources=tuple(map(Source, paths)), seq_len=seq_len, batch_size=batch_size)
    return config, _fitting(config, manifests)


def _fitting(config: DataConfig, manifests: list[Manifest]) -> Manifests:
    """The manifests of a config's sources, after the checks of `read_manifests`."""
    for source, manifest in zip(config.sources, manifests, strict=True):
        if manifest.seq_len != config.seq_len:
            raise FalconError(
                f"{source.path} has rows of {manifest.seq_len} tokens, the config wants {config.seq_len}: change its "
                "seq_len, or prepare the text again"
            )
        if manifest.tokenizer_sha256 != manifests[0].tokenizer_sha256:
            raise FalconError(f"{source.path} and {config.sources[0].path} were made by different tokenizers")
    return Manifests(manifests, [] if config.teacher_cache is None else _read_teachers(config, manifests))


def _read_teachers(config: DataConfig, manifests: list[Manifest]) -> list[TeacherManifest]:
    folders = [Path(source.path) / str(config.teacher_cache) for source in config.sources]
    teachers = [read_teacher_manifest(folder, manifest) for folder, manifest in zip(folders, manifests, strict=True)]
    for folder, teacher in zip(folders, teachers, strict=True):
        for name in ("top_k", "dtype", "temperature", "vocab_size"):
            if getattr(teacher, name) != getattr(teachers[0], name):
                raise FalconError(f"{folder} and {folders[0]} differ in {name}: write the cache of all sources alike")
        if teacher.teacher["weights"] != teachers[0].teacher["weights"]:
            raise FalconError(f"{folder} and {folders[0]} were written by different teachers")
    return teachers


def train_batches(
    config: DataConfig, rows: np.ndarray | None = None, manifests: Manifests | None = None
) -> grain.DatasetIterator[Batch]:
    """An endless iterator of training batches, or of this process's rows of each.

    Each epoch reads every row of a source once, in a new random order. `get_state()` of the iterator is a small dict
    that JSON can hold; `set_state` on an iterator of the same config continues exactly there, whichever rows it reads:
    the number of processes may change.

    Args:
      config: the data.
      rows: indices into the global batch of the rows to read; all by default.
      manifests: `read_manifests(config)`, if the caller has it.

    Raises:
      FalconError: the shards do not fit the config, or are missing or damaged.
    """
    wanted = _wanted(config, rows)
    stored = _Rows(config, "train", manifests)
    for source, count in zip(config.sources, stored.counts, strict=True):
        if not count:
            raise FalconError(f"{source.path} holds no training rows")
    orders = [
        # Grain shuffles an epoch with seed + epoch, so the seeds of sources and runs must lie far apart.
        _addresses(i, count).shuffle(int(np.random.SeedSequence([config.seed, i]).generate_state(1)[0])).repeat()
        for i, count in enumerate(stored.counts)
    ]
    mixture = grain.MapDataset.mix(orders, [source.weight for source in config.sources])

    def read(batch: Sequence[Address]) -> Batch:
        return stored.read([batch[b] for b in wanted])

    return _iterate(mixture.batch(config.batch_size, batch_fn=read), config)


def validation_batches(
    config: DataConfig, rows: np.ndarray | None = None, manifests: Manifests | None = None
) -> grain.DatasetIterator[Batch]:
    """Every validation row of all sources once, in order; the last batch is filled up with empty rows (segment 0).

    Args and errors are those of `train_batches`; having no validation rows at all is an error too.
    """
    wanted = _wanted(config, rows)
    stored = _Rows(config, "validation", manifests)
    if not any(stored.counts):
        raise FalconError("no source holds validation rows: prepare it again with a larger --validation-fraction")
    everything = grain.MapDataset.concatenate([_addresses(i, n) for i, n in enumerate(stored.counts) if n])

    def read(batch: Sequence[Address]) -> Batch:
        return stored.read([batch[b] if b < len(batch) else None for b in wanted])

    return _iterate(everything.batch(config.batch_size, batch_fn=read), config)


def _wanted(config: DataConfig, rows: np.ndarray | None) -> Sequence[int]:
    return range(config.batch_size) if rows is None else rows.tolist()


def _addresses(source: int, rows: int) -> grain.MapDataset[Address]:
    return grain.MapDataset.range(rows).map(lambda row: (source, row))


def _iterate(batches: grain.MapDataset[Batch], config: DataConfig) -> grain.DatasetIterator[Batch]:
    return iter(batches.to_iter_dataset(grain.ReadOptions(config.threads, config.prefetch)))


@dataclasses.dataclass(frozen=True)
class _File:
    """ArrayRecord's "file instruction": with the rows known, it need not open every file at the start."""

    filename: str
    take: int
    skip: int = 0

    @property
    def examples_in_shard(self) -> int:
        return self.take


class _Rows:
    """One split of all sources, open for reading rows by their address.

    Attributes:
      counts: rows of each source.
    """

    def __init__(self, config: DataConfig, split: str, manifests: Manifests | None):
        manifests = manifests or read_manifests(config)
        self._seq_len = config.seq_len
        self._vocab_size = manifests.vocab_size
        self._teachers = manifests.teachers
        self.counts = [manifest.splits[split].rows for manifest in manifests.tokens]
        self._names = [str(source.path) for source in config.sources]
        shards = [manifest.splits[split].shards for manifest in manifests.tokens]
        _allow_open_files((2 if self._teachers else 1) * sum(map(len, shards)))
        self._sources = [
            _open(Path(source.path), of_source) for source, of_source in zip(config.sources, shards, strict=True)
        ]
        self._cached = [
            _open(Path(source.path) / str(config.teacher_cache), teacher.splits[split])
            for source, teacher in zip(config.sources, self._teachers, strict=bool(self._teachers))
        ]

    def read(self, addresses: Sequence[Address | None]) -> Batch:
        """The rows at `addresses`; None gives an empty row."""
        rows: list[Row | None] = [None] * len(addresses)
        targets = self._teachers[0].targets(len(addresses)) if self._teachers else None
        for b, address in enumerate(addresses):
            if address is not None:
                record, rows[b] = self._row(*address)
                if targets is not None:
                    for name, array in self._targets(*address, record).items():
                        targets[name][b] = array  # type: ignore[literal-required]
        batch = unpack(rows, self._seq_len)
        return batch if targets is None else Batch(**batch, teacher=targets)

    def _row(self, source: int, row: int) -> tuple[bytes, Row]:
        with _named(row, self._names[source], "prepare"):
            record = self._sources[source][row]
            return record, decode_row(record, self._seq_len, self._vocab_size)

    def _targets(self, source: int, row: int, record: bytes) -> Targets:
        with _named(row, f"the teacher's shards in {self._names[source]}", "teacher-cache"):
            return decode_targets(self._cached[source][row], self._teachers[source], record)


def unpack(rows: Sequence[Row | None], seq_len: int) -> Batch:
    """Rows of token shards (token ids [T], lengths of the document pieces) as a batch; None gives an empty row."""
    shape = (len(rows), seq_len)
    batch = Batch(
        tokens_BxT=np.zeros(shape, np.int32),
        segment_ids_BxT=np.zeros(shape, np.int32),
        positions_BxT=np.zeros(shape, np.int32),
    )
    for b, row in enumerate(rows):
        if row is not None:
            tokens_T, runs = row
            n = int(runs.sum())
            batch["tokens_BxT"][b] = tokens_T
            batch["segment_ids_BxT"][b, :n] = np.repeat(np.arange(1, len(runs) + 1), runs)
            batch["positions_BxT"][b, :n] = np.arange(n) - np.repeat(np.cumsum(runs) - runs, runs)
    return batch


def _open(folder: Path, shards: Sequence[Shard]) -> Sequence[bytes]:
    if not shards:
        return ()
    return grain.sources.ArrayRecordDataSource([_File(str(folder / shard.file), shard.rows) for shard in shards])


@contextlib.contextmanager
def _named(row: int, where: str, command: str) -> Iterator[None]:
    """Turns an error of reading a row into one that names the row and says what to do."""
    try:
        yield
    except (FalconError, ValueError, IndexError, RuntimeError, OSError) as error:
        raise FalconError(
            f"cannot read row {row} of {where}: {error}; a shard is damaged: copy it again, or remove it and run the "
            f"same `falcon-relu {command}` again"
        ) from None


def _allow_open_files(shards: int) -> None:
    """Raises the soft limit on open files where the shards, which stay open, need more.

    Raises:
      FalconError: the hard limit is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = shards + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft != resource.RLIM_INFINITY and soft < shards + _open_files():
        raise FalconError(
            f"{shards} token shards need more open files than this machine allows ({hard}): raise `ulimit -n`, or "
            "prepare with a larger unit_mb"
        )


def _open_files() -> int:
    """Number of files that this process has open now; 0 where the system does not tell."""
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0
