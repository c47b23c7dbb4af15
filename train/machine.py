"""What a process sets once, before JAX starts: XLA's flags, and the C library's allocator."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
from collections.abc import MutableMapping
from pathlib import Path

# Platform -> (environment variable, flags): they let collectives run beside products. What each does: docs/plan.md.
RECOMMENDED: dict[str, tuple[str, tuple[str, ...]]] = {
    "tpu": (
        "LIBTPU_INIT_ARGS",
        (
            "--xla_tpu_enable_async_collective_fusion=true",
            "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
            "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
            "--xla_tpu_overlap_compute_collective_tc=true",
            "--xla_enable_async_all_gather=true",
        ),
    ),
    "gpu": (
        "XLA_FLAGS",
        (
            "--xla_gpu_enable_latency_hiding_scheduler=true",
            "--xla_gpu_enable_highest_priority_async_stream=true",
            "--xla_gpu_enable_pipelined_all_gather=true",
            "--xla_gpu_enable_pipelined_reduce_scatter=true",
            "--xla_gpu_enable_pipelined_all_reduce=true",
            "--xla_gpu_enable_while_loop_double_buffering=true",
            "--xla_gpu_all_gather_combine_threshold_bytes=1073741824",
            "--xla_gpu_reduce_scatter_combine_threshold_bytes=1073741824",
            "--xla_gpu_all_reduce_combine_threshold_bytes=1073741824",
        ),
    ),
}


def platform_here() -> str:
    """One of "tpu", "gpu", "cpu": what JAX will find on this machine, told without starting it."""
    wanted = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    if wanted:
        return {"cuda": "gpu"}.get(wanted, wanted)
    chips = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    if chips and importlib.util.find_spec("libtpu"):
        return "tpu"
    return "gpu" if Path("/dev/nvidiactl").exists() else "cpu"


def recommend(platform: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets the flags of a platform, unless the user has set that variable: then it stays as it is."""
    if platform in RECOMMENDED:
        variable, flags = RECOMMENDED[platform]
        environment.setdefault(variable, " ".join(flags))


# mallopt(3) of glibc: M_ARENA_MAX (one heap for all threads), M_MMAP_MAX (no block outside it), M_TRIM_THRESHOLD
# (nothing given back).
_ALLOCATOR = ((-8, 1), (-4, 0), (-1, 2**31 - 1))


def keep_freed_memory() -> None:
    """Makes the process keep the memory that it frees, on glibc; elsewhere nothing happens.

    A CPU training step allocates the same buffers again each time; memory that went back to the system is zeroed again
    page by page, which took a fifth of a step's time. Must be called before JAX starts its threads.
    """
    with contextlib.suppress(OSError, AttributeError):
        for parameter, value in _ALLOCATOR:
            ctypes.CDLL("libc.so.6").mallopt(parameter, value)
