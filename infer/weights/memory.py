"""Memory for weights: huge pages that JAX uses without a copy, how much is free, and how fast it can be read."""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import math
import mmap
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from falcon_relu.errors import FalconError
from infer.weights.library import native_library

_HUGE = 2 << 20
_MEMINFO, _CGROUPS, _CGROUP_ROOT = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def huge_empty(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """A zeroed array in private memory aligned to 2 MiB, in huge pages where the system has them.

    With pages of 4 KiB, rows in any other order than theirs cost page table walks; with huge pages they are read as
    fast as consecutive ones. `jax.device_put` of such an array on a CPU uses its memory without a copy. The memory is
    freed with the last array that uses it.
    """
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if size < _HUGE or not hasattr(mmap, "MAP_ANONYMOUS"):
        return _aligned_empty(shape, dtype, size)
    memory = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages: ordinary pages work too, only slower
            memory.madvise(mmap.MADV_HUGEPAGE)
    return _view(np.frombuffer(memory, np.uint8), _HUGE, shape, dtype, size)


def need_memory(size: int, what: str) -> None:
    """Makes sure that `size` bytes are free, where the system reports free memory.

    Raises:
      FalconError: `what` needs more memory than is free.
    """
    free = free_memory()
    if size > free:
        raise FalconError(
            f"{what} need {size / 1e9:,.1f} GB of memory and {free / 1e9:.1f} GB are free; use a smaller number format "
            "or a machine with more memory"
        )


def free_memory() -> float:
    """Bytes of memory that this process can still allocate; infinite where the system does not report it."""
    return max(min(_system_free(), *_container_free(), _limit_free()), 0.0)


def _system_free() -> float:
    try:
        return _number(_MEMINFO, "MemAvailable:") << 10
    except (OSError, StopIteration, ValueError):
        return math.inf


def _container_free() -> list[float]:
    """Bytes left below the memory limit of each of this process's control groups (containers).

    Cached pages of files do not count as used: the kernel frees them when memory is needed.
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
    """Bytes left below the limit on this process's address space (ulimit -v)."""
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (ImportError, OSError, ValueError):
        return math.inf
    return math.inf if limit == resource.RLIM_INFINITY else limit - taken


def _number(file: Path, name: str) -> int:
    """The number after `name` in a file whose lines are a name and a number."""
    return next(int(line.split()[1]) for line in file.read_text().splitlines() if line.split()[:1] == [name])


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype, size: int) -> np.ndarray:
    return _view(np.zeros(size + 64, np.uint8), 64, shape, dtype, size)


def _view(memory: np.ndarray, alignment: int, shape: tuple[int, ...], dtype: np.dtype, size: int) -> np.ndarray:
    start = -memory.ctypes.data % alignment
    return memory[start : start + size].view(dtype).reshape(shape)


# ---- bandwidth

_WAYS = 6  # in which infer/native/bandwidth.cc reads: one stream and several, with and without prefetch
_TOGETHER = 4096  # bytes: what a thread reads is a multiple


def reading_rates(data: np.ndarray, ways: Sequence[int] = range(_WAYS)) -> dict[int, float]:
    """Bytes a second that all threads together read from an array, in each way; empty without the native library.

    Whatever instruction set the kernels use, the widest loads of this CPU read here.
    """
    try:
        read = native_library().falcon_read
    except OSError:
        return {}
    threads = usable_cores()
    start = -data.ctypes.data % _TOGETHER
    part = (data.nbytes - start) // threads // _TOGETHER * _TOGETHER
    rates = {}
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(time.sleep, [0.001] * threads))  # starts the threads
        for way in ways:

            def one(thread: int, way: int = way) -> None:
                address = data.ctypes.data + start + thread * part
                read(ctypes.c_void_p(address), ctypes.c_int64(part), ctypes.c_int64(way))

            begun = time.perf_counter()
            list(pool.map(one, range(threads)))
            rates[way] = part * threads / (time.perf_counter() - begun)
    return rates


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
