"""Number formats of decode weights: the layout of a row of a matrix in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from infer.weights.int4 import INT4_GROUP, NORMAL_LEVELS, int4_row_bytes, widen_int4

Format = Literal["f32", "bf16", "f16", "int8", "int4"]
Array = jax.Array | np.ndarray

# bf16 is stored as uint16: XLA on CPUs would first convert a whole bf16 array to f32.
DTYPES: dict[Format, np.dtype] = {
    "f32": np.dtype(np.float32),
    "bf16": np.dtype(np.uint16),
    "f16": np.dtype(np.float16),
    "int8": np.dtype(np.int8),
    "int4": np.dtype(np.uint8),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """A matrix of which whole rows are read.

    Attributes:
      data: [M, D] in f32, uint16 (the bits of bf16), f16 or int8. int4: uint8 [M, bytes of a row], the groups' scales
        included.
      scale: int8: [M] f32, the factor of each row. int4: [16] f32, the levels of the codes, whole numbers from -128 to
        127; a weight is its level times its group's scale. None for the others.
      columns: int4: D. None for the others, whose data has D columns.
      group: int4: columns that share a scale, 32 or 64. None for the others.
    """

    data: Array
    scale: Array | None = None
    columns: int | None = dataclasses.field(default=None, metadata=dict(static=True))
    group: int | None = dataclasses.field(default=None, metadata=dict(static=True))

    @property
    def format(self) -> Format:
        """The name of the number format."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.data.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """(M, D)."""
        return self.data.shape[0], self.data.shape[1] if self.columns is None else self.columns

    @property
    def row_bytes(self) -> int:
        """Bytes read for one row."""
        return self.data.shape[1] * self.data.dtype.itemsize + (4 if self.format == "int8" else 0)

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        return self.shape[0] * self.row_bytes


def rows_like(M: int, D: int, format: Format) -> Rows:
    """Shape and dtype of a matrix [M, D] in `format`, without memory behind it."""

    def array(*shape: int, dtype: Any = np.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    if format == "int4":
        data = array(M, int4_row_bytes(D, INT4_GROUP), dtype=DTYPES[format])
        return Rows(data, array(len(NORMAL_LEVELS)), D, INT4_GROUP)
    return Rows(array(M, D, dtype=DTYPES[format]), array(M) if format == "int8" else None)


# ---- back to f32


def widen(rows: Rows) -> jax.Array:
    """The matrix [M, D] in f32."""
    data = jnp.asarray(rows.data)
    if rows.columns is not None and rows.group is not None:
        return widen_int4(data, jnp.asarray(rows.scale), rows.columns, rows.group)
    wide = as_f32(data)
    return wide if rows.scale is None else wide * jnp.asarray(rows.scale)[:, None]


def as_f32(data: jax.Array) -> jax.Array:
    """Numbers of any shape and dtype in f32; uint16 holds the bits of bf16."""
    if data.dtype == jnp.uint16:
        return lax.bitcast_convert_type(data.astype(jnp.uint32) << 16, jnp.float32)
    return data.astype(jnp.float32)


def take(rows: Rows, index_N: jax.Array) -> jax.Array:
    """The rows [N, D] in f32 with the numbers `index_N`, which must be within the matrix."""
    return widen(part(rows, lambda leaf: leaf.at[index_N].get(mode="promise_in_bounds")))


def part(rows: Rows, of: Callable[[jax.Array], jax.Array]) -> Rows:
    """Some rows of a matrix: `of` is applied to each array that has an entry a row."""
    scale = of(jnp.asarray(rows.scale)) if rows.format == "int8" else rows.scale
    return dataclasses.replace(rows, data=of(jnp.asarray(rows.data)), scale=scale)
