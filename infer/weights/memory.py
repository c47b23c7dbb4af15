"""Memory for weights: huge pages, aligned so that JAX takes them over without a copy."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from falcon_relu.errors import FalconError

_HUGE = 2 << 20
_MEMINFO, _CGROUPS, _CGROUP_ROOT = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def huge_empty(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """A zeroed array in private memory aligned to 2 MiB, in huge pages where the system has them.

    With pages of 4 KiB every other row costs a walk of the page table; with huge pages, rows in any order are read as
    fast as a stream. `jax.device_put` of such an array on a CPU takes it over without a copy. The last view frees it.
    """
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if size < _HUGE or not hasattr(mmap, "MAP_ANONYMOUS"):
        return _aligned_empty(shape, dtype, size)
    memory = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages: ordinary ones are slower, nothing else
            memory.madvise(mmap.MADV_HUGEPAGE)
    return _view(np.frombuffer(memory, np.uint8), _HUGE, shape, dtype, size)


def need_memory(size: int, what: str) -> None:
    """Refuses what cannot fit before anything is read, where the system tells how much memory is free.

    Raises:
      FalconError: `what` needs more than is available.
    """
    free = free_memory()
    if size > free:
        raise FalconError(
            f"{what} need {size / 1e9:,.1f} GB of memory and {free / 1e9:.1f} GB are free; use a smaller number format "
            "or a machine with more memory"
        )


def free_memory() -> float:
    """Bytes that this process may still take, as far as the system tells; infinite where it does not."""
    return max(min(_system_free(), *_container_free(), _limit_free()), 0.0)


def _system_free() -> float:
    try:
        return _number(_MEMINFO, "MemAvailable:") << 10
    except (OSError, StopIteration, ValueError):
        return math.inf


def _container_free() -> list[float]:
    """What the memory limits of the control groups that this process is in leave, one for each limit.

    Pages of files do not count: they make room when memory is asked for.
    """
    try:
        groups = [line.split(":", 2) for line in _CGROUPS.read_text().splitlines()]
    except OSError:
        return []
    left: list[float] = []
    for _, controllers, path in groups:
        if controllers == "":  # version 2
            root, limit, used = _CGROUP_ROOT, "memory.max", "anon"
        elif "memory" in controllers.split(","):
            root, limit, used = _CGROUP_ROOT / "memory", "memory.limit_in_bytes", "total_rss"
        else:
            continue
        inner = root / path.lstrip("/")
        # In a container the path may be the host's, which cannot be seen there: the root is then the container's group.
        for folder in [inner, *inner.parents]:
            with contextlib.suppress(OSError, StopIteration, ValueError):  # no such folder, or no limit: "max"
                left.append(int((folder / limit).read_text()) - _number(folder / "memory.stat", used))
            if folder == root:
                break
    return left


def _limit_free() -> float:
    """What the limit on this process's address space (ulimit -v) leaves."""
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (ImportError, OSError, ValueError):
        return math.inf
    return math.inf if limit == resource.RLIM_INFINITY else limit - taken


def _number(file: Path, name: str) -> int:
    """The number after `name` in a file of a name and a number a line."""
    return next(int(line.split()[1]) for line in file.read_text().splitlines() if line.split()[:1] == [name])


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype, size: int) -> np.ndarray:
    return _view(np.zeros(size + 64, np.uint8), 64, shape, dtype, size)


def _view(memory: np.ndarray, alignment: int, shape: tuple[int, ...], dtype: np.dtype, size: int) -> np.ndarray:
    start = -memory.ctypes.data % alignment
    return memory[start : start + size].view(dtype).reshape(shape)
