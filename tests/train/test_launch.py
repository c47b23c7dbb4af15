"""The launch files: what they start is what the command line takes."""

import subprocess
from pathlib import Path

import yaml

from falcon_relu.cli.main import parse
from train.distributed import DistributedConfig

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
    for status in ("0", "1", "130"):
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "VENV": str(tmp_path), "HOME": str(tmp_path), "STATUS": status}
        run = subprocess.run(
            [LAUNCH / "slurm.sh", "--config", "falcon_40b"], env=env | {"SLURM_JOB_ID": "7"}, check=False
        )
        assert run.returncode == int(status)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[0] for call in calls] == ["srun", "srun", "srun", "scontrol"]
    assert calls[-1] == "scontrol requeue 7"
    arguments = calls[0].split("falcon-relu train ")[1].split()
    _, args = parse("train", arguments)
    assert args.distributed.auto
    assert args.run.init_from == "tiiuae/falcon-40b"
