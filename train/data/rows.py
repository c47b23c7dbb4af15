"""Which rows of a batch the devices of this process hold."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from falcon_relu.sharding import batch_sharding, check_shared
from train.data.batches import Batch


class Rows:
    """Which rows of every global batch the devices of this process hold, and how they become global arrays.

    Attributes:
      own: the rows, ascending; the same in processes whose devices hold different parts of the same model replica.
      parts: number of parts into which the devices divide a batch.
    """

    def __init__(self, mesh: Mesh, batch_size: int):
        """Determines the rows.

        Raises:
          FalconError: the batch cannot be divided evenly.
        """
        self.parts = check_shared(mesh, batch_size)
        self._sharding = batch_sharding(mesh)
        self._batch_size = batch_size
        held = self._sharding.addressable_devices_indices_map((batch_size,)).values()
        self.own = np.unique(np.concatenate([np.arange(batch_size)[index] for index in held]))

    def to_global(self, batch: Batch) -> Batch:
        """Global arrays [B, ...], sharded over the mesh, from this process's rows of each."""

        def place(rows: np.ndarray) -> jax.Array:
            def block(index: Any) -> np.ndarray:
                start, stop, _ = index[0].indices(self._batch_size)
                first = int(np.searchsorted(self.own, start))
                return rows[first : first + stop - start]

            return jax.make_array_from_callback((self._batch_size, *rows.shape[1:]), self._sharding, block)

        return jax.tree.map(place, batch)
