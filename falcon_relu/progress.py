"""Progress on standard error: what is done, how fast, how long still."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

console = Console(stderr=True)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if speed is None:
            return Text("")
        return Text(f"{speed * task.fields['scale']:,.0f} {task.fields['unit']}/s", style="cyan")


@contextlib.contextmanager
def progress(
    description: str, total: float | None, unit: str = "steps", *, scale: float = 1, done: float = 0
) -> Iterator[Callable[..., None]]:
    """A progress bar with rate and time left; yields `advance(amount=1, note=None)`.

    Where standard error is no terminal, one plain line is printed at the end instead.

    Args:
      description: what is going on.
      total: steps in all, if known.
      unit: what the rate counts.
      scale: units in a step.
      done: steps that an earlier process has done.
    """
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    ) as bar:
        task = bar.add_task(description, total=total, unit=unit, scale=scale, note="", completed=int(done))

        def advance(amount: float = 1, note: str | None = None) -> None:
            bar.update(task, advance=amount)
            if note is not None:
                bar.update(task, note=note)

        yield advance
