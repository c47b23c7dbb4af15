"""Standard streams as a process may find them: closed, closed by the reader too early, or short of characters."""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Iterator
from pathlib import Path

_STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))
_READER_GONE = 128 + 13  # what a shell reports for a program that SIGPIPE ended


class ReaderGoneError(Exception):
    """Nobody reads what is printed any more, as behind `| head`.

    Attributes:
      status: of the process, as of one that SIGPIPE ended.
    """

    status = _READER_GONE


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Lets the block print whatever it likes, and sees to it that it has been printed.

    A closed stream reads and writes nothing. Characters that the terminal lacks become question marks. Bytes of the
    input that are no text become surrogates, for the reader to refuse.

    Raises:
      ReaderGoneError: the output was closed by its reader.
    """
    for number, (name, mode) in enumerate(_STREAMS):
        stream = getattr(sys, name)
        if stream is None:
            try:
                os.fstat(number)
            except OSError:  # else the next file that is opened would be taken for the stream
                os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115  (as long as the process)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="surrogateescape" if mode == "r" else "replace")
    try:
        yield
        _flush()
    except BrokenPipeError:
        gone = [number for number in (1, 2) if _reader_gone(number)]
        if not gone:  # another pipe, to a process of ours
            raise
        for number in gone:
            _discard(number)
        raise ReaderGoneError from None


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError:  # a full disk, on which Python would try again when it ends, and change the exit status
        _discard(1)
        raise


def _discard(number: int) -> None:
    """Lets what is still in a stream's buffer go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def _reader_gone(number: int) -> bool:
    poll = select.poll()
    poll.register(number, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
