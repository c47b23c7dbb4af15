"""`falcon-relu prepare`: text to packed token shards."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated

import tyro

from falcon_relu.cli.outputs import Made, Output
from falcon_relu.cli.report import report
from falcon_relu.errors import FalconError
from falcon_relu.progress import console
from train.data.prepare import PrepareConfig, Prepared, prepare

_BAD_LINES_SHOWN = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(PrepareConfig, Output):
    """Tokenise text and pack it into rows of fixed length, for `falcon-relu train`.

    Inputs are .jsonl (a JSON object a line) and .txt (a document a file), both also .gz or .zst, .parquet, folders and
    globs of these, and hf:NAME[:CONFIG[:SPLIT]] for a Hugging Face dataset. Run again to go on after an interruption.
    """

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Text files, folders, globs or datasets."""
    shard: str = "0/1"
    """i/n: do only the i-th of n parts, counted from 0, as one job of an array; all share one folder."""

    def written(self) -> list[Made]:
        """What is written besides `json`."""
        return [Made(self.out, goes_on=True, locked=False)]


def run(args: Args) -> None:
    """Prepares, then reports."""
    prepared = prepare(args, parse_shard(args.shard))
    _show_bad_lines(prepared)
    manifest = prepared.manifest
    if args.validation_fraction and manifest is not None and not manifest.splits["validation"].rows:
        console.print(
            f"{args.out} has no validation rows: none of its documents was chosen for them. To have some, prepare the "
            f"text into another folder, with a larger --validation-fraction than {args.validation_fraction:g}",
            style="yellow",
            soft_wrap=True,
        )
    report(_summary(prepared), args)


def parse_shard(text: str) -> tuple[int, int]:
    """i/n as two numbers.

    Raises:
      FalconError: it is not of that form.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None:
        raise FalconError(f"--shard must look like 3/16, got {text!r}")
    return int(match[1]), int(match[2])


def _show_bad_lines(prepared: Prepared) -> None:
    if prepared.manifest is None or not prepared.manifest.bad_lines:
        return
    examples, count = prepared.manifest.bad_examples, prepared.manifest.bad_lines
    for line in examples[:_BAD_LINES_SHOWN]:
        console.print(line, style="yellow")
    if count > _BAD_LINES_SHOWN:
        listed = f"the first {len(examples)} are" if count > len(examples) else "all are"
        console.print(f"... {count:,} lines without text in all; {listed} in the manifest", style="yellow")


def _summary(prepared: Prepared) -> dict[str, object]:
    """What is reported: counts of units, tokens and bad lines, speed, and a table of the splits.

    A split's "padding" is the share of its rows' positions that hold no token.
    """
    results: dict[str, object] = {
        "units": prepared.units,
        "new tokens": prepared.new_tokens,
        "seconds": prepared.seconds,
        "tokens/s": prepared.new_tokens / prepared.seconds,
    }
    if prepared.manifest is None:
        return results | {"finished": False}
    seq_len = prepared.manifest.seq_len
    splits = [
        {
            "split": name,
            "documents": split.documents,
            "tokens": split.tokens,
            "rows": split.rows,
            "padding": 1 - split.tokens / (split.rows * seq_len) if split.rows else 0.0,
            "shards": len(split.shards),
        }
        for name, split in prepared.manifest.splits.items()
    ]
    return results | {"finished": True, "bad lines": prepared.manifest.bad_lines, "splits": splits}
