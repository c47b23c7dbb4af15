"""Each process of a run tells the others where it is, and ends with a message when one is gone, late or told to stop.

JAX's own heartbeats end a process by abort(), with a stack trace that names a number at best, and none where process 0
is the one that is gone; they cannot see a process that lives but has stopped working, which a collective would wait for
without end. They stay as a second line of defence, with more time.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import threading
import time
from typing import Any

from train.processes import signals

_FOLDER = "relu-falcon/processes/"
_FAILED = 1  # exit status


@dataclasses.dataclass(frozen=True)
class Said:
    """What a process says of itself.

    Attributes:
      beat: grows each time.
      place: number of `where`; the same number is the same place in every process.
      where: the work that it does, or the others that it waits for.
      name: of its machine and process.
      ended: exit status, if it is about to leave.
    """

    beat: int = 0
    place: int = 0
    where: str = "the start"
    name: str = ""
    ended: int | None = None


class Lookout:
    """Two threads: one exchanges what the processes say of themselves, through JAX's coordinator; the other judges.

    Time is counted in turns of the judging thread, so that a pause of this process is not held against the others.

    Args:
      client: JAX's distributed client.
      rank: number of this process.
      count: number of processes.
      silent_seconds: time without a word from a process, after which this one ends.
      wait_seconds: time that a process may stay in one place while others wait for it.
    """

    def __init__(self, client: Any, rank: int, count: int, silent_seconds: float, wait_seconds: float):
        self._client, self._rank, self._count = client, rank, count
        self._silent_seconds, self._wait_seconds = silent_seconds, wait_seconds
        self._turn = min(1.0, silent_seconds / 10)
        self._mine = Said(name=f"{socket.gethostname()}, pid {os.getpid()}")
        self._together = self._told = False
        self._heard: dict[int, Said] = {}
        self._answers = 0
        self._still: dict[Any, tuple[Any, int]] = {}
        self._over, self._ending = threading.Event(), threading.Lock()

    def start(self) -> None:
        """Starts both threads."""
        for work in (self._exchange, self._judge):
            threading.Thread(target=work, name=f"lookout{work.__name__}", daemon=True).start()

    def stop(self) -> None:
        """Ends both threads; every process calls it at the same place."""
        self._over.set()

    def reached(self, where: str, *, together: bool = True) -> None:
        """Says where this process is; every process calls it for the same places in the same order.

        Args:
          where: the place, as messages name it.
          together: whether the processes need each other there, so that none stays long while all are there. False for
            work that each does by itself, such as reading weights.
        """
        self._together = together
        self._mine = dataclasses.replace(self._mine, place=self._mine.place + 1, where=where)

    def end(self, status: int, text: str) -> None:
        """Ends this process, at once even if its main thread waits for others; first tells the others."""
        with self._ending:  # for ever: the first reason counts
            signals.say(f"process {self._rank} of {self._count}: {text}")
            self._mine = dataclasses.replace(self._mine, ended=status)
            for _ in range(80):  # eight turns at the most, counted as the judge does
                if self._is_told():
                    break
                time.sleep(self._turn / 10)
            if self._rank == 0:  # the others speak through this one, and are about to leave
                time.sleep(2 * self._turn)
            if status == signals.INTERRUPTED:
                signals.leave_now()
            os._exit(status)

    def leave(self) -> None:
        """Ends this process because of a stop signal, when there is nothing to save; the others then do the same."""
        self.end(signals.INTERRUPTED, "told to stop before there was anything to save")

    def behind(self) -> str:
        """The processes that have not come as far as this one, for a message; empty if there are none."""
        late = [
            f"process {rank} ({said.name}) was still at {said.where}"
            for rank, said in sorted(self._heard.items())
            if said.place < self._mine.place
        ]
        return "; ".join(late)

    def _is_told(self) -> bool:
        """Whether the others can know; process 0 waits until all of them are about to leave."""
        others = [said for rank, said in dict(self._heard).items() if rank != self._rank]
        leaving = sum(said.ended is not None for said in others)
        return self._told and (self._rank != 0 or leaving == self._count - 1)

    def _exchange(self) -> None:
        beat = 0
        while not self._over.is_set():
            beat += 1
            said = dataclasses.replace(self._mine, beat=beat)
            try:
                text = json.dumps(dataclasses.asdict(said))
                self._client.key_value_set(f"{_FOLDER}{self._rank}", text, allow_overwrite=True)
                self._told = said.ended is not None
                for key, value in self._client.key_value_dir_get(_FOLDER):
                    self._heard[int(key.rpartition("/")[2])] = Said(**json.loads(value))
                self._answers += 1
            except Exception:  # it does not answer: the judge counts for how long
                pass
            self._over.wait(self._turn)

    def _judge(self) -> None:
        while not self._over.wait(self._turn):
            verdict = self._verdict()
            if verdict is not None and not self._over.is_set():
                self.end(*verdict)

    def _verdict(self) -> tuple[int, str] | None:
        """Exit status and reason, if this process must end."""
        silent, late = (seconds / self._turn for seconds in (self._silent_seconds, self._wait_seconds))
        if self._turns("answers", self._answers) > silent:
            return _FAILED, self._gone(0)
        others = {rank: said for rank, said in dict(self._heard).items() if rank != self._rank}
        for rank, said in others.items():
            ended = self._turns(("ended", rank), said.ended)
            if said.ended == signals.INTERRUPTED:
                return said.ended, f"process {rank} ({said.name}) was told to stop before there was anything to save"
            if said.ended is not None and ended > 1:  # its error may be this one's, which then says it better
                return _FAILED, f"process {rank} ({said.name}) ended with an error, see its output. {_AGAIN}"
        for rank, said in others.items():
            if self._turns(("beat", rank), said.beat) > silent:
                return _FAILED, self._gone(rank)
        for rank, said in others.items():
            stays = self._turns(("place", rank), said.place)
            if stays > late and said.place < self._mine.place:
                return _FAILED, (
                    f"process {rank} ({said.name}) lives but is late: it has been at {said.where} for "
                    f"{self._wait_seconds:g} s (--distributed.wait-seconds), this one is at {self._mine.where}. Look "
                    f"what it waits for: its disk, its memory, its devices. {_AGAIN}"
                )
        stays = self._turns("mine", self._mine.place)
        if stays > late and self._together and all(said.place == self._mine.place for said in others.values()):
            return _FAILED, (
                f"all processes have been at {self._mine.where} for {self._wait_seconds:g} s "
                f"(--distributed.wait-seconds): look at the network between their devices. {_AGAIN}"
            )
        return None

    def _turns(self, what: Any, value: Any) -> int:
        """For how many turns a value has stayed as it is."""
        before, turns = self._still.get(what, (value, -1))
        turns = turns + 1 if before == value else 0
        self._still[what] = value, turns
        return turns

    def _gone(self, rank: int) -> str:
        said = self._heard.get(rank, Said(name="it never said its name"))
        return (
            f"process {rank} ({said.name}) has not been heard of for {self._silent_seconds:g} s "
            f"(--distributed.heartbeat-seconds); it was at {said.where}. {_AGAIN}"
        )


_AGAIN = "Start all processes again: the run goes on from its last checkpoint"
