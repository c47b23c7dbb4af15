"""The files of one Zarr array: which there are, that TensorStore can read them safely, and their checksums.

TensorStore believes an array's metadata: a chunk of 2^40 numbers ends the process, another dtype or order gives other
numbers. So they are read here first, and every file is held against the size and CRC-32 noted when it was written.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from falcon_relu.checkpoints.schema import parse
from falcon_relu.errors import FalconError
from falcon_relu.files import read_json
from falcon_relu.sharding import Index

METADATA = ".zarray"
DTYPES = {"<f4": np.dtype(np.float32), "<f2": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_MOST_COMPRESSED = 1 << 16  # times: zstd stores 128 KiB of zeros in 4 bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Metadata:
    """An array's .zarray file: Zarr 2, as Orbax and `params_writer` write it."""

    zarr_format: Literal[2]
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: Literal["<f4", "<f2", "bfloat16"]
    order: Literal["C"]
    compressor: dict[str, Any] | None
    fill_value: None
    filters: None
    dimension_separator: Literal["."] = "."


@dataclasses.dataclass(frozen=True)
class Chunks:
    """The files of one array in `folder`.

    Attributes:
      folder: where they are.
      shape: of the array.
      chunk: shape of what one file holds.
      dtype: of the array.
      compressed: whether files are smaller than what they hold.
    """

    folder: Path
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: np.dtype
    compressed: bool

    @classmethod
    def open(cls, folder: Path, shape: Sequence[int]) -> Chunks:
        """Reads the metadata of an array that should be of `shape`.

        Raises:
          FalconError: they are missing, or of another shape, or no numbers that a model has.
        """
        path = folder / METADATA
        found = parse(_Metadata, read_json(path, limit=1 << 20), path)
        if found.shape != tuple(shape):
            raise FalconError(f"{path}: the shape is {list(found.shape)}, but the config wants {list(shape)}")
        if len(found.chunks) != len(shape) or not all(1 <= c <= s for c, s in zip(found.chunks, shape, strict=True)):
            raise FalconError(f"{path}: chunks of {list(found.chunks)} do not fit an array of {list(shape)}")
        return cls(folder, found.shape, found.chunks, DTYPES[found.dtype], found.compressor is not None)

    def names(self, part: Index | None = None) -> list[str]:
        """The files, or those that hold some of a part of the array."""
        part = part or tuple(slice(0, size) for size in self.shape)
        grid = [range(s.start // chunk, -(-s.stop // chunk)) for s, chunk in zip(part, self.chunk, strict=True)]
        return [".".join(map(str, index)) for index in itertools.product(*grid)]

    def check_listed(self, digests: Mapping[str, tuple[int, int]]) -> None:
        """Refuses digests that are not those of exactly these files, or files too small for what they should hold.

        Raises:
          FalconError: as said.
        """
        count = math.prod(-(-size // chunk) for size, chunk in zip(self.shape, self.chunk, strict=True))
        if len(digests) != count + 1 or digests.keys() != {METADATA, *self.names()}:
            raise FalconError(f"{self.folder}: the checksums are not those of the array's {count} files")
        nbytes = math.prod(self.chunk) * self.dtype.itemsize
        for name, (size, _) in digests.items():
            small = size * _MOST_COMPRESSED < nbytes if self.compressed else size != nbytes
            if name != METADATA and small:
                raise FalconError(f"{self.folder / name} has {size:,} bytes, which cannot hold a chunk of {nbytes:,}")
