"""`falcon-relu decode`: continue prompts on a CPU, reading only the neurons that fire."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from falcon_relu.cli.figures import report
from falcon_relu.config import Activation
from falcon_relu.errors import FalconError
from falcon_relu.generate import Sampling
from falcon_relu.tokenizer import Tokenizer
from infer import kernels
from infer.formats import Format
from infer.generate import Figures, stream
from infer.predictor import load
from infer.step import Mode, check_mode
from infer.storage import is_decode_weights
from infer.storage import load as load_packed
from infer.threads import limit_threads
from infer.weights import DecodeWeights, Formats, from_checkpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Continue prompts on this computer's CPU, reading only the neurons that fire.

    Without prompts, a chat loop: every line typed is continued in the text so far; an empty line starts anew.
    """

    model: Annotated[str, tyro.conf.Positional]
    """Decode weights made by falcon-relu pack, native weights, Hugging Face folder or hub id."""
    prompts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Texts to continue."""
    tokenizer: Path
    """A tokenizer.json, or a folder with one."""
    file: Path | None = None
    """Read further prompts from this file, one a line."""
    mode: Mode | None = None
    """dense reads everything; exact skips rows of the down-projection that count for nothing (same output as dense);
    sparse reads the neurons that the predictor chooses. The sparsest that the model can serve, if not given."""
    predictor: Path | None = None
    """Predictor file, for sparse; see falcon-relu predictor. Packed weights may hold one already."""
    format: Format | None = None
    """Number format of the weights in memory; that of packed weights, else bf16, if not given."""
    batch: bool = False
    """Continue all prompts together, sharing every read, instead of one after the other."""
    backend: kernels.Backend = "auto"
    """Kernels: native (C++), xla, or native where it was built."""
    threads: int | None = None
    """Threads that compute; all cores if not given."""
    activation: Activation | None = None
    """MLP activation, where a Hugging Face config does not state it."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Sampling)
    json: Path | None = None
    """Also write the figures and texts to this file."""


def run(args: Args) -> None:
    """Loads, continues each prompt as it streams, then reports one line of figures a run."""
    if args.threads is not None:
        limit_threads(args.threads)
    kernels.backend(args.backend)  # refuses a backend that is not there before anything is loaded
    tokenizer = Tokenizer(args.tokenizer)
    prompts = [*args.prompts, *_lines(args.file)]
    weights = _weights(args)
    tokenizer.check_fits(weights.config.vocab_size)
    mode: Mode = args.mode or _sparsest(weights)
    check_mode(weights, mode)
    if not prompts:
        _chat(args, weights, tokenizer, mode)
        return
    groups = [prompts] if args.batch else [[prompt] for prompt in prompts]
    rows, texts = [], []
    for group in groups:
        figures = Figures()
        texts += _continue(args, weights, tokenizer, mode, group, figures)
        rows.append(_row(figures, len(group)))
    report(
        {"mode": mode, "kernels": kernels.describe(kernels.backend(args.backend)), "runs": rows},
        args.json,
        also={"prompts": prompts, "texts": texts},
    )


def _weights(args: Args) -> DecodeWeights:
    if is_decode_weights(Path(args.model)):
        if args.format is not None or args.activation is not None:
            raise FalconError(f"{args.model} is packed already: its format and activation cannot be chosen any more")
        weights = load_packed(Path(args.model))
    else:
        weights = from_checkpoint(args.model, Formats.all(args.format or "bf16"), activation=args.activation)
    if args.predictor is None:
        return weights
    return weights.with_predictor(load(args.predictor, weights.config), args.format or weights.formats.predictor)


def _sparsest(weights: DecodeWeights) -> Mode:
    if weights.config.activation == "gelu":
        return "dense"
    return "exact" if weights.predictor_input is None else "sparse"


def _continue(
    args: Args, weights: DecodeWeights, tokenizer: Tokenizer, mode: Mode, prompts: Sequence[str], figures: Figures
) -> list[str]:
    """Continues prompts together; a single one is printed as it comes, several when they are complete."""
    encoded = [tokenizer.encode(prompt) or [tokenizer.eos_id] for prompt in prompts]
    sampling = dataclasses.replace(args.sampling, stop_tokens=(*args.sampling.stop_tokens, tokenizer.eos_id))
    live = len(prompts) == 1
    streams = [tokenizer.stream() for _ in prompts]
    texts = ["" for _ in prompts]
    if live:
        print(prompts[0], end="", flush=True)
    for tokens in stream(weights, encoded, sampling, mode=mode, backend=args.backend, figures=figures):
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


def _chat(args: Args, weights: DecodeWeights, tokenizer: Tokenizer, mode: Mode) -> None:
    """Continues what is typed, line after line, until the input ends."""
    said = ""
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if not line.strip():
            said = ""
            continue
        figures = Figures()
        said += line
        said += _continue(args, weights, tokenizer, mode, [said], figures)[0] + "\n"
        print(", ".join(f"{name} {value}" for name, value in _row(figures, 1).items()), file=sys.stderr)


def _row(figures: Figures, sequences: int) -> dict[str, Any]:
    return {
        "sequences": sequences,
        "prompt tokens/s": figures.prompt_tokens / max(figures.prompt_seconds, 1e-9),
        "tokens/s": figures.steps_per_second * sequences,
        "MB a step": figures.step_bytes / 1e6,
        "neurons read": figures.neurons_read,
        "GB/s": figures.bytes_per_second / 1e9,
    }


def _lines(file: Path | None) -> Iterator[str]:
    if file is None:
        return
    try:
        yield from (line for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise FalconError(f"{file} cannot be read: {error}") from None
