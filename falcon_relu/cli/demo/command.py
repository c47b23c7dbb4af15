"""`falcon-relu demo`: text, teacher, swap, distillation, predictors, sparse decoding and a report, in one command."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from falcon_relu.cli.configs import load_config
from falcon_relu.cli.demo.recipe import Recipe
from falcon_relu.cli.demo.report import derived, write_report
from falcon_relu.cli.demo.stages import Demo
from falcon_relu.cli.outputs import Made, Output
from falcon_relu.cli.report import report
from falcon_relu.progress import console
from train.machine import keep_freed_memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(Output):
    """The whole method on real text: train a small GELU Falcon, swap in ReLU, distil, fit predictors, decode sparsely.

    Takes about 18 minutes of processor time: ten minutes on two fast cores, longer on slower ones. Run it again to go
    on after an interruption; finished stages are kept.
    """

    config: str = "demo"
    """Settings: a name in configs/, or a .py file that sets CONFIG to a Recipe."""
    out: Path = Path("runs/demo")
    """Folder of the run; the report is report.html in it."""

    def written(self) -> list[Made]:
        """What is written besides `json`."""
        return [Made(self.out, goes_on=True)]


def run(args: Args) -> None:
    """Runs what is not finished, prints the results and writes the report."""
    keep_freed_memory()
    recipe = load_config(args.config, Recipe)
    results = Demo(recipe, args.out).run()
    write_report(args.out / "report.html", results)
    report(_summary(results), args, also=results)
    console.print(f"Report: {args.out / 'report.html'}")


def _summary(results: dict[str, Any]) -> dict[str, Any]:
    retained, point = results["retained"], results["operating_point"]
    widths = results["widths_of"]["model"]
    times = derived(results)["widths"]["speedup"]
    return ({} if times is None else {f"times as fast as dense, sparse at the widths of {widths}": times}) | {
        "teacher's next-token accuracy reached": retained["lm_kl"],
        "the published run reached": retained["published"],
        "about that": retained["why"] or None,
        "zeros by layer": ", ".join(f"{share:.0%}" for share in results["zeros_by_layer"]["lm_kl"]),
        "neurons read": point["read"],
        "neurons that fire": point["fired"],
        "KL(dense || sparse), nats a token": point["kl"],
        "same likeliest token, dense and sparse": point["agreement"],
        "seconds": sum(results["seconds"].values()),
        "processor minutes": sum(results["processor_seconds"].values()) / 60,
        "quality on held-out text": [
            {name: value for name, value in row.items() if name != "zeros_by_layer"} for row in results["quality"]
        ],
        "predictors on held-out tokens": results["predictor"],
        "decoding": results["decode"],
        f"decoding at the widths of {widths}": results["widths"],
    }
