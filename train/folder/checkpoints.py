"""Checkpoints of a run on Orbax: state and data position, with checksums that show whether they came back whole."""

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
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from falcon_relu.checkpoints.schema import seal, unseal
from falcon_relu.errors import FalconError
from falcon_relu.files import real_path
from train.distributed import all_agree, wait_for_all
from train.state import TrainState

_DAMAGED = ".damaged"
_UNFINISHED = "*.orbax-checkpoint-tmp"
_MOST_LISTED = 1024


class Checkpoints:
    """The checkpoints in a folder, numbered by step, written in the background by all processes of a run.

    Every process calls every method at the same step. Leaving the block waits for what is being written.

    Args:
      folder: where they lie, on a disk that all processes share.
      keep: how many of the newest stay.
      keep_every: steps whose checkpoint stays for good; 0 for none.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int = 0):
        self._folder = real_path(folder)
        _report_failures_once()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, keep_period=keep_every or None, create=True)
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
            with contextlib.suppress(Exception):  # the error on its way out says more
                self._manager.close()

    def save(self, step: int, state: TrainState, facts: dict[str, Any]) -> None:
        """Saves the state after `step` updates and facts that JSON can hold; once a step.

        Raises:
          FalconError: this checkpoint or the one before it could not be written; older ones are as they were.
        """
        if self._manager.latest_step() == step:
            return
        facts = seal(facts | {"fingerprint": fingerprint(state)})
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), facts=ocp.args.JsonSave(facts))
        with writing(f"a checkpoint to {self._folder}"):
            self._manager.save(step, args=items)

    def check(self) -> None:
        """Raises what has gone wrong in the background, as `save` does."""
        with writing(f"a checkpoint to {self._folder}"):
            self._manager.check_for_errors()

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """State and facts of the newest whole checkpoint, the state placed as `abstract` says.

        Damaged ones are named, and set aside (renamed to `STEP.damaged`) once an older one has been read.

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
        """Whether process 0 sees a finished checkpoint in a folder; every process must ask."""
        here = folder.is_dir() and any(path.name.isdigit() and path.is_dir() for path in folder.iterdir())
        return bool(multihost_utils.broadcast_one_to_all(np.array(here)))

    def steps(self) -> list[int]:
        """The checkpoints that were written to their end, newest first, as process 0 sees them."""
        steps = np.full(_MOST_LISTED, -1)
        if jax.process_index() == 0:
            found = sorted(self._manager.all_steps(), reverse=True)[:_MOST_LISTED]
            steps[: len(found)] = found
        return [int(step) for step in multihost_utils.broadcast_one_to_all(steps) if step >= 0]

    def _read(self, step: int, abstract: TrainState) -> tuple[Any, dict[str, Any], str | None]:
        """State, facts, and what is wrong with them as all processes agree.

        The handlers are called directly: the manager would wait for all processes after reading, also for one in which
        reading has failed.
        """
        folder = self._folder / str(step)
        state: Any = None
        facts: dict[str, Any] = {}
        problem = None
        try:
            state = ocp.StandardCheckpointHandler().restore(folder / "state", args=ocp.args.StandardRestore(abstract))
            facts = ocp.JsonCheckpointHandler().restore(folder / "facts", args=ocp.args.JsonRestore())
            jax.block_until_ready(state)
        except Exception as error:  # whatever a damaged file makes Orbax and TensorStore raise
            problem = _first_line(error)
        if not all_agree(problem is None):
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
        wait_for_all("set damaged checkpoints aside")
        if steps:
            self._manager.reload()


@functools.cache
def _report_failures_once() -> None:
    """Leaves it to `writing` to report a failed save.

    Orbax logs the same failure with a traceback in each of its threads, and TensorStore prints one for every file that
    was still under way, from threads that live longer than the run.
    """
    logging.getLogger("absl").addFilter(lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname)
    before = sys.unraisablehook

    def hook(raised: sys.UnraisableHookArgs) -> None:
        if not (raised.exc_type is RuntimeError and str(raised.exc_value) == "Event loop is closed"):
            before(raised)

    sys.unraisablehook = hook


def _remove_unfinished(folder: Path) -> None:
    """Removes what killed or failed runs left half-written.

    Orbax's own option does this in a thread that `close` does not wait for: two runs in a row would race.
    """
    if jax.process_index() == 0:
        for path in folder.glob(_UNFINISHED):
            shutil.rmtree(path, ignore_errors=True)  # Orbax replaces what stays, and never reads it
    wait_for_all("remove unfinished checkpoints")


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Turns whatever the system, Orbax or TensorStore make of a failed write into an error that says what to do.

    Args:
      what: what is being written where, for the message.
    """
    try:
        yield
    except FalconError:
        raise
    except Exception as problem:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # Orbax's other tasks would each say the same
        said = _first_line(problem)
        in_the_way = isinstance(problem, IsADirectoryError | NotADirectoryError | FileExistsError | PermissionError)
        raise FalconError(
            f"could not write {what}: {said}. Remove what is in the way, or choose another --out"
            if in_the_way
            else f"could not write {what} (disk full?): {said}. What was finished before is as it was: make room, then "
            "run the same command again"
        ) from problem


def fingerprint(state: TrainState) -> dict[str, int]:
    """A number for each leaf that changes with any of its bits and not with the mesh: a weighted sum modulo 2^32."""
    sums = jax.device_get(_sums(state))
    return {jax.tree_util.keystr(path): int(value) for path, value in jax.tree_util.tree_leaves_with_path(sums)}


@jax.jit
def _sums(state: TrainState) -> Any:
    return jax.tree.map(_weighted_sum, state)


def _weighted_sum(x: jax.Array) -> jax.Array:
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
    # Odd weights that differ from place to place: a changed word always shows, words that changed places nearly always.
    place = functools.reduce(
        lambda total, axis: total * jnp.uint32(2_654_435_761) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis),
        range(x.ndim),
        jnp.zeros(x.shape, jnp.uint32),
    )
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
