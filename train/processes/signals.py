"""SIGTERM and Ctrl-C in a run: noted while there is work to save; before that, the process leaves at once.

A Python handler runs in the main thread, between two of its instructions, so not while that thread compiles a program,
reads weights or waits for the other processes. `catch` therefore also starts a thread, which the signal wakes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

INTERRUPTED = 130  # exit status
SIGNALS = (signal.SIGTERM, signal.SIGINT)
_PATIENCE = 120.0  # seconds from a signal, until this process knows whether there are others to be told


class Stopped(KeyboardInterrupt):
    """SIGTERM or Ctrl-C came to one of the processes, and all have stopped after the same step."""


_came: list[int] = []
_leave: Callable[[], None] | None = None
_caught = threading.Event()
_settled = threading.Event()  # this process knows how to leave, or has work to save
_changing = threading.RLock()


def catch() -> None:
    """Takes both signals for the rest of the process; the first thing that `falcon-relu train` does.

    Until `leave_with` they are noted only, for two minutes at the most, after which the process leaves.
    """
    if _caught.is_set() or threading.current_thread() is not threading.main_thread():
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, _note)
    _caught.set()
    threading.Thread(target=_answer, args=(reading,), name="stop signals", daemon=True).start()


def leave_with(leave: Callable[[], None]) -> None:
    """Says how to leave where nothing is to be saved; called at once where a signal has come already."""
    global _leave
    with _changing:
        _leave = leave
        _settled.set()
        if _caught.is_set() and _came:
            leave()


def keep() -> None:
    """Says that from now on there is work to save: signals are noted only."""
    global _leave
    with _changing:
        _leave = None
        _settled.set()


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function: whether SIGTERM or Ctrl-C was received; a second Ctrl-C interrupts at once."""
    if _caught.is_set():
        yield lambda: bool(_came)
        return
    _came.clear()
    previous = {number: signal.signal(number, _note) for number in SIGNALS}
    try:
        yield lambda: bool(_came)
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def leave_now() -> None:
    """Ends this process as interrupted, whatever its other threads do."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr.isatty():
            sys.stderr.write("\x1b[?25h")  # a progress bar hides the cursor
    say("falcon-relu train: interrupted; finished work is kept")
    os._exit(INTERRUPTED)


def say(text: str) -> None:
    """Prints to standard error, if anybody still reads it."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def _note(number: int, _: FrameType | None) -> None:
    again = bool(_came)
    _came.append(number)
    if again and number == signal.SIGINT:
        raise KeyboardInterrupt


def _answer(reading: int) -> None:
    while True:
        if os.read(reading, 1)[0] not in SIGNALS:
            continue
        if not _settled.wait(_PATIENCE):
            leave_now()
        with _changing:
            if _leave is not None:
                _leave()
