"""Checkpoints of a run on Orbax: state and data position, written beside the run, newest kept."""

from __future__ import annotations

import logging
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orbax.checkpoint as ocp

from falcon_relu.errors import FalconError
from train.state import TrainState


class Checkpoints:
    """The checkpoints in a folder, numbered by step. Saving happens in the background; leaving the block waits for it.

    Args:
      folder: where they lie.
      keep: how many of the newest stay.
    """

    def __init__(self, folder: Path, keep: int):
        self._folder = folder
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """Step of the newest whole checkpoint, if there is one."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, data_position: dict[str, Any]) -> None:
        """Saves the state after `step` updates and the position of the data iterator; once a step."""
        if self._manager.latest_step() == step:
            return
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_position))
        self._manager.save(step, args=items)

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """State and data position of the newest checkpoint that can be read, placed as `abstract` says.

        A damaged one is named and the one before it is taken.

        Raises:
          FalconError: there are checkpoints and none of them can be read.
        """
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                restored = self._manager.restore(step, args=items)
            except Exception as error:  # whatever a damaged file makes Orbax and TensorStore raise
                logging.warning("checkpoint %s/%d cannot be read: %s", self._folder, step, _first_line(error))
                self._manager.delete(step)
                continue
            return restored.state, restored.data
        raise FalconError(
            f"none of the checkpoints {steps} in {self._folder} can be read; remove the folder to start anew"
        )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
