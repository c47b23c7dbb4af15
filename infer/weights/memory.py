"""Memory for weights: huge pages, aligned so that JAX takes them over without a copy."""

from __future__ import annotations

import math
import mmap
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from falcon_relu.errors import FalconError

_HUGE = 2 << 20


def huge_empty(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """A zeroed array in private memory aligned to 2 MiB, in huge pages where the system has them.

    A page of 4 KiB costs a table walk every other row; with huge pages rows read at random come as fast as a stream.
    `jax.device_put` of such an array on a CPU takes it over without a copy. The memory is returned with the last view.
    """
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if size < _HUGE or not hasattr(mmap, "MAP_ANONYMOUS"):
        return _aligned_empty(shape, dtype, size)
    memory = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
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
    return min(_system_free(), _container_free())


def _system_free() -> float:
    try:
        return _number(Path("/proc/meminfo"), "MemAvailable:") << 10
    except (OSError, StopIteration, ValueError):
        return math.inf


def _container_free() -> float:
    """What the limit of a container (cgroup v2) leaves; files in the page cache make room when asked to."""
    folder = Path("/sys/fs/cgroup")
    try:
        return int((folder / "memory.max").read_text()) - _number(folder / "memory.stat", "anon")
    except (OSError, StopIteration, ValueError):  # not in such a container, or no limit: "max"
        return math.inf


def _number(file: Path, name: str) -> int:
    """The number after `name` in a file of a name and a number a line."""
    return next(int(line.split()[1]) for line in file.read_text().splitlines() if line.split()[:1] == [name])


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype, size: int) -> np.ndarray:
    return _view(np.zeros(size + 64, np.uint8), 64, shape, dtype, size)


def _view(memory: np.ndarray, alignment: int, shape: tuple[int, ...], dtype: np.dtype, size: int) -> np.ndarray:
    start = -memory.ctypes.data % alignment
    return memory[start : start + size].view(dtype).reshape(shape)
