"""Checksums of files: bytes and CRC-32, noted when a file is written and held against it when it is read.

They find what was changed by accident; they do not tell who made a file.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np

from falcon_relu.errors import FalconError
from falcon_relu.files import regular_file

Digest = tuple[int, int]  # bytes, CRC-32
Digests = dict[str, Digest]  # by file name

_BLOCK = 1 << 20  # bytes read and summed at a time, while they are in cache


def digest(path: Path) -> Digest:
    """Bytes and CRC-32 of a regular file."""
    checksum, size = 0, 0
    buffer = bytearray(_BLOCK)
    with regular_file(path).open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            checksum = zlib.crc32(memoryview(buffer)[:count], checksum)
            size += count
    return size, checksum


def check_digest(path: Path, wanted: Digest, advice: str) -> None:
    """Refuses a file that is not what was written; `advice` says in the error what to do about it.

    Raises:
      FalconError: it is missing, or was changed, or cut short.
    """
    _check_size(path, wanted, advice)
    if digest(path) != wanted:
        raise FalconError(f"{path} is damaged: its checksum does not match; {advice}")


def read_checked(path: Path, wanted: Digest, advice: str) -> bytes:
    """The content of a file that fits into memory, read once; errors as `check_digest`."""
    _check_size(path, wanted, advice)
    content = path.read_bytes()
    if (len(content), zlib.crc32(content)) != wanted:
        raise FalconError(f"{path} is damaged: its checksum does not match; {advice}")
    return content


def _check_size(path: Path, wanted: Digest, advice: str) -> None:
    size = regular_file(path).stat().st_size
    if size != wanted[0]:
        raise FalconError(f"{path} is damaged: it has {size:,} bytes instead of {wanted[0]:,}; {advice}")


def bytes_digest(array: np.ndarray) -> Digest:
    """What `digest` gives of a file that holds just this array."""
    return array.nbytes, zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
