"""`falcon-relu card`: a model card from measured JSON files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from falcon_relu.checkpoints.schema import parse
from falcon_relu.cli.outputs import Made, Output
from falcon_relu.cli.report import report
from falcon_relu.errors import FalconError
from falcon_relu.evaluation.card import LICENCES, MISSING, render
from falcon_relu.evaluation.card_facts import HeldOut, Manifest, Results, Sparsity, Training, speeds_of
from falcon_relu.files import read_json, real_path, write_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(Output):
    """Write a Markdown model card from what other commands measured.

    Every number in it comes from one of the files below; what they lack is shown as not measured.
    """

    out: Annotated[Path, tyro.conf.Positional]
    """The Markdown file to write; README.md in a folder for the hub."""
    name: str
    """The model's name."""
    base: str | None = None
    """The model that it was made from, on the hub; it decides the licence."""
    run: Path | None = None
    """Folder of the training run, for its config.json."""
    data: tuple[Path, ...] = ()
    """Folders of token shards, for their manifest.json."""
    relu: Path | None = None
    """results.json of falcon-relu eval for the model."""
    original: Path | None = None
    """The same for the original."""
    sparse: Path | None = None
    """The same for the model's sparse decoding."""
    held_out: Path | None = None
    """JSON of falcon-relu held-out."""
    sparsity: Path | None = None
    """sparsity.json of falcon-relu sparsity."""
    speeds: tuple[Path, ...] = ()
    """JSON of falcon-relu bench or decode."""

    def written(self) -> list[Made]:
        """What is written besides `json`."""
        return [Made(self.out)]


def run(args: Args) -> None:
    """Reads, writes the card, says what is missing."""
    if args.base is not None and args.base not in LICENCES:
        raise FalconError(f"the licence of {args.base} is not known here; known: {', '.join(LICENCES)}")
    facts: dict[str, Any] = {"name": args.name, "base": args.base}
    facts["training"] = _read(Training, args.run and args.run / "config.json")
    names = [real_path(folder).name for folder in args.data]
    facts["data"] = {
        name if names.count(name) == 1 else str(folder): _read(Manifest, folder / "manifest.json")
        for name, folder in zip(names, args.data, strict=True)
    }
    facts |= {name: _read(Results, getattr(args, name)) for name in ("relu", "original", "sparse")}
    facts |= {"held_out": _read(HeldOut, args.held_out), "sparsity": _read(Sparsity, args.sparsity)}
    facts["speeds"] = [_speeds(path) for path in args.speeds]
    card = render(facts)
    write_text(args.out, card, replace=args.overwrite)
    given = [name for name, value in facts.items() if value and name not in ("name", "base")]
    report({"card": str(args.out), "from": ", ".join(given) or "nothing", "missing": card.count(MISSING)}, args)


def _speeds(path: Path) -> Any:
    found = read_json(path)
    speeds_of(found, path)  # so that an error names the file
    return found


def _read(kind: type, path: Path | None) -> Any:
    """The value in a JSON file, made sure to be of a kind; None without a path."""
    if path is None:
        return None
    found = read_json(path)
    parse(kind, found, path, unknown_keys=True)
    return found
