"""`falcon-relu train`: a run from a config, changed field by field from the shell."""

from __future__ import annotations

import dataclasses
import time
from typing import Annotated

import tyro

from falcon_relu.cli.configs import config_names, load_config
from falcon_relu.cli.devices import Processes, together
from falcon_relu.cli.outputs import Made
from falcon_relu.cli.report import report
from train import loop
from train.config import TrainConfig
from train.machine import keep_freed_memory, platform_here, recommend

_NAMES = ", ".join(config_names(TrainConfig))
EPILOGUE = f"""Start from a config, a name ({_NAMES}) or a .py file with a TrainConfig named CONFIG:

  falcon-relu train --config falcon_40b --out runs/40b --data.batch-size 960

Run the same command again to go on after an interruption."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(Processes):
    """Train or distil a model as a config says."""

    run: Annotated[TrainConfig, tyro.conf.arg(name="")]

    def written(self) -> list[Made]:
        """What is written besides `json`."""
        return [Made(self.run.out, goes_on=True, locked=False)]


def defaults(config: str | None) -> Args:
    """The arguments that `--config` stands for; those of the published run for `--help` alone."""
    return Args(run=load_config(config or "falcon_40b", TrainConfig))


def run(args: Args) -> None:
    """Trains, then reports the last validation, once for all processes."""
    keep_freed_memory()
    recommend(platform_here())
    start = time.perf_counter()
    with together(args):
        results = loop.run(args.run)
        report({"out": str(args.run.out)} | results | {"seconds": time.perf_counter() - start}, args)
