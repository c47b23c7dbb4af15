"""How every command reports: a table on standard output, the same figures as JSON where asked."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from falcon_relu.files import write_json

_PIPED_WIDTH = 240  # columns where no terminal limits them, so that no figure is cut


def report(figures: Mapping[str, Any], json: Path | None, also: Mapping[str, Any] | None = None) -> None:
    """Prints scalar figures as `name  value` lines and lists of mappings as tables; writes all to `json` if given.

    Args:
      figures: what to print and write.
      json: file to write, if any.
      also: what to write but not to print.
    """
    out = Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH)
    plain = Table(box=None, show_header=False, pad_edge=False)
    for name, value in figures.items():
        if not _is_table(value):
            plain.add_row(name, format_value(value))
    if plain.row_count:
        out.print(plain)
    for name, value in figures.items():
        if _is_table(value):
            columns = (Column(heading, overflow="fold") for heading in value[0])
            table = Table(*columns, title=name, title_justify="left", box=None, pad_edge=False)
            for row in value:
                table.add_row(*(format_value(cell) for cell in row.values()))
            out.print(table)
    if json is not None:
        write_json(json, {**figures, **(also or {})})


def format_value(value: Any) -> str:
    """A figure as a person reads it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def _is_table(value: Any) -> bool:
    return isinstance(value, Sequence) and bool(value) and isinstance(value[0], Mapping)
