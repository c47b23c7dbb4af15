"""The launch files, read as what they start: config, machines, and the time that they leave a run to stop in."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import yaml

from falcon_relu.cli.main import parse
from train.config import TrainConfig
from train.distributed import DistributedConfig
from train.flops import A100, TPUS, Chip

LAUNCH = Path(__file__).parents[2] / "launch"


@dataclasses.dataclass(frozen=True)
class Launch:
    """A run as a launch file starts it.

    Attributes:
      arguments: of `falcon-relu train`.
      devices: how many there are in all.
      chip: what each is.
      topology: of TPUs.
      memory_gb: 1e9 bytes of each that JAX takes.
      seconds: from SIGTERM to SIGKILL.
    """

    arguments: tuple[str, ...]
    devices: int
    chip: Chip
    topology: str | None
    memory_gb: float
    seconds: float

    @property
    def config(self) -> TrainConfig:
        run: Any = parse("train", self.arguments)[1]
        assert run.distributed == DistributedConfig(auto=True)
        return run.run

    @property
    def plan_arguments(self) -> list[str]:
        """Of `falcon-relu plan`: the same run, for these machines."""
        where = ["--devices", str(self.devices)] if self.topology is None else ["--topology", self.topology]
        return [*where, *(word for word in self.arguments if not word.startswith("--distributed"))]


def slurm() -> Launch:
    """As the comment at the top of the script says that it is submitted."""
    text = (LAUNCH / "slurm.sh").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))
    assert "requeue" in options
    (given,) = re.findall(r"^#   sbatch launch/slurm.sh (.*)$", text, re.MULTILINE)
    (fixed,) = re.findall(r'^srun .*falcon-relu train (.*) "\$@"$', text, re.MULTILINE)
    (share,) = re.findall(r"XLA_PYTHON_CLIENT_MEM_FRACTION:-([\d.]+)", text)
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    signal, _, seconds = options["signal"].partition("@")
    assert signal == "TERM"
    return Launch(
        arguments=(*fixed.split(), *given.split()),
        devices=int(options["nodes"]) * int(options["ntasks-per-node"]),
        chip=A100,
        topology=None,
        memory_gb=float(share) * 81_920 * 2**20 / 1e9,  # nvidia-smi shows 81920MiB
        seconds=float(seconds),
    )


def gke() -> Launch:
    (document,) = yaml.safe_load_all((LAUNCH / "gke.yaml").read_text())
    job = document["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    selector = pod["nodeSelector"]
    shape = selector["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(map(int, shape.split("x")))
    assert job["completions"] == job["parallelism"] == chips // container["resources"]["limits"]["google.com/tpu"]
    assert container["command"][:2] == ["falcon-relu", "train"]
    kind = {"tpu-v5p-slice": "v5p", "tpu-v5-lite-podslice": "v5e"}[selector["cloud.google.com/gke-tpu-accelerator"]]
    return Launch(
        arguments=tuple(container["command"][2:]),
        devices=chips,
        chip=TPUS[kind],
        topology=f"{kind}:{shape}",
        memory_gb=TPUS[kind].memory_gb,
        seconds=float(pod["terminationGracePeriodSeconds"]),
    )
