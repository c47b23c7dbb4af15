"""Text to token shards, by several processes, resumable; the result does not depend on how the work was divided.

The records of the inputs, in order, are grouped into units of about `unit_mb` of text. One process tokenises and packs
a unit into one shard for each split; the unit is finished once its file in `units/` exists. Finished units are not done
again. With `part` (i, n), for job arrays, only every n-th unit is done. The run that finds all units finished writes
the manifest.
"""

from __future__ import annotations

import concurrent.futures as futures
import dataclasses
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from falcon_relu.checkpoints.schema import read_as, seal
from falcon_relu.errors import FalconError, check_number, check_part, check_seed
from falcon_relu.files import inherit_lock, lock_part, remove
from falcon_relu.progress import progress
from falcon_relu.tokenizer import Tokenizer
from train.data.shards import FORMAT, MAX_SEQ_LEN, SPLITS, Manifest, Split, manifest_path, write_shared
from train.data.text import ZST_WINDOW_LIMIT, Record, TextReader
from train.data.units import BAD_EXAMPLES, Unit, UnitSplit, is_finished, prepare_unit, unit_path

_MOST_UNIT_MB = 8192
_MOST_PROCESSES = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What to prepare, and how.

    Attributes:
      inputs: text files, folders, globs or datasets.
      tokenizer: a tokenizer.json, or a folder with one.
      out: folder for the shards and their manifest.
      seq_len: T, tokens in a row: the context length in training.
      text_field: JSON key or column that holds the text.
      validation_fraction: fraction of the documents kept for validation, chosen by a hash of their text.
      seed: seed of that hash.
      unit_mb: MB of text in a unit, which becomes one shard file for each split.
      processes: processes that tokenise; 0: one a CPU.
      zst_window_mb: MiB of memory that a .zst input may ask for; those packed with `zstd --long=31` ask for 2048.

    Raises:
      FalconError: a value is out of range.
    """

    inputs: tuple[str, ...]
    tokenizer: Path
    out: Path
    seq_len: int = 2048
    text_field: str = "text"
    validation_fraction: float = 0.005
    seed: int = 0
    unit_mb: float = 32.0
    processes: int = 0
    zst_window_mb: int = ZST_WINDOW_LIMIT

    def __post_init__(self) -> None:
        if not self.inputs:
            raise FalconError("no input given")
        check_number("seq_len (a row is held whole)", self.seq_len, low=2, high=MAX_SEQ_LEN)
        check_number("validation_fraction", self.validation_fraction, low=0)
        check_seed("seed", self.seed)
        check_number("unit_mb (a unit's text is in memory)", self.unit_mb, above=0, high=_MOST_UNIT_MB)
        check_number("processes", self.processes, low=0, high=_MOST_PROCESSES)
        check_number("zst_window_mb", self.zst_window_mb, low=1, high=ZST_WINDOW_LIMIT)
        if self.validation_fraction >= 1:
            raise FalconError(f"validation_fraction must be below 1, got {self.validation_fraction}")


class Prepared(NamedTuple):
    """The result of one run of `prepare`.

    Attributes:
      manifest: manifest of the whole folder; None while other jobs of an array are unfinished.
      units: number of this run's units, including those that were finished before.
      new_tokens: number of tokens that this run added.
      seconds: duration of the run.
    """

    manifest: Manifest | None
    units: int
    new_tokens: int
    seconds: float


def prepare(config: PrepareConfig, part: tuple[int, int] = (0, 1)) -> Prepared:
    """Tokenises and packs `config.inputs` into `config.out`; continues where an earlier run stopped.

    Args:
      config: what to prepare, and how.
      part: (i, n): do only every n-th unit, beginning with the i-th, counted from 0.

    Raises:
      FalconError: an input or the tokenizer is invalid, the inputs hold no document, the folder was begun with other
        settings or inputs, or another run does the same `part`.
    """
    check_part(part)
    tokenizer = Tokenizer(config.tokenizer)
    reader = TextReader(config.inputs, config.text_field, config.zst_window_mb)
    settings = _settings(config, tokenizer)
    index, count = part
    started = time.monotonic()
    units = own = 0
    total_mb = None if reader.total_bytes is None else reader.total_bytes / 1e6
    with (
        lock_part(config.out, index, count),
        progress("prepare", total_mb, "MB") as advance,
        _Workers(config, settings, advance) as workers,
    ):
        for number, (records, megabytes) in enumerate(_units(reader, config.unit_mb)):
            units += 1
            mine = number % count == index
            own += mine
            if mine and not is_finished(config.out, number, records, settings):
                workers.submit(number, records, megabytes)
            else:
                advance(megabytes)
        workers.drain()
        manifest = _finish(config, tokenizer, reader, units, index)
    return Prepared(manifest, own, workers.tokens, time.monotonic() - started)


def _settings(config: PrepareConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The settings that determine a unit's content, together with its records."""
    names = ("seq_len", "text_field", "validation_fraction", "seed", "unit_mb")
    return {"format": FORMAT, "tokenizer_sha256": tokenizer.sha256} | {name: getattr(config, name) for name in names}


