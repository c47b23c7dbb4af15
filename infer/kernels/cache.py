"""A layer's keys or values of a batch of sequences, in the number format of the KV cache."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from infer.weights.formats import as_f32

CacheFormat = Literal["bf16", "f32", "f16", "int8"]
# bf16 is stored as its bits: XLA on CPUs would first convert a whole bf16 array to f32.
_DTYPES = {"bf16": jnp.uint16, "f32": jnp.float32, "f16": jnp.float16, "int8": jnp.int8}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys or values of each position.

    Attributes:
      data: [B, S, K, H] in f32, uint16 (the bits of bf16), f16 or int8.
      scale: int8: [B, S, K] f32, the factor of each position and head. None for the others.
    """

    data: jax.Array
    scale: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, S, K, H)."""
        return self.data.shape

    def wide(self) -> jax.Array:
        """The numbers in f32."""
        wide = as_f32(self.data)
        return wide if self.scale is None else wide * self.scale[..., None]

    def positions(self, start: jax.Array, count: int) -> Cache:
        """`count` positions of every sequence from `start` on."""
        return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, count, 1), self)

    def written(self, slot_BxT: jax.Array, new_BxTxKxH: jax.Array) -> Cache:
        """With new entries in the given slots, in place where the buffers are given up; a slot past the end is skipped.

        int8 is symmetric, with the largest magnitude of a position and head as 127.
        """
        row_Bx1 = jnp.arange(self.data.shape[0])[:, None]

        def put(leaf: jax.Array, new: jax.Array) -> jax.Array:
            return leaf.at[row_Bx1, slot_BxT].set(new, mode="drop")

        if self.scale is None:
            if self.data.dtype == jnp.uint16:
                new = jax.lax.bitcast_convert_type(new_BxTxKxH.astype(jnp.bfloat16), jnp.uint16)
            else:
                new = new_BxTxKxH.astype(self.data.dtype)
            return Cache(put(self.data, new))
        scale_BxTxK = jnp.maximum(jnp.max(jnp.abs(new_BxTxKxH), -1), jnp.finfo(jnp.float32).tiny * 127) / 127
        codes = jnp.rint(new_BxTxKxH / scale_BxTxK[..., None]).astype(jnp.int8)
        return Cache(put(self.data, codes), put(self.scale, scale_BxTxK))


def empty_cache(shape: tuple[int, int, int, int], format: CacheFormat) -> Cache:
    """A cache [B, S, K, H] without entries."""
    return Cache(jnp.zeros(shape, _DTYPES[format]), jnp.zeros(shape[:3]) if format == "int8" else None)


def position_bytes(width: int, format: CacheFormat) -> int:
    """Bytes of one position and head of H = `width`."""
    return width * np.dtype(_DTYPES[format]).itemsize + (4 if format == "int8" else 0)
