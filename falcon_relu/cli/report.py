"""How every command reports its results: tables on standard output, and JSON where asked."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Column, Table

from falcon_relu.cli.outputs import Output
from falcon_relu.files import write_json
from falcon_relu.progress import Console, format_value

_PIPED_WIDTH = 240  # columns where the output is not a terminal, so that no number is cut


def report(results: Mapping[str, Any], output: Output, also: Mapping[str, Any] | None = None) -> None:
    """Prints scalars as `name  value` lines and lists of mappings as tables; writes all as JSON where asked.

    Of several processes that run a command together, the first one reports.

    Args:
      results: what to print and write.
      output: the command's arguments, whose `json` is the file to write, if any.
      also: what to write but not to print.
    """
    if output.several_processes and not _is_first():
        return
    try:
        _print(results)
    finally:  # also where standard output was closed meanwhile
        if output.json is not None:
            write_json(output.json, {**results, **(also or {})}, replace=output.overwrite)


def _is_first() -> bool:
    import jax  # most commands that run alone need no JAX to report

    return jax.process_index() == 0


def _print(results: Mapping[str, Any]) -> None:
    out = Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH)
    plain = Table(box=None, show_header=False, pad_edge=False)
    for name, value in results.items():
        if not _is_table(value):
            plain.add_row(name, format_value(value))
    if plain.row_count:
        out.print(plain)
    for name, value in results.items():
        if _is_table(value):
            columns = (Column(heading, overflow="fold") for heading in value[0])
            table = Table(*columns, title=name, title_justify="left", box=None, pad_edge=False)
            for row in value:
                table.add_row(*(format_value(cell) for cell in row.values()))
            out.print(table)
    sys.stdout.flush()


def _is_table(value: Any) -> bool:
    return isinstance(value, Sequence) and bool(value) and isinstance(value[0], Mapping)