def _units(reader: TextReader, unit_mb: float) -> Iterator[tuple[list[Record], float]]:
    """The records of each unit, and their size in MB in the input files."""
    unit: list[Record] = []
    size = begun_at = 0
    for record in reader:
        unit.append(record)
        size += len(record.data)
        if size >= unit_mb * 1e6:
            yield unit, (reader.position - begun_at) / 1e6
            unit, size, begun_at = [], 0, reader.position
    if unit:
        yield unit, (reader.position - begun_at) / 1e6


class _Workers:
    """Processes that prepare units; the number of units queued for them is bounded.

    Attributes:
      tokens: number of tokens in the units finished so far.
    """

    def __init__(self, config: PrepareConfig, settings: dict[str, Any], advance: Callable[..., None]):
        self.tokens = 0
        self._config, self._settings, self._advance = config, settings, advance
        self._processes = config.processes or _cpus()
        self._pending: dict[futures.Future[int], float] = {}
        self._started = time.monotonic()

    def __enter__(self) -> _Workers:
        # Spawned, not forked: the caller may have threads, JAX's for one.
        spawn = multiprocessing.get_context("spawn")
        self._pool = futures.ProcessPoolExecutor(
            self._processes, spawn, _start_worker, (self._config.tokenizer, self._config.out)
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def submit(self, number: int, records: list[Record], megabytes: float) -> None:
        """Queues a unit, once fewer are queued than the bound."""
        while len(self._pending) > self._processes:
            self._collect()
        try:
            unit = self._pool.submit(_work, number, records, self._settings, self._config.out)
        except BrokenProcessPool:
            raise _killed() from None
        self._pending[unit] = megabytes

    def drain(self) -> None:
        """Waits for all units."""
        while self._pending:
            self._collect()

    def _collect(self) -> None:
        done, _ = futures.wait(self._pending, return_when=futures.FIRST_COMPLETED)
        for unit in done:
            try:
                self.tokens += unit.result()
            except BrokenProcessPool:
                raise _killed() from None
            except OSError as error:
                raise FalconError(f"could not write to {self._config.out} (disk full?): {error}") from None
            rate = self.tokens / (time.monotonic() - self._started)
            self._advance(self._pending.pop(unit), f"{rate:,.0f} tokens/s")


def _killed() -> FalconError:
    return FalconError(
        "a tokenising process was killed (out of memory?); finished units are kept: run the same command again, with "
        "fewer processes or a smaller unit_mb if memory is short"
    )


def _cpus() -> int:
    """Number of CPUs that this process may use; all CPUs where the system does not report it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_worker_tokenizer: Tokenizer


def _start_worker(tokenizer: Path, out: Path) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # a script in the background ignores Ctrl-C: so do workers
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker without a traceback
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _worker_tokenizer = Tokenizer(tokenizer)
    inherit_lock(out)


def _die_with_parent() -> None:
    # Otherwise workers wait forever when the parent is killed.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(number: int, records: list[Record], settings: dict[str, Any], out: Path) -> int:
    return prepare_unit(number, records, settings, _worker_tokenizer, out)


# --- the whole folder ---


def _finish(config: PrepareConfig, tokenizer: Tokenizer, reader: TextReader, units: int, job: int) -> Manifest | None:
    """Writes the manifest if all units are finished; removes them if none holds a document."""
    paths = [unit_path(config.out, number) for number in range(units)]
    if not all(path.exists() for path in paths):
        return None
    if unit_path(config.out, units).exists():
        raise FalconError(f"{config.out} has more units than the inputs give now: choose another folder or remove it")
    finished = [read_as(Unit, path) for path in paths]
    bad = sum(unit.bad_lines for unit in finished)
    examples = tuple(itertools.chain.from_iterable(unit.bad_examples for unit in finished))[:BAD_EXAMPLES]
    splits = {name: _join([unit.splits[name] for unit in finished if name in unit.splits]) for name in SPLITS}
    if not any(split.documents for split in splits.values()):
        remove(unit_path(config.out, 0).parent)  # all that was made: without a document there is no shard
        first = f"; the first: {examples[0]}" if examples else ""
        raise FalconError(f"the inputs hold no document: {bad} lines could not be used{first}")
    manifest = Manifest(
        seq_len=config.seq_len,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        tokenizer_sha256=tokenizer.sha256,
        seed=config.seed,
        validation_fraction=config.validation_fraction,
        sources=tuple(reader.sources),
        splits=splits,
        bad_lines=bad,
        bad_examples=examples,
    )
    write_shared(manifest_path(config.out), seal(manifest.to_json()), job)
    return manifest


def _join(parts: Sequence[UnitSplit]) -> Split:
    return Split(
        rows=sum(part.shard.rows for part in parts),
        tokens=sum(part.tokens for part in parts),
        documents=sum(part.documents for part in parts),
        shards=tuple(part.shard for part in parts),
    )
