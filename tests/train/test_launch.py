"""The launch files: what they start is what the command line takes."""

import math
import subprocess
from pathlib import Path

import yaml
from jax.sharding import AbstractMesh, AxisType

from configs import falcon_40b
from falcon_relu.cli.main import parse
from falcon_relu.sharding import MESH_AXES
from train.distributed import DistributedConfig
from train.flops import A100, TPUS
from train.job import make_job
from train.plan.compile import read_config

LAUNCH = Path(__file__).parents[2] / "launch"


def test_gke():
    (document,) = yaml.safe_load_all((LAUNCH / "gke.yaml").read_text())
    job = document["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = [int(n) for n in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")]
    per_machine = container["resources"]["limits"]["google.com/tpu"]
    assert job["completions"] == job["parallelism"] == chips[0] * chips[1] * chips[2] // per_machine
    program, name, *arguments = container["command"]
    assert (program, name) == ("falcon-relu", "train")
    assert parse(name, arguments)[1].distributed == DistributedConfig(auto=True)


def test_slurm(tmp_path):
    """The script, with srun and scontrol that write down how they were called."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").touch()
    for name, status in (("srun", "${STATUS}"), ("scontrol", "0")):
        tool = tmp_path / name
        tool.write_text(f'#!/bin/bash\necho "{name} $@" >> "{tmp_path}/calls"\nexit {status}\n')
        tool.chmod(0o755)
    for status in ("0", "1", "130", "143"):
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "VENV": str(tmp_path), "HOME": str(tmp_path), "STATUS": status}
        run = subprocess.run(
            [LAUNCH / "slurm.sh", "--config", "falcon_40b"], env=env | {"SLURM_JOB_ID": "7"}, check=False
        )
        assert run.returncode == int(status)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[0] for call in calls] == ["srun", "srun", "srun", "scontrol", "srun", "scontrol"]
    assert calls[-1] == "scontrol requeue 7"
    arguments = calls[0].split("falcon-relu train ")[1].split()
    _, args = parse("train", arguments)
    assert args.distributed.auto
    assert args.run.init_from == "tiiuae/falcon-40b"


def options(script: Path) -> dict[str, str]:
    """The `#SBATCH --name=value` lines of a script."""
    lines = (line.removeprefix("#SBATCH --") for line in script.read_text().splitlines() if line.startswith("#SBATCH"))
    return dict(line.partition("=")[::2] for line in lines)


def test_each_launch_file_starts_a_run_that_its_machines_take_and_leaves_it_time_to_stop():
    """Memory is compiled for in tests/train/plan; here rows, layers, and the time of two steps and a checkpoint."""
    slurm = options(LAUNCH / "slurm.sh")
    gpus = int(slurm["nodes"]) * int(slurm["ntasks-per-node"])
    (document,) = yaml.safe_load_all((LAUNCH / "gke.yaml").read_text())
    pod = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    shape = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    gke = parse("train", pod["containers"][0]["command"][2:])[1].run
    for config, devices, chip, seconds in (
        (falcon_40b.CONFIG, gpus, A100, int(slurm["signal"].partition("@")[2])),
        (gke, math.prod(map(int, shape.split("x"))), TPUS["v5p"], int(pod["terminationGracePeriodSeconds"])),
    ):
        named = math.prod(size for size in config.mesh if size != -1)
        sizes = tuple(devices // named if size == -1 else size for size in config.mesh)
        assert math.prod(sizes) == devices
        job = make_job(config, AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3), read_config)
        step = job.flops / (devices * chip.tflops * 1e12 * 0.5)
        checkpoint = 12 * job.student.config.n_params / 5e9  # parameters and moments, to a disk of 5 GB/s
        assert 2 * step + checkpoint < seconds, (step, checkpoint)
