"""Checkpoints of a run, written with Orbax: state and data position, with checksums that are verified on reading."""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from falcon_relu.checkpoints.schema import seal, unseal
from falcon_relu.errors import FalconError
from falcon_relu.files import real_path
from train.distributed import all_agree, late_processes, of_first, wait_for_all, wait_seconds
from train.state import TrainState

_DAMAGED = ".damaged"
_UNFINISHED = "*.orbax-checkpoint-tmp"


class Checkpoints:
    """The checkpoints in a folder, numbered by step, written in the background by all processes of a run.

    Every process must call every method at the same step. Leaving the context waits for writes in the background.

    Args:
      folder: their folder, on a disk that all processes share.
      keep: number of the newest checkpoints to keep.
      keep_every: checkpoints of steps divisible by this number are kept forever; 0 for none.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int = 0):
        self._folder = real_path(folder)
        _report_failures_once()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_every or None,
            create=True,
            async_options=ocp.AsyncOptions(timeout_secs=int(wait_seconds())),
        )
        _remove_unfinished(self._folder)
        with writing(f"checkpoints to {self._folder}"):
            self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, KeyboardInterrupt):
            with writing(f"a checkpoint to {self._folder}"):
                self._manager.close()
        else:
            with contextlib.suppress(Exception):  # the error that ended the run is raised instead
                self._manager.close()

    def save(self, step: int, state: TrainState, facts: dict[str, Any]) -> None:
        """Saves the state after `step` updates, and facts as JSON; does nothing if that step is saved already.

        Raises:
          FalconError: this checkpoint or the one before it could not be written; older ones are unchanged.
        """
        if self._manager.latest_step() == step:
            return
        facts = seal(facts | {"fingerprint": fingerprint(state)})
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), facts=ocp.args.JsonSave(facts))
        with writing(f"a checkpoint to {self._folder}"):
            self._manager.save(step, args=items)

    def check(self) -> None:
        """Raises errors of writes in the background, as `save` does."""
        with writing(f"a checkpoint to {self._folder}"):
            self._manager.check_for_errors()

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """State and facts of the newest undamaged checkpoint; the state has the shardings of `abstract`.

        Damaged checkpoints are reported, and renamed to `STEP.damaged` once an older one has been read.

        Raises:
          FalconError: there is no checkpoint, or none that can be read.
        """
        steps = self.steps()
        problems: dict[int, str] = {}
        for step in steps:
            state, facts, problem = self._read(step, abstract)
            if problem is None:
                self._set_aside(sorted(problems))
                return state, facts
            problems[step] = problem
            logging.warning("checkpoint %s is damaged: %s", self._folder / str(step), problem)
        raise FalconError(
            f"none of the checkpoints in {self._folder} can be read: "
            + "; ".join(f"{step}: {problem}" for step, problem in problems.items())
            + ". They are left as they are; bring back what is missing, or remove the folder to start anew"
        )

    @staticmethod
    def exist(folder: Path) -> bool:
        """Whether process 0 sees a finished checkpoint in a folder; every process must call it."""
        here = folder.is_dir() and any(path.name.isdigit() and path.is_dir() for path in folder.iterdir())
        return bool(of_first(here, f"a look at {folder}"))

    def steps(self) -> list[int]:
        """The steps of the finished checkpoints that process 0 sees, newest first."""
        found = sorted(self._manager.all_steps(), reverse=True) if jax.process_index() == 0 else []
        return list(of_first(found, f"the list of checkpoints in {self._folder}"))

    def _read(self, step: int, abstract: TrainState) -> tuple[Any, dict[str, Any], str | None]:
        """State, facts, and why they cannot be used, None if they can, the same in all processes.

        Orbax's handlers are called directly: its manager waits for all processes after reading, and would wait forever
        for a process in which reading has failed.
        """
        folder = self._folder / str(step)
        state: Any = None
        facts: dict[str, Any] = {}
        problem = None
        try:
            state = ocp.StandardCheckpointHandler().restore(folder / "state", args=ocp.args.StandardRestore(abstract))
            facts = ocp.JsonCheckpointHandler().restore(folder / "facts", args=ocp.args.JsonRestore())
            jax.block_until_ready(state)
        except Exception as error:  # Orbax and TensorStore raise many types for damaged files
            problem = _first_line(error)
        if not all_agree(problem is None, f"the reading of checkpoint {step}"):
            return None, {}, problem or "another process could not read its part"
        try:
            facts = unseal(facts, "facts", "")
        except FalconError:
            return None, {}, "the position in the data or other facts read back other than written"
        found, wanted = fingerprint(state), facts["fingerprint"]
        changed = [name for name in found if found[name] != wanted.get(name)]
        if changed:
            return None, {}, f"{', '.join(changed)} read back other than written"
        return state, facts, None

    def _set_aside(self, steps: list[int]) -> None:
        if jax.process_index() == 0:
            for step in steps:
                target = self._folder / f"{step}{_DAMAGED}"
                number = 1
                while target.exists():
                    number += 1
                    target = self._folder / f"{step}{_DAMAGED}{number}"
                (self._folder / str(step)).rename(target)
        wait_for_all("the renaming of damaged checkpoints")
        if steps:
            self._manager.reload()


@functools.cache
def _report_failures_once() -> None:
    """Hides Orbax's and TensorStore's own messages about a failed save, which `writing` reports.

    Orbax logs the failure with a traceback in each of its threads, and TensorStore prints one for every unfinished
    file, from threads that outlive the run.
    """
    logging.getLogger("absl").addFilter(lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname)
    before = sys.unraisablehook

    def hook(raised: sys.UnraisableHookArgs) -> None:
        if not (raised.exc_type is RuntimeError and str(raised.exc_value) == "Event loop is closed"):
            before(raised)

    sys.unraisablehook = hook


def _remove_unfinished(folder: Path) -> None:
    """Removes checkpoints that a killed or failed run did not finish.

    Orbax's own option does so in a thread that `close` does not wait for, so that two runs in a row would race.
    """
    if jax.process_index() == 0:
        for path in folder.glob(_UNFINISHED):
            shutil.rmtree(path, ignore_errors=True)  # Orbax never reads what cannot be removed, and overwrites it
    wait_for_all("the removal of unfinished checkpoints")


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Turns errors of the system, Orbax and TensorStore about a failed write into a FalconError with advice.

    Args:
      what: what is being written and where, for the message.
    """
    try:
        yield
    except FalconError:
        raise
    except Exception as problem:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # each of Orbax's other tasks would log the same error
        if late := late_processes(problem):
            raise FalconError(
                f"could not write {what}: {late} did not come within {wait_seconds():g} s "
                "(--distributed.wait-seconds). Start all processes again: the run goes on from its last checkpoint"
            ) from problem
        reason = _first_line(problem)
        in_the_way = isinstance(problem, IsADirectoryError | NotADirectoryError | FileExistsError | PermissionError)
        raise FalconError(
            f"could not write {what}: {reason}. Remove what is in the way, or choose another --out"
            if in_the_way
            else f"could not write {what} (disk full?): {reason}. What was finished before is unchanged: make room, "
            "then run the same command again"
        ) from problem


def fingerprint(state: TrainState) -> dict[str, int]:
    """A checksum of each leaf that does not depend on the mesh: a weighted sum of its words modulo 2^32."""
    sums = jax.device_get(checksums(state))
    return {jax.tree_util.keystr(path): int(value) for path, value in jax.tree_util.tree_leaves_with_path(sums)}


@jax.jit
def checksums(state: TrainState) -> Any:
    """What `fingerprint` reads."""
    return jax.tree.map(_weighted_sum, state)


def _weighted_sum(x: jax.Array) -> jax.Array:
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
    # Odd weights, different for each position: any single changed word is detected, and swapped words nearly always.
    place = functools.reduce(
        lambda total, axis: total * jnp.uint32(2_654_435_761) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis),
        range(x.ndim),
        jnp.zeros(x.shape, jnp.uint32),
    )
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
