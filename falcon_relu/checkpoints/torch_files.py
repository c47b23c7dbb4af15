"""Files of torch: tensors by name, nothing else. They are pickles, so only the weights-only loader opens them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from falcon_relu.errors import FalconError
from falcon_relu.files import regular_file


def load_torch(path: Path) -> dict[str, Any]:
    """The tensors of a .bin or .pt file by name, mapped from disk; those of torch before 1.6 are read into memory.

    No code of the file is run.

    Raises:
      FalconError: torch is not installed; or the file is missing, damaged, or holds anything but dense tensors by name.
    """
    try:
        import torch
    except ImportError:
        raise FalconError(
            f"{path} needs torch to be read; install falcon-relu[parity], or get safetensors files"
        ) from None
    with regular_file(path).open("rb") as file:
        zipped = file.read(4) == b"PK\3\4"  # the older format is a bare pickle, which cannot be mapped
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch raises many classes for a damaged or malicious file
        # of a long text of advice, the line that says what the loader met
        found = next((line for line in str(error).splitlines() if "WeightsUnpickler error" in line), first_line(error))
        raise FalconError(f"{path} is not a plain torch weights file: {found[:300]}") from error
    if not isinstance(stored, dict):
        raise FalconError(f"{path} holds a {type(stored).__name__}, not tensors by name")
    for name, tensor in stored.items():
        if not isinstance(name, str):
            raise FalconError(f"{path} has an entry {str(name)[:80]!r} where the name of a tensor is expected")
        dense = isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided and not tensor.is_quantized
        if not dense or tensor.is_meta or tensor.is_nested:
            what = "a tensor without numbers, or not a dense one" if isinstance(tensor, torch.Tensor) else "no tensor"
            raise FalconError(f"{path}: {name[:80]!r} is {what} ({type(tensor).__name__})")
    return stored


def as_numpy(tensor: Any) -> np.ndarray:
    """A torch tensor as an array that shares its memory, bfloat16 included."""
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # numpy has no such type of its own
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def first_line(error: Exception) -> str:
    """The first line of a library's message, or what kind of error it is."""
    return next(iter(str(error).strip().splitlines()), "")[:300] or type(error).__name__
