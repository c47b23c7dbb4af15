"""What decoding computes on rows of weights: one signature, two backends.

    rows_dot(w, x_BxD) -> y_BxM                           every row with every vector
    gathered_rows_dot(w, index_A, count, x_BxD) -> h_BxA  the rows that index_A[:count] names; 0 past them
    weighted_row_sum(w, h_BxA, index_A, count) -> y_BxD   sum of the rows (those named, if there is an index) times h
    rows_matmul(w, x, count) -> y, weighted_rows_matmul(w, h, count) -> y   both products for many vectors, in bf16
    select(score_BxF, threshold, budget) -> index_F, count, chosen_BxF   the neurons to read: all, and by sequence
    attend(q_BxTxKxGxH, keys, values, length_BxT)         attention over the valid part of a cache
    read_rows(w, index_A, count, seen)                    reads only, to measure the memory bandwidth

A batch is a few sequences that share one read of each row. Everything is computed in f32, whatever the rows' format.
`xla` is pure JAX and runs everywhere; `native` is C++ and runs at the speed of memory.
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal

from falcon_relu.errors import FalconError
from infer.kernels import native, xla

Backend = Literal["auto", "native", "xla"]


def available() -> tuple[Backend, ...]:
    """The backends that can be used here, the fastest first."""
    return ("xla",) if native.missing() else ("native", "xla")


def backend(name: Backend = "auto") -> ModuleType:
    """The module with the kernels; "auto" is native where it was built.

    Raises:
      FalconError: the native kernels are asked for and not there; the message says why.
    """
    if name == "xla" or (name == "auto" and native.missing() is not None):
        return xla
    if (reason := native.missing()) is not None:
        raise FalconError(
            f"the native kernels cannot be used: {reason}; use the xla backend or reinstall with a C++17 compiler"
        )
    return native


def fallback(name: Backend) -> str | None:
    """Why "auto" means the slower backend here, in a line; None where it does not, or where "auto" is not asked for."""
    if name != "auto" or (reason := native.missing()) is None:
        return None
    return f"The native kernels cannot be used: {reason}. Decoding goes through XLA, several times slower."


def describe(kernels: ModuleType) -> str:
    """The backend in use, as shown to a person."""
    return f"native ({native.instruction_set()})" if kernels is native else "xla"
