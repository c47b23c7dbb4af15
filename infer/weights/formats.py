"""Number formats of decode weights: the layout of a row of a matrix in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from falcon_relu.errors import FalconError
from infer.weights.memory import huge_empty

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
_CONVERTED_ROWS = 1024  # converted at a time, so that there is never a second copy of a matrix in memory
_INT4_ROWS = 128  # rounded at a time, with several scales, while they are in the cache

# An int4 row is blocks of 512 columns, 16 runs of 32 each. Byte 64 i + 4 r + c of a block holds columns 8 i + c
# (low four bits) and 8 i + 4 + c (high) of run r, for i < 4 and c < 4, each as the number of a level: all codes in a
# 32-bit lane of a vector belong to one run, and so have one scale. After all blocks come the groups' scales in f16.
INT4_BLOCK, _RUNS = 512, 16
INT4_GROUP = 32
# The values (levels) of the 16 codes. Those of Q4_0 are evenly spaced. Those of IQ4_NL are denser around 0, where most
# weights are: a quarter less squared error on normally distributed weights.
EVEN_LEVELS = tuple(range(-8, 8))
NORMAL_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# Levels to which the number of largest magnitude of a group is scaled; the scale with the least error is used.
_PEAKS = (*range(-136, -90, 4), 100, 106, 112, 118)


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
        data = array(M, _int4_row_bytes(D, INT4_GROUP), dtype=DTYPES[format])
        return Rows(data, array(len(NORMAL_LEVELS)), D, INT4_GROUP)
    return Rows(array(M, D, dtype=DTYPES[format]), array(M) if format == "int8" else None)


def quantise(x_MxD: Array, format: Format, importance_D: Array | None = None) -> Rows:
    """Rows in `format`, in huge pages, from any float matrix, converted block by block.

    int8 is symmetric with one scale a row, max|row| / 127: no number is off by more than half of its row's scale. int4
    has a scale for every `INT4_GROUP` columns, chosen for the least squared error; see `int4_codes`.

    Args:
      x_MxD: the matrix.
      format: what to convert to.
      importance_D: int4 only: weight of the squared error of each column, such as the second moment of the input that
        it is multiplied with; equal weights if None.

    Raises:
      FalconError: the format is unknown, or a number is not finite or does not fit into f16.
    """
    if format not in get_args(Format):
        raise FalconError(f"unknown number format {format!r}; there are: {', '.join(get_args(Format))}")
    M, D = x_MxD.shape
    like = rows_like(M, D, format)
    data = huge_empty(like.data.shape, like.data.dtype)
    scale = np.empty(M, np.float32) if format == "int8" else None
    at_once = _INT4_ROWS if format == "int4" else _CONVERTED_ROWS
    for start in range(0, M, at_once):
        block = np.asarray(x_MxD[start : start + at_once], np.float32)
        if not np.isfinite(block).all():
            raise FalconError(f"rows {start} to {start + len(block) - 1} hold numbers that are not finite")
        rows = slice(start, start + len(block))
        if format == "int4":
            codes, scales = int4_codes(block, np.ones(D, np.float32) if importance_D is None else importance_D)
            data[rows] = pack_int4(np.asarray(codes), np.asarray(scales))
        elif scale is not None:
            scale[rows] = np.maximum(np.abs(block).max(axis=1), np.finfo(np.float32).tiny) / 127
            data[rows] = np.rint(block / scale[rows, None])
        else:
            if format == "f16" and np.abs(block).max() > np.finfo(np.float16).max:
                raise FalconError(f"rows {start} to {start + len(block) - 1} hold numbers too large for f16; use bf16")
            data[rows] = block.astype(ml_dtypes.bfloat16).view(np.uint16) if format == "bf16" else block
    return Rows(data, np.array(NORMAL_LEVELS, np.float32) if format == "int4" else scale, like.columns, like.group)


# ---- int4


@jax.jit
def int4_codes(x_MxD: Array, importance_D: Array) -> tuple[jax.Array, jax.Array]:
    """Codes of `NORMAL_LEVELS` and a scale for each group: of several scales, the one with the least weighted error.

    Each attempt scales the number of largest magnitude to another value of `_PEAKS`, rounds all numbers to the nearest
    level, and then fits the scale to the levels by weighted least squares, as the quantisers of llama.cpp do.

    Args:
      x_MxD: f32.
      importance_D: weight of the squared error of each column, f32, at least 0.

    Returns:
      Codes from 0 to 15, uint8 [M, D], and scales, f16 [M, groups].
    """
    M, D = x_MxD.shape
    padding = -D % INT4_GROUP
    x = jnp.pad(jnp.asarray(x_MxD), ((0, 0), (0, padding))).reshape(M, -1, INT4_GROUP)
    weight = jnp.pad(jnp.asarray(importance_D, jnp.float32), (0, padding)).reshape(1, -1, INT4_GROUP)
    peak = jnp.take_along_axis(x, jnp.argmax(jnp.abs(x), axis=-1, keepdims=True), axis=-1)
    levels, peaks = np.array(NORMAL_LEVELS, np.float32), jnp.array(_PEAKS, jnp.float32)

    def code(scaled: jax.Array) -> jax.Array:
        return sum((scaled > middle).astype(jnp.float32) for middle in (levels[1:] + levels[:-1]) / 2)

    def level(scaled: jax.Array) -> jax.Array:
        steps = zip((levels[1:] + levels[:-1]) / 2, np.diff(levels), strict=True)
        return sum((jnp.where(scaled > middle, step, 0) for middle, step in steps), jnp.float32(levels[0]))

    def attempt(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        least, chosen = best
        q = level(x * jnp.where(peak == 0, 0, peaks[i] / peak))
        fit = jnp.sum(weight * q * q, -1, keepdims=True)
        scale = jnp.where(fit > 0, jnp.sum(weight * q * x, -1, keepdims=True) / fit, 0)
        scale = scale.astype(jnp.float16).astype(jnp.float32)
        error = jnp.sum(weight * jnp.square(x - scale * q), -1, keepdims=True)
        better = error < least
        return jnp.where(better, error, least), jnp.where(better, scale, chosen)

    start = jnp.full_like(peak, jnp.inf), jnp.zeros_like(peak)
    _, scale = lax.fori_loop(0, len(_PEAKS), attempt, start)
    codes = code(x * jnp.where(scale == 0, 0, 1 / scale)).astype(jnp.uint8)
    return codes.reshape(M, -1)[:, :D], scale[..., 0].astype(jnp.float16)


def pack_int4(codes_MxD: np.ndarray, scales_MxG: np.ndarray, group: int = INT4_GROUP) -> np.ndarray:
    """Rows as stored, uint8 [M, bytes], from codes 0 to 15 and f16 scales; see the top of this module for the layout.

    Columns of padding have a scale of 0.
    """
    M, D = codes_MxD.shape
    blocks = -(-D // INT4_BLOCK)
    codes = np.zeros((M, blocks * INT4_BLOCK), np.uint8)
    codes[:, :D] = codes_MxD
    low_high = codes.reshape(M, blocks, _RUNS, 4, 2, 4)
    packed = (low_high[..., 0, :] | low_high[..., 1, :] << 4).transpose(0, 1, 3, 2, 4)
    scales = np.zeros((M, blocks * INT4_BLOCK // group), np.float16)
    scales[:, : scales_MxG.shape[1]] = scales_MxG
    return np.concatenate([packed.reshape(M, -1), scales.view(np.uint8)], axis=1)


def _int4_row_bytes(D: int, group: int) -> int:
    return -(-D // INT4_BLOCK) * (INT4_BLOCK // 2 + 2 * INT4_BLOCK // group)


def _widen_int4(rows: Rows, columns: int, group: int) -> jax.Array:
    data, levels = jnp.asarray(rows.data), jnp.asarray(rows.scale)
    R, blocks = len(data), -(-columns // INT4_BLOCK)
    packed = data[:, : blocks * INT4_BLOCK // 2].reshape(R, blocks, 4, _RUNS, 4)
    low_high = jnp.stack([packed & 15, packed >> 4], axis=4)  # block, i, run, low or high, c
    codes = low_high.transpose(0, 1, 3, 2, 4, 5).reshape(R, -1, group)
    scales = lax.bitcast_convert_type(data[:, blocks * INT4_BLOCK // 2 :].reshape(R, -1, 2), jnp.float16)
    wide = levels.at[codes].get(mode="promise_in_bounds") * scales.astype(jnp.float32)[..., None]
    return wide.reshape(R, -1)[:, :columns]


# ---- back to f32


def widen(rows: Rows) -> jax.Array:
    """The matrix [M, D] in f32."""
    data = jnp.asarray(rows.data)
    if rows.columns is not None and rows.group is not None:
        return _widen_int4(rows, rows.columns, rows.group)
    if data.dtype == jnp.uint16:
        return lax.bitcast_convert_type(data.astype(jnp.uint32) << 16, jnp.float32)
    wide = data.astype(jnp.float32)
    return wide if rows.scale is None else wide * jnp.asarray(rows.scale)[:, None]


def take(rows: Rows, index_N: jax.Array) -> jax.Array:
    """The rows [N, D] in f32 with the numbers `index_N`, which must be within the matrix."""
    return widen(part(rows, lambda leaf: leaf.at[index_N].get(mode="promise_in_bounds")))


def part(rows: Rows, of: Callable[[jax.Array], jax.Array]) -> Rows:
    """Some rows of a matrix: `of` is applied to each array that has an entry a row."""
    scale = of(jnp.asarray(rows.scale)) if rows.format == "int8" else rows.scale
    return dataclasses.replace(rows, data=of(jnp.asarray(rows.data)), scale=scale)
