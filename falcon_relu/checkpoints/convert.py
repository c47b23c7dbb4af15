"""Converting checkpoints, one tensor at a time: Hugging Face to native weights, and native weights to Hugging Face."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np

from falcon_relu.checkpoints.hf_config import config_to_hf
from falcon_relu.checkpoints.hf_files import write_shards
from falcon_relu.checkpoints.hf_layout import EMBEDDING, hf_tensors
from falcon_relu.checkpoints.load import open_model
from falcon_relu.checkpoints.native import params_reader, params_writer
from falcon_relu.config import Activation, FalconConfig
from falcon_relu.errors import FalconError, check_number
from falcon_relu.files import write_aside, write_json
from falcon_relu.progress import progress
from falcon_relu.sharding import param_shapes
from falcon_relu.tokenizer import END_OF_TEXT, tokenizer_file

Float = Literal["float32", "bfloat16", "float16"]


def import_hf(
    source: str | Path,
    out: Path,
    *,
    activation: Activation | None = None,
    dtype: Float | None = None,
    replace: bool = False,
) -> FalconConfig:
    """Writes a Hugging Face checkpoint as native weights at `out`, which appears only once it is complete.

    Args:
      source: folder in the Hugging Face layout, or hub id `owner/name[@revision]`.
      out: folder to make.
      activation: the MLP activation, where the config does not state it.
      dtype: of the weights written; as stored if None.
      replace: whether existing native weights may be replaced.

    Raises:
      FalconError: as `load_model`; or `out` exists, or a value does not fit `dtype`.
    """
    with open_model(source, activation=activation) as stored:
        config = stored.config
        dtypes = dict.fromkeys(param_shapes(config), np.dtype(dtype)) if dtype else stored.dtypes()
        with params_writer(out, config, dtypes, replace=replace) as write:
            for tensor in stored.tensors(f"converting {source}"):
                array = stored.read(tensor, None)
                write(tensor.leaf, tensor.layer, cast(array, dtypes[tensor.leaf], tensor.name))
    return config


def export_hf(
    source: Path,
    out: Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    tokenizer: Path | None = None,
    replace: bool = False,
) -> FalconConfig:
    """Writes native weights as a folder that transformers loads, which appears only once it is complete.

    Args:
      source: folder of native weights.
      out: folder to make.
      dtype: of the weights written; as stored if None.
      max_shard_bytes: largest size of a safetensors file, unless a single tensor is larger; one file is held in memory.
      tokenizer: a `tokenizer.json` to put beside the weights, or a folder with one.
      replace: whether an existing folder with a model may be replaced.

    Raises:
      FalconError: `source` is incomplete, transformers has no such model, `out` exists, or a value overflows `dtype`.
    """
    check_number("max_shard_bytes", max_shard_bytes, low=1)
    config, read, stored = params_reader(source)
    table = hf_tensors(config)
    dtypes = {name: np.dtype(dtype or stored[tensor.leaf]) for name, tensor in table.items()}
    hf_config = config_to_hf(config, dtypes[EMBEDDING].name)
    if tokenizer is not None:
        tokenizer = tokenizer_file(tokenizer)
    sizes = {name: int(np.prod(tensor.shape)) * dtypes[name].itemsize for name, tensor in table.items()}
    with (
        write_aside(out, folder=True, replace=replace, marker="config.json", nbytes=sum(sizes.values())) as aside,
        progress(f"exporting {source}", len(table), "tensors") as advance,
    ):

        def read_hf(name: str) -> np.ndarray:
            tensor = table[name]
            array = cast(tensor.to_hf(read(tensor.leaf, tensor.layer)), dtypes[name], name)
            advance()
            return array

        aside.mkdir()
        write_shards(aside, sizes, read_hf, max_shard_bytes)
        ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
        write_json(aside / "generation_config.json", ids)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, aside / "tokenizer.json")
            tokenizer_config = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": config.max_positions,
                "eos_token": END_OF_TEXT,
            }
            write_json(aside / "tokenizer_config.json", tokenizer_config)
        write_json(aside / "config.json", hf_config)
    return config


def cast(array: np.ndarray, dtype: Any, name: str) -> np.ndarray:
    """`array` in another float dtype.

    Raises:
      FalconError: a finite value overflows it, as large values do in float16.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if np.dtype(dtype) == np.float16 and (np.isinf(result) & ~np.isinf(array)).any():
        raise FalconError(f"{name} has values beyond the range of float16; choose bfloat16 or float32")
    return result
