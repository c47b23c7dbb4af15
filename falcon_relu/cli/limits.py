"""Limits of the shell (`ulimit`) that end a library by abort() or in tracebacks of its own: said before the work."""

from __future__ import annotations

import os
import resource

from falcon_relu.errors import FalconError

_FILES = 32  # open at once, by a command on the smallest model
_WANTED_FILES = 4096
_LIBRARIES = 2 << 30  # bytes of addresses that JAX and its threads' stacks take on two cores, before any weights
_CORE = 64 << 20  # bytes of addresses for the threads of another core


def check_limits() -> None:
    """Takes as many open files as may be had, and refuses limits below which no model runs.

    Raises:
      FalconError: memory or open files are limited to less than the libraries take.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _WANTED_FILES if hard == resource.RLIM_INFINITY else min(hard, _WANTED_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < _FILES:
        raise FalconError(f"only {most} files may be open at once here: allow {_FILES} or more with ulimit -n")
    addresses, _ = resource.getrlimit(resource.RLIMIT_AS)
    least = _LIBRARIES + _CORE * (os.cpu_count() or 1)
    if addresses != resource.RLIM_INFINITY and addresses < least:
        raise FalconError(
            f"memory is limited to {addresses / 1e9:.1f} GB here (ulimit -v), and the libraries alone take "
            f"{least / 1e9:.1f} GB of addresses: raise the limit"
        )
