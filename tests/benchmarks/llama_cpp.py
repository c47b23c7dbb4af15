"""Decoding and prefill against llama.cpp, in turn in one process: `python -m tests.benchmarks.llama_cpp`.

Random weights of Falcon-40B's widths on both sides: ours in memory, llama.cpp's in a GGUF file that is made first.
Needs `pip install llama-cpp-python gguf`, which builds llama.cpp for this processor.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from falcon_relu.cli.report import report
from falcon_relu.config import FalconConfig, family
from infer import bench
from infer.generation import read_prompts
from infer.step import DecodeState, Mode, decode_step
from infer.weights.formats import Format
from infer.weights.layout import Formats

_PATTERN_ROWS = 256  # distinct rows; matrices repeat them
_CONTEXT = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Times llama.cpp's dense decoding and our ways of it."""

    gguf: Literal["BF16", "Q4_0"] = "Q4_0"
    """llama.cpp's weights; with Q4_0 the head is Q8_0, as its converter makes it."""
    format: Format = "int8"
    """Our weights."""
    layers: int = 4
    """Of Falcon-40B's 60."""
    active: tuple[float, ...] = (0.05, 0.1)
    """Shares of the neurons that sparse decoding reads."""
    steps: int = 16
    """Tokens timed."""
    prompt: int = 200
    """Tokens of the prompt that is read."""
    json: Path | None = None
    """Also write the figures to this file."""


def run(args: Args) -> None:
    """Measures and reports."""
    config = family("falcon-40b").replace(n_layers=args.layers, activation="relu", tied_embeddings=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "random.gguf"
        _write_gguf(file, config, args.gguf)
        peer = _LlamaCpp(file)
        formats = Formats(attention=args.format, mlp=args.format, predictor=args.format, head=args.format)
        weights = bench.random_weights(config, formats, rank=config.d_model // 8)
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, config.vocab_size, args.prompt).tolist()
        prefills: dict[str, Callable[[], float]] = {
            f"llama.cpp, {args.gguf}": lambda: peer.read(tokens, fresh=True),
            f"ours, {args.format}": lambda: bench.timed(
                lambda: read_prompts(weights, DecodeState.empty(config, 1, args.prompt), [tokens])[0]
            ),
        }
        reading = _in_turn(prefills, 4)
        ways: list[tuple[float, Mode]] = [(1.0, "dense"), *((share, "sparse") for share in args.active)]
        steps = {f"llama.cpp, {args.gguf}, dense": lambda: peer.read([1])}
        steps |= {
            f"ours, {args.format}, {mode}, {share:.0%}": _stepper(bench.with_active_share(weights, share), mode)
            for share, mode in ways
        }
        decoding = _in_turn(steps, args.steps)
        bandwidth = bench.memory_bandwidth()
    report(
        {
            "memory GB/s": bandwidth and bandwidth / 1e9,
            "prefill": _rows(reading, args.prompt),
            "tokens": _rows(decoding, 1),
        },
        args.json,
    )


def _in_turn(ways: dict[str, Callable[[], float]], turns: int) -> dict[str, np.ndarray]:
    times = [[way() for way in ways.values()] for _ in range(turns + 1)][1:]  # the first turn compiles
    return dict(zip(ways, np.array(times).T, strict=True))


def _rows(times: dict[str, np.ndarray], tokens: int) -> list[dict[str, Any]]:
    peer = next(iter(times.values()))
    return [
        {
            "way": name,
            "ms": 1e3 * float(np.median(seconds)),
            "tokens/s": tokens / float(np.median(seconds)),
            "times llama.cpp": float(np.median(peer / seconds)),
        }
        for name, seconds in times.items()
    ]


def _stepper(weights: Any, mode: Mode) -> Callable[[], float]:
    config = weights.config
    state = bench.half_full(config, 1, _CONTEXT)
    rng = np.random.default_rng(0)

    def step() -> jax.Array:
        nonlocal state
        token_B = jnp.asarray(rng.integers(0, config.vocab_size, 1), jnp.int32)
        logits, state, _ = decode_step(weights, state, token_B, mode=mode)
        return logits

    return lambda: bench.timed(step)


class _LlamaCpp:
    """One sequence through llama.cpp's C interface."""

    def __init__(self, file: Path):
        import llama_cpp

        self._lib = llama_cpp
        self._silence = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silence, None)
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        wanted = llama_cpp.llama_context_default_params()
        wanted.n_ctx = wanted.n_batch = wanted.n_ubatch = _CONTEXT
        wanted.n_threads = wanted.n_threads_batch = len(os.sched_getaffinity(0))
        self._context = llama_cpp.llama_init_from_model(model, wanted)
        self._length = 0

    def read(self, tokens: list[int], fresh: bool = False) -> float:
        """Seconds that so many more tokens take, or a new text's first ones, with the logits of the last one."""
        if fresh:
            self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
            self._length = 0
        batch = self._lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, self._length + i, 1, 0
            batch.logits[i] = i == len(tokens) - 1
        start = time.perf_counter()
        status = self._lib.llama_decode(self._context, batch)
        self._lib.llama_synchronize(self._context)
        seconds = time.perf_counter() - start
        self._lib.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        self._length += len(tokens)
        return seconds


def _write_gguf(file: Path, c: FalconConfig, kind: str) -> None:
    import gguf

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(file, "falcon")
    writer.add_context_length(2048)
    writer.add_embedding_length(c.d_model)
    writer.add_block_count(c.n_layers)
    writer.add_feed_forward_length(c.d_ff)
    writer.add_head_count(c.n_heads)
    writer.add_head_count_kv(c.n_kv_heads)
    writer.add_layer_norm_eps(c.norm_eps)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("no_vocab")

    def matrix(name: str, rows: int, columns: int, kind: str) -> None:
        numbers = gguf.GGMLQuantizationType[kind]
        pattern = gguf.quants.quantize(rng.standard_normal((_PATTERN_ROWS, columns), np.float32) * 0.02, numbers)
        writer.add_tensor(name, np.tile(pattern, (-(-rows // _PATTERN_ROWS), 1))[:rows], raw_dtype=numbers)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(c.d_model, np.float32))
        writer.add_tensor(f"{name}.bias", np.zeros(c.d_model, np.float32))

    matrix("token_embd.weight", c.vocab_size, c.d_model, kind)
    if kind == "Q4_0":
        matrix("output.weight", c.vocab_size, c.d_model, "Q8_0")
    norm("output_norm")
    for i in range(c.n_layers):
        norm(f"blk.{i}.attn_norm")
        norm(f"blk.{i}.attn_norm_2")
        matrix(f"blk.{i}.attn_qkv.weight", (c.n_heads + 2 * c.n_kv_heads) * c.head_dim, c.d_model, kind)
        matrix(f"blk.{i}.attn_output.weight", c.d_model, c.d_model, kind)
        matrix(f"blk.{i}.ffn_up.weight", c.d_ff, c.d_model, kind)
        matrix(f"blk.{i}.ffn_down.weight", c.d_model, c.d_ff, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    run(tyro.cli(Args))
