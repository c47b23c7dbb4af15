"""Dispatch of `falcon-relu COMMAND`: one module a command, imported only when it is called."""

from __future__ import annotations

import argparse
import errno
import importlib
import importlib.metadata
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from falcon_relu.cli.limits import check_limits
from falcon_relu.cli.outputs import Output, reserved
from falcon_relu.cli.terminal import ReaderGoneError, standard_streams
from falcon_relu.errors import FalconError, check_text
from falcon_relu.progress import Console
from falcon_relu.progress import console as stderr
from train.processes import signals

# Every module below has a dataclass `Args`, whose docstring is the help text, and `run(args)`; those that start from
# a config also have `defaults(config_name)`.
COMMANDS = {
    "demo": "The whole idea on real text in minutes: train, swap, distil, predict, decode, report",
    "convert": "Hugging Face checkpoint -> native (Orbax) weights, streaming",
    "export": "native weights -> a folder that transformers loads",
    "prepare": "text -> packed token shards",
    "teacher-cache": "cache a teacher's predictions for token shards, to distil from",
    "plan": "memory, FLOPs, traffic and hours of a training run on devices that are not there",
    "train": "train or distil a model by a config",
    "generate": "continue prompts with a dense model on any backend",
    "predictor": "fit and calibrate the predictors of which neurons fire",
    "pack": "checkpoint -> decode weights, laid out for a CPU and loaded at disk speed",
    "decode": "continue prompts on a CPU, reading only the neurons that fire",
    "quality": "what number formats and modes of decoding cost, on held-out text",
    "eval-data": "benchmark questions as local files, for machines without a network",
    "eval": "benchmarks by lm-eval, for the Flax model and for CPU decoding",
    "held-out": "perplexity on held-out text, distance from a teacher, cost of a predictor's choice",
    "sparsity": "zeros, hot neurons, unions over batches, and what reading fewer neurons costs",
    "card": "a model card from measured results only",
    "bench": "speed of decoding at real widths against the memory bandwidth",
}

_ROOMS = {"demo": "demo.command"}  # commands that are a folder of modules

_TROUBLE = {
    "make room or choose another disk, and run the same command again; what was finished is kept": (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
    ),
    "choose a folder that you may write to": (errno.EACCES, errno.EPERM, errno.EROFS),
    "allow more open files with ulimit -n": (errno.EMFILE, errno.ENFILE),
    "choose a smaller number format, batch or model, or a machine with more memory": (errno.ENOMEM,),
}
_NO_MEMORY = (
    "RESOURCE_EXHAUSTED",
    "bad_alloc",
    "Out of memory",
    "can't start new thread",
)  # messages of XLA, C++, Python
_WITHOUT_JAX = ("card", "eval-data", "prepare")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
      Exit status: 0 success, 1 an error that the message explains, 2 wrong usage, 130 interrupted, 141 the reader of
      the output is gone.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None and arguments[:1] == ["train"]:
        signals.catch()
    try:
        with standard_streams():
            return _main(arguments)
    except ReaderGoneError as gone:
        return gone.status
    except OSError as error:  # standard output is a file on a full disk
        stderr.print(f"falcon-relu: standard output: {_one_line(error)}", style="red", soft_wrap=True)
        return 1


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        _guide()
        return 0 if arguments else 2
    if arguments == ["--version"]:
        print(f"falcon-relu {importlib.metadata.version('falcon-relu')}, jax {importlib.metadata.version('jax')}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        _complain("", f"no command {name!r}; there are: {', '.join(COMMANDS)}")
        return 2
    try:
        if name not in _WITHOUT_JAX:
            check_limits()  # before JAX is imported
    except FalconError as error:
        _complain(name, str(error))
        return 1
    try:
        for argument in rest:
            check_text("an argument", argument)
        run, args = parse(name, rest)
    except SystemExit as exit_:  # the usage has been printed
        return exit_.code if isinstance(exit_.code, int) else 2
    except (FalconError, ValueError) as error:  # a config's own check refused the values
        _complain(name, str(error))
        return 2
    try:
        with reserved(args if isinstance(args, Output) else args.output):
            run(args)
    except FalconError as error:
        _complain(name, str(error))
        return 1
    except BrokenPipeError:
        raise
    except Exception as error:
        if (text := explanation(error)) is None:
            raise
        _complain(name, text)
        return 1
    except KeyboardInterrupt:
        stderr.print(f"falcon-relu {name}: interrupted; finished work is kept", soft_wrap=True)
        return 130
    return 0


def explanation(error: BaseException) -> str | None:
    """The message for an error of the operating system, with advice; None for any other error, which is a bug.

    The whole chain of errors is searched, since libraries wrap the system's errors or pass on only their text.
    """
    text = _one_line(error)
    link: BaseException | None = error
    while link is not None:
        for advice, codes in _TROUBLE.items():
            if getattr(link, "errno", None) in codes or any(os.strerror(code) in str(link) for code in codes):
                return f"{text}: {advice}"
        if isinstance(link, MemoryError) or any(message in str(link) for message in _NO_MEMORY):
            return f"there is not enough memory: {next(a for a, codes in _TROUBLE.items() if errno.ENOMEM in codes)}"
        link = link.__cause__ or link.__context__
    return text if isinstance(error, OSError) and error.filename is not None else None


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _complain(name: str, text: str) -> None:
    stderr.print(f"falcon-relu {name}".rstrip() + f": {text}", style="red", soft_wrap=True)


def parse(name: str, rest: Sequence[str]) -> tuple[Callable[[Any], None], Any]:
    """The `run` function of a command of `COMMANDS`, and its parsed arguments.

    Raises:
      SystemExit: wrong usage or --help; it has been printed.
      FalconError: there is no such config.
      ValueError: a config's own check refused the values.
    """
    import tyro

    module = importlib.import_module(f"falcon_relu.cli.{_ROOMS.get(name, name.replace('-', '_'))}")
    default = None
    if hasattr(module, "defaults"):  # `--config NAME` gives every other argument its default
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--config")
        known, rest = first.parse_known_args(rest)
        if known.config is None and not {"-h", "--help"} & set(rest):
            raise FalconError("say which run to start from with --config; --help lists them")
        default = module.defaults(known.config)
    description = "\n\n".join(filter(None, (inspect.getdoc(module.Args), getattr(module, "EPILOGUE", None))))
    args = tyro.cli(
        module.Args,
        prog=f"falcon-relu {name}",
        args=rest,
        default=default,
        description=description,
        config=(tyro.conf.PositionalMetavarFromFieldName,),
    )
    return module.run, args


def _guide() -> None:
    table = Table("command", "what it does", box=None, pad_edge=False)
    for name, what in COMMANDS.items():
        table.add_row(f"falcon-relu {name}", what)
    out = Console()
    out.print("ReLU-Falcon: swap GELU for ReLU, distil the quality back, decode reading only what fires.\n")
    out.print(table)
    out.print("\nStart with falcon-relu demo; every command has --help.")
