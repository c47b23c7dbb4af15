"""`falcon-relu plan`: what a run would take on devices that are not there."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from falcon_relu.cli.configs import config_names, load_config
from falcon_relu.cli.outputs import Made, Output
from falcon_relu.cli.report import report
from falcon_relu.errors import FalconError, check_number
from falcon_relu.files import write_text
from falcon_relu.progress import console
from falcon_relu.sharding import MeshError
from train.config import TrainConfig
from train.flops import A100, Chip
from train.plan.compile import topology_devices, virtual_devices
from train.plan.plan import Assumptions, plan_run

_NAMES = ", ".join(config_names(TrainConfig))
EPILOGUE = f"""Start from a config, a name ({_NAMES}) or a .py file with a TrainConfig named CONFIG:

  falcon-relu plan --config falcon_40b --topology v5p:4x4x4
  falcon-relu plan --config falcon_40b --devices 40 --mesh 5 8 1 --microbatches 24

A TPU topology needs the extra "tpu" (pip install 'falcon-relu[tpu]'), and no TPU."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(Output):
    """Compile what a run executes with no device present; report memory, FLOPs, traffic, time.

    Where it does not fit into the memory, changes that save some are tried in turn until it does.
    """

    run: Annotated[TrainConfig, tyro.conf.arg(name="")]
    topology: str | None = None
    """TPU topology: v4, v5e, v5p or v6e, and its shape, as in v5p:4x4x4 or v5e:16x16."""
    devices: int | None = None
    """Number of other devices, described by the options that begin with --device."""
    device_memory_gb: float = A100.memory_gb
    """1e9 bytes of memory of each."""
    device_tflops: float = A100.tflops
    """1e12 bf16 FLOPs a second of each, at most."""
    device_link_gb_s: float = A100.link_gb_s
    """1e9 bytes a second that each receives from others of its node."""
    devices_per_node: int = A100.node or 8
    """Devices in a node."""
    device_network_gb_s: float = A100.network_gb_s
    """1e9 bytes a second that each receives from other nodes."""
    efficiency: float = Assumptions.efficiency
    """Share of the peak that matrix products are assumed to reach."""
    tokens: float = Assumptions.tokens
    """Tokens of the run whose time is predicted."""
    disk_gb_s: float = Assumptions.disk_gb_s
    """1e9 bytes a second that all machines together write to the shared disk."""
    text: Path | None = None
    """Also write the compiled training step to this file."""

    def __post_init__(self) -> None:
        for name in ("devices", "devices_per_node"):
            if (value := getattr(self, name)) is not None:
                check_number(f"--{name.replace('_', '-')}", value, low=1)
        for name in ("device_memory_gb", "device_tflops", "device_link_gb_s", "device_network_gb_s"):
            check_number(f"--{name.replace('_', '-')}", getattr(self, name), above=0)

    def written(self) -> list[Made]:
        """What is written besides `json`."""
        return [Made(self.text)] if self.text is not None else []


def defaults(config: str | None) -> Args:
    """The arguments that `--config` stands for; those of the published run for `--help` alone."""
    return Args(run=load_config(config or "falcon_40b", TrainConfig))


def run(args: Args) -> None:
    """Plans, then reports."""
    if (args.topology is None) == (args.devices is None):
        raise FalconError("say what to plan for: either --topology, as in v5p:4x4x4, or --devices, as in 40")
    if args.topology is not None:
        devices, chip = topology_devices(args.topology)
    else:
        assert args.devices is not None
        chip = Chip(
            name=f"device with {args.device_memory_gb:g} GB",
            memory_gb=args.device_memory_gb,
            tflops=args.device_tflops,
            link_gb_s=args.device_link_gb_s,
            node=args.devices_per_node,
            network_gb_s=args.device_network_gb_s,
        )
        devices = virtual_devices(args.devices)
    assumptions = Assumptions(efficiency=args.efficiency, tokens=args.tokens, disk_gb_s=args.disk_gb_s)
    try:
        results, program = plan_run(args.run, devices, chip, assumptions, console.print)
    except MeshError as error:
        made_for = f"_{chip.topology}_{len(devices)}"
        named = [name for name in config_names(TrainConfig) if name.endswith(made_for)]
        if not named:
            raise
        raise FalconError(f"{error.what}; take --config {named[0]}, made for {args.topology}") from None
    if args.text is not None and program is not None:
        write_text(args.text, program.text, replace=args.overwrite)
    report(results, args)
