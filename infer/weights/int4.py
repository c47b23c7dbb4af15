"""int4 rows: codes of 16 levels, packed, and a scale for every 32 columns."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# An int4 row is blocks of 512 columns, 16 runs of 32 each. Byte 64 i + 4 r + c of a block holds columns 8 i + c
# (low four bits) and 8 i + 4 + c (high) of run r, for i < 4 and c < 4, each as the number of a level: all codes in a
# 32-bit lane of a vector belong to one run, and so have one scale. After all blocks come the groups' scales in f16.
INT4_BLOCK, _RUNS = 512, 16
INT4_GROUP = 32
# The values (levels) of the 16 codes. Those of Q4_0 are evenly spaced. Those of IQ4_NL are denser around 0, where most
# weights are: a quarter less squared error on normally distributed weights.
EVEN_LEVELS = tuple(range(-8, 8))
NORMAL_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


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


def int4_row_bytes(D: int, group: int) -> int:
    """Bytes of a row as stored."""
    return -(-D // INT4_BLOCK) * (INT4_BLOCK // 2 + 2 * INT4_BLOCK // group)


def widen_int4(data: jax.Array, levels: jax.Array, columns: int, group: int) -> jax.Array:
    """The matrix [M, columns] in f32 from rows as stored and the 16 levels."""
    R, blocks = len(data), -(-columns // INT4_BLOCK)
    packed = data[:, : blocks * INT4_BLOCK // 2].reshape(R, blocks, 4, _RUNS, 4)
    low_high = jnp.stack([packed & 15, packed >> 4], axis=4)  # block, i, run, low or high, c
    codes = low_high.transpose(0, 1, 3, 2, 4, 5).reshape(R, -1, group)
    scales = lax.bitcast_convert_type(data[:, blocks * INT4_BLOCK // 2 :].reshape(R, -1, 2), jnp.float16)
    wide = levels.at[codes].get(mode="promise_in_bounds") * scales.astype(jnp.float32)[..., None]
    return wide.reshape(R, -1)[:, :columns]
