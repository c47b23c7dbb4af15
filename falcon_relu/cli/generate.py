"""`falcon-relu generate`: continue prompts with the dense model, on any backend."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import tyro

from falcon_relu.checkpoints.load import load_config, load_model
from falcon_relu.cli.devices import Devices, Dtype, on_devices
from falcon_relu.cli.report import report
from falcon_relu.config import Activation
from falcon_relu.generation import Sampling, check_prompts, generate
from falcon_relu.model import Falcon
from falcon_relu.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(Devices):
    """Continue prompts with a model on whatever devices JAX finds."""

    model: Annotated[str, tyro.conf.Positional]
    """Native weights, Hugging Face folder or hub id."""
    prompts: Annotated[tuple[str, ...], tyro.conf.Positional] = ("",)
    """Texts to continue; the empty text starts from the end-of-text token."""
    tokenizer: Path
    """A tokenizer.json, or a folder with one."""
    activation: Activation | None = None
    """MLP activation, where a Hugging Face config does not state it."""
    dtype: Dtype = "bfloat16"
    """Dtype of weights and products."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Sampling)


def run(args: Args) -> None:
    """Generates, prints the texts, then reports."""
    tokenizer = Tokenizer(args.tokenizer)
    sampling = dataclasses.replace(args.sampling, stop_tokens=(*args.sampling.stop_tokens, tokenizer.eos_id))
    prompts = [tokenizer.encode(prompt) or [tokenizer.eos_id] for prompt in args.prompts]
    config = load_config(args.model, activation=args.activation)
    tokenizer.check_fits(config.vocab_size)
    check_prompts(prompts, config.vocab_size, config.max_positions, sampling.max_new_tokens)
    with on_devices(args) as mesh:
        config, params = load_model(args.model, activation=args.activation, dtype=jnp.dtype(args.dtype), mesh=mesh)
        start = time.perf_counter()
        new = generate(Falcon(config, jnp.dtype(args.dtype)), params, prompts, sampling)
        seconds = time.perf_counter() - start
        texts = [tokenizer.decode(ids) for ids in new]
        if jax.process_index() == 0:
            for prompt, text in zip(args.prompts, texts, strict=True):
                print(f"{prompt}{text}\n")
        count = sum(map(len, new))
        results = {"new tokens": count, "seconds, compilation included": seconds, "tokens/s": count / seconds}
        report(results, args, also={"prompts": list(args.prompts), "texts": texts})
