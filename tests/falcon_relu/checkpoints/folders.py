"""Small checkpoints in the Hugging Face layout made with numpy alone, and what reading one gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from falcon_relu.checkpoints.hf_config import config_to_hf
from falcon_relu.checkpoints.hf_files import write_shards
from falcon_relu.checkpoints.hf_layout import hf_tensors
from falcon_relu.checkpoints.load import parameter_name, stream_model
from falcon_relu.config import FalconConfig, family

CONFIG = family("tiny-40b").with_activation("relu")


def hf_arrays(config: FalconConfig = CONFIG, dtype: object = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors of a checkpoint by name."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=tensor.shape).astype(dtype) for name, tensor in hf_tensors(config).items()}


def write_hf(
    folder: Path, arrays: dict[str, np.ndarray], config: FalconConfig = CONFIG, max_shard_bytes: int = 10**9
) -> Path:
    """A checkpoint of safetensors."""
    folder.mkdir(exist_ok=True)
    sizes = {name: array.nbytes for name, array in arrays.items()}
    write_shards(folder, sizes, arrays.__getitem__, max_shard_bytes)
    (folder / "config.json").write_text(json.dumps(config_to_hf(config, "float32")))
    return folder


def numbers(folder: Path) -> dict[str, bytes]:
    """Config and every parameter that a checkpoint gives, to be compared."""
    config, pieces = stream_model(folder)
    found = {parameter_name(leaf, layer): array.tobytes() for leaf, layer, array in pieces}
    return found | {"config": repr(config).encode()}
