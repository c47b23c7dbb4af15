"""`falcon-relu decode`: continue prompts on a CPU, reading only the neurons that fire."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from falcon_relu.checkpoints.load import load_config
from falcon_relu.cli.machine import machine
from falcon_relu.cli.outputs import Output
from falcon_relu.config import Activation, FalconConfig
from falcon_relu.errors import FalconError
from falcon_relu.files import is_special, read_text, write_json
from falcon_relu.generation import Sampling, check_prompts
from falcon_relu.progress import console
from falcon_relu.tokenizer import Tokenizer
from infer import kernels
from infer.bench import memory_bandwidth
from infer.generation import Conversation, DecodeStats, stream, working_bytes
from infer.kernels.cache import CacheFormat
from infer.kernels.threads import limit_threads
from infer.predictor.predictor import Predictor, load_predictor
from infer.step import Mode, check_mode
from infer.weights.layout import DecodeWeights, Formats, skeleton, weights_from_checkpoint
from infer.weights.memory import need_memory
from infer.weights.storage import is_decode_weights, load_weights, outline


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(Output):
    """Continue prompts on this computer's CPU, reading only the neurons that fire.

    Without prompts it is a chat: each line typed is appended to the text so far and continued; an empty line starts a
    new text.
    """

    model: Annotated[str, tyro.conf.Positional]
    """Decode weights made by falcon-relu pack, native weights, Hugging Face folder or hub id."""
    prompts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Texts to continue."""
    tokenizer: Path
    """A tokenizer.json, or a folder with one."""
    file: Path | None = None
    """Read further prompts from this UTF-8 file, one a line; blank lines are skipped."""
    mode: Mode | None = None
    """dense reads everything; exact skips the rows of the down-projection whose neuron is zero (same output as dense);
    sparse reads only the neurons that the predictor chooses. If not given: sparse with a predictor, else exact, or
    dense for a GELU model."""
    predictor: Path | None = None
    """Predictor file, for sparse; see falcon-relu predictor. Packed weights may hold one already."""
    format: str | None = None
    """Number format of the weights in memory: f32, bf16, f16, int8 or int4 (with an int8 head), also with exceptions:
    "int8,head=bf16" (kinds: attention, mlp, predictor, head). If not given: bf16; packed weights keep theirs."""
    batch: int = 1
    """Number of prompts decoded together, for which each weight is read once; printed when complete."""
    backend: kernels.Backend = "auto"
    """Kernels: native (C++), xla, or auto: native where it was built."""
    cache_format: CacheFormat = "bf16"
    """Number format of the KV cache; int8 takes half of bf16's memory."""
    threads: int | None = None
    """Threads that compute; one for each core if not given."""
    activation: Activation | None = None
    """MLP activation, where a Hugging Face config does not state it."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Sampling)


def run(args: Args) -> None:
    """Checks the arguments, loads the weights, prints each continuation, then speed and memory traffic in one line."""
    if args.threads is not None:
        limit_threads(args.threads)
    if args.batch < 1:
        raise FalconError(f"--batch must be at least 1, got {args.batch}")
    kernels.backend(args.backend)
    if (notice := kernels.fallback(args.backend)) is not None:
        console.print(notice, style="yellow", soft_wrap=True)
    tokenizer = Tokenizer(args.tokenizer)
    prompts = [*args.prompts, *(_lines(args.file) if args.file else ())]
    encoded = [tokenizer.encode(prompt) or [tokenizer.eos_id] for prompt in prompts]
    sampling = dataclasses.replace(args.sampling, stop_tokens=(*args.sampling.stop_tokens, tokenizer.eos_id))

    outline = _outline(args)
    c = outline.config
    tokenizer.check_fits(c.vocab_size)
    mode: Mode = args.mode or _sparsest(outline)
    check_mode(outline, mode)
    if encoded:
        check_prompts(encoded, c.vocab_size, c.max_positions, sampling.max_new_tokens)
        prompt = max(map(len, encoded))
        batch, longest = min(args.batch, len(encoded)), prompt + sampling.max_new_tokens
    else:
        prompt, batch, longest = c.max_positions, 1, c.max_positions
    # The predictor file as read is freed before the first prompt is processed: the two are not in memory together.
    more = max(
        working_bytes(c, batch, prompt, longest, args.cache_format),
        args.predictor.stat().st_size if args.predictor else 0,
    )
    need_memory(outline.nbytes + more, f"the weights of {args.model} and the cache of {batch} x {longest} tokens")

    weights = _weights(args)
    stats = DecodeStats()
    about: dict[str, object] = {
        "machine": machine(),
        "mode": mode,
        "kernels": kernels.describe(kernels.backend(args.backend)),
    }
    if not prompts:
        turns: list[dict[str, object]] = []
        try:
            _chat(args, weights, tokenizer, mode, sampling, turns)
        finally:  # also when Ctrl-C ends the chat
            if args.json is not None:
                write_json(args.json, about | {"turns": turns}, replace=args.overwrite)
        return
    texts: list[str] = []
    for start in range(0, len(prompts), args.batch):
        group = slice(start, start + args.batch)
        steps = stream(
            weights,
            encoded[group],
            sampling,
            mode=mode,
            backend=args.backend,
            cache=args.cache_format,
            stats=stats,
        )
        texts += _show(tokenizer, prompts[group], steps)
    about |= {"prompts": prompts, "texts": texts}
    written = args.json is not None and not is_special(args.json)
    if args.json is not None and written:  # before the bandwidth is measured, which takes up to 1 GiB of memory
        write_json(args.json, about | _row(stats, None), replace=args.overwrite)
    bandwidth = memory_bandwidth()
    console.print(_line(stats, bandwidth), soft_wrap=True)
    if args.json is not None:
        write_json(args.json, about | _row(stats, bandwidth), replace=args.overwrite or written)


def _outline(args: Args) -> DecodeWeights:
    """Shapes and dtypes of the weights that will be read, with no memory behind them; checks the predictor file."""
    if is_decode_weights(Path(args.model)):
        if args.format is not None or args.activation is not None:
            raise FalconError(f"{args.model} is packed already: its format and activation cannot be chosen any more")
        packed = outline(Path(args.model))
        predictor = _predictor(args, packed.config)
        if predictor is None:
            return packed
        return skeleton(packed.config, packed.formats, predictor.ranks, predictor.input)
    config = load_config(args.model, activation=args.activation)
    predictor = _predictor(args, config)
    ranks, input = (predictor.ranks, predictor.input) if predictor else ((), None)
    return skeleton(config, _formats(args), ranks, input)


def _predictor(args: Args, config: FalconConfig) -> Predictor | None:
    return None if args.predictor is None else load_predictor(args.predictor, config)


def _weights(args: Args) -> DecodeWeights:
    """The weights. The predictor file is read again, last, so that its original is in memory only briefly."""
    if is_decode_weights(Path(args.model)):
        weights = load_weights(Path(args.model))
        format = weights.formats.predictor
    else:
        weights = weights_from_checkpoint(args.model, _formats(args), activation=args.activation)
        format = _formats(args).predictor
    predictor = _predictor(args, weights.config)
    return weights if predictor is None else weights.with_predictor(predictor, format)


def _formats(args: Args) -> Formats:
    return Formats.parse(args.format or "bf16")


def _sparsest(weights: DecodeWeights) -> Mode:
    if weights.config.activation == "gelu":
        return "dense"
    return "exact" if weights.predictor_input is None else "sparse"


def _show(tokenizer: Tokenizer, prompts: Sequence[str], steps: Iterable[Sequence[int | None]]) -> list[str]:
    """Prints each prompt and its continuation: a single one token by token, several when complete."""
    live = len(prompts) == 1
    streams = [tokenizer.stream() for _ in prompts]
    texts = ["" for _ in prompts]
    if live:
        print(prompts[0], end="", flush=True)
    for tokens in steps:
        for i, token in enumerate(tokens):
            piece = "" if token is None else streams[i].push(token)
            texts[i] += piece
            if live:
                print(piece, end="", flush=True)
    for i, rest in enumerate(streams):
        tail = rest.finish()
        texts[i] += tail
        print(f"{tail}\n" if live else f"{prompts[i]}{texts[i]}\n", flush=True)
    return texts


def _chat(
    args: Args,
    weights: DecodeWeights,
    tokenizer: Tokenizer,
    mode: Mode,
    sampling: Sampling,
    turns: list[dict[str, object]],
) -> None:
    """Continues each line typed until the input ends; an error ends a turn of the conversation, not the chat.

    Appends to `turns` each turn's prompt, text, measurements, and whether it began a new text.
    """
    begin = functools.partial(Conversation, weights, mode=mode, backend=args.backend, cache=args.cache_format)
    conversation, bandwidth, anew = begin(), memory_bandwidth(), True
    for turn in itertools.count():
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            break
        if not line.strip():
            conversation, anew = begin(), True
            continue
        drawn = dataclasses.replace(sampling, seed=(sampling.seed + turn) % (1 << 32))
        taken = DecodeStats()
        try:
            steps = conversation.reply(tokenizer.encode(line), drawn, taken)
            (text,) = _show(tokenizer, [""], ([token] for token in steps))
        except FalconError as error:
            console.print(str(error), style="red", soft_wrap=True)
            continue
        turns.append({"anew": anew, "prompt": line, "text": text} | _row(taken, bandwidth))
        anew = False
        console.print(_line(taken, bandwidth), style="dim", soft_wrap=True)


def _line(stats: DecodeStats, bandwidth: float | None) -> str:
    return (
        f"prompt {stats.prompt_tokens:,} tokens, {stats.prompt_tokens_per_second:,.4g} tokens/s; "
        f"generation {stats.tokens:,} tokens, {stats.tokens_per_second:,.4g} tokens/s; "
        f"{stats.step_bytes / 1e6:,.4g} MB a step; {stats.neurons_read:.1%} of the neurons read; "
        f"{stats.bytes_per_second / 1e9:.3g} of {'?' if bandwidth is None else f'{bandwidth / 1e9:.3g}'} GB/s"
        + (" (too little memory is free to measure what it delivers)" if bandwidth is None else "")
    )


def _row(stats: DecodeStats, bandwidth: float | None) -> dict[str, float | None]:
    return {
        "prompt tokens": stats.prompt_tokens,
        "prompt tokens/s": stats.prompt_tokens_per_second,
        "tokens": stats.tokens,
        "tokens/s": stats.tokens_per_second,
        "MB a step": stats.step_bytes / 1e6,
        "neurons read": stats.neurons_read,
        "GB/s": stats.bytes_per_second / 1e9,
        "memory GB/s": None if bandwidth is None else bandwidth / 1e9,
    }


def _lines(file: Path) -> list[str]:
    lines = [line.removesuffix("\r") for line in read_text(file).split("\n")]
    if not (prompts := [line for line in lines if line.strip()]):
        raise FalconError(f"{file} holds no prompt: all of its lines are blank")
    return prompts
