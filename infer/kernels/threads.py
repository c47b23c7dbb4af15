"""How many threads compute: XLA's CPU pool has one for each processor that the process may use when JAX starts."""

from __future__ import annotations

import os

from falcon_relu.errors import FalconError


def limit_threads(threads: int) -> None:
    """Keeps this process to `threads` processors; must come before JAX is first asked for a device.

    Raises:
      FalconError: there are not so many processors, or the system cannot limit them.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise FalconError("the number of threads can be set on Linux only; leave it out to use all")
    available = sorted(os.sched_getaffinity(0))
    if not 1 <= threads <= len(available):
        raise FalconError(f"{threads} threads were asked for; this process may use 1 to {len(available)}")
    os.sched_setaffinity(0, available[:threads])
