"""Number formats of decode weights: what one row of a matrix looks like in memory."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from falcon_relu.errors import FalconError
from infer.weights.memory import huge_empty

Format = Literal["f32", "bf16", "f16", "int8"]
Array = jax.Array | np.ndarray

# A bf16 is kept as its bits: XLA:CPU widens an array that it knows to be bf16 whole, before anything else.
DTYPES: dict[Format, np.dtype] = {
    "f32": np.dtype(np.float32),
    "bf16": np.dtype(np.uint16),
    "f16": np.dtype(np.float16),
    "int8": np.dtype(np.int8),
}
_BLOCK = 1024  # rows converted at a time, so that no second copy of a matrix is ever held


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """A matrix of which whole rows are read.

    Attributes:
      data: [M, D] in f32, uint16 (the bits of bf16), f16 or int8.
      scale: [M] f32, what one step of a row is worth; None where the numbers stand for themselves.
    """

    data: Array
    scale: Array | None = None

    @property
    def format(self) -> Format:
        """The name of the number format."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.data.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """(M, D)."""
        return self.data.shape  # type: ignore[return-value]

    @property
    def row_bytes(self) -> int:
        """Bytes read for one row."""
        return self.shape[1] * self.data.dtype.itemsize + (0 if self.scale is None else 4)

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        return self.shape[0] * self.row_bytes


def quantise(x_MxD: Array, format: Format) -> Rows:
    """Rows in `format`, in huge pages, from any float matrix, converted block by block.

    int8 is symmetric with one scale a row, max|row| / 127: no number is off by more than half of its row's scale.

    Raises:
      FalconError: the format is unknown, or a number is not finite or does not fit into f16.
    """
    if format not in get_args(Format):
        raise FalconError(f"unknown number format {format!r}; there are: {', '.join(get_args(Format))}")
    M, D = x_MxD.shape
    data = huge_empty((M, D), DTYPES[format])
    scale = np.empty(M, np.float32) if format == "int8" else None
    for start in range(0, M, _BLOCK):
        block = np.asarray(x_MxD[start : start + _BLOCK], np.float32)
        if not np.isfinite(block).all():
            raise FalconError(f"rows {start} to {start + len(block) - 1} hold numbers that are not finite")
        rows = slice(start, start + len(block))
        if scale is not None:
            scale[rows] = np.maximum(np.abs(block).max(axis=1), np.finfo(np.float32).tiny) / 127
            data[rows] = np.rint(block / scale[rows, None])
        else:
            if format == "f16" and np.abs(block).max() > np.finfo(np.float16).max:
                raise FalconError(f"rows {start} to {start + len(block) - 1} hold numbers too large for f16; use bf16")
            data[rows] = block.astype(ml_dtypes.bfloat16).view(np.uint16) if format == "bf16" else block
    return Rows(data, scale)


def widen(data: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    """Rows [R, D] in f32 from some rows of `Rows.data` and, where there is one, of `Rows.scale`."""
    if data.dtype == jnp.uint16:
        wide = lax.bitcast_convert_type(data.astype(jnp.uint32) << 16, jnp.float32)
    else:
        wide = data.astype(jnp.float32)
    return wide if scale is None else wide * scale[:, None]


def take(rows: Rows, index_N: jax.Array) -> jax.Array:
    """The rows [N, D] in f32 that `index_N`, which must lie within the matrix, names."""
    some = lambda leaf: jnp.asarray(leaf).at[index_N].get(mode="promise_in_bounds")  # noqa: E731
    return widen(some(rows.data), None if rows.scale is None else some(rows.scale))


def dequantise(rows: Rows) -> jax.Array:
    """The matrix [M, D] in f32."""
    return widen(jnp.asarray(rows.data), None if rows.scale is None else jnp.asarray(rows.scale))
