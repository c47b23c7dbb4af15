"""What commands show: values as text, and progress (steps done, rate, time left) as a bar on a terminal or as lines."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

T = TypeVar("T")


class Console(rich.console.Console):
    """Rich's console without markup, highlighting and emoji names: text is printed as it is.

    A reader that closes the output early raises BrokenPipeError in the caller, where rich would end the process.
    """

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def on_broken_pipe(self) -> None:
        """Called by rich while it handles the error."""
        raise


console = Console(stderr=True)

NOT_MEASURED = "not measured"  # shown in reports and cards for a value that is missing


def format_value(value: Any) -> str:
    """A value as text: numbers with four significant digits and thousands separators; None is "-"."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 or abs(value) >= 1e15 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


_SECONDS_BETWEEN_LINES = 30


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

    Where standard error is not a terminal, it prints a plain line every half minute instead.

    Args:
      description: the task, shown before the bar.
      total: number of steps, if known.
      unit: unit of the rate.
      scale: units in a step.
      done: steps that an earlier process completed.
    """
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(description, total=total, unit=unit, scale=scale, note="", completed=int(done))
        line = _PlainLine(description, total, unit, scale, done)

        def advance(amount: float = 1, note: str | None = None) -> None:
            bar.update(task, advance=amount)
            if note is not None:
                bar.update(task, note=note)
            line.advance(amount, note)

        yield advance
        line.end()


def track(items: Sequence[T], description: str, unit: str) -> Iterator[T]:
    """The items one by one, with a progress bar over them; arguments as `progress`."""
    with progress(description, len(items), unit) as advance:
        for item in items:
            yield item
            advance()


class _PlainLine:
    """Progress for a log file: a line every half minute, and one at the end of a task that took over a second."""

    def __init__(self, description: str, total: float | None, unit: str, scale: float, done: float):
        self._description, self._total, self._unit, self._scale = description, total, unit, scale
        self._first = self._done = done
        self._note = ""
        self._start = self._printed = time.monotonic()

    def advance(self, amount: float, note: str | None) -> None:
        self._done += amount
        self._note = self._note if note is None else note
        if time.monotonic() - self._printed > _SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            self._print()

    def end(self) -> None:
        if time.monotonic() - self._printed > 1:  # not for a task that ended at once, or right after a line
            self._print()

    def _print(self) -> None:
        if console.is_terminal:
            return
        steps, seconds = self._done - self._first, max(time.monotonic() - self._start, 1e-9)
        of = "" if self._total is None else f"/{self._total:,.0f}"
        rate = f"{steps * self._scale / seconds:,.0f} {self._unit}/s"
        left = ""
        if self._total is not None and steps and self._done < self._total:
            left = f", {(self._total - self._done) * seconds / steps:,.0f} s left"
        note = f", {self._note}" if self._note else ""
        console.print(
            f"{self._description}: {self._done:,.0f}{of}, {rate}{left}{note}",
            soft_wrap=True,
        )
