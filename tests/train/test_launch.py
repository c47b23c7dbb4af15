"""The launch files: what they start is what the command line takes, fits, and is left time to stop."""

import subprocess
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from falcon_relu.cli.main import parse
from falcon_relu.sharding import abstract_mesh, mesh_sizes
from tests.train.launches import LAUNCH, gke, slurm
from train.job import make_job
from train.plan.compile import bytes_per_device, read_config
from train.plan.plan import Assumptions, seconds_to_stop


def test_slurm_sh(tmp_path):
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


@pytest.mark.parametrize("launch", [slurm(), gke()], ids=["slurm", "gke"])
def test_a_launch_file_starts_a_run_that_its_machines_take_and_leaves_it_time_to_stop(launch):
    """By hand, in a moment; tests/train/plan/test_plan.py compiles every program of them."""
    sizes = mesh_sizes(launch.config.mesh, launch.devices)
    job = make_job(launch.config, abstract_mesh(sizes), read_config)  # what does not divide is refused
    held = bytes_per_device((job.abstract_state(), job.abstract_teacher()))
    assert held / 1e9 < launch.memory_gb / 2
    step = job.flops / (launch.devices * launch.chip.tflops * 1e12 * 0.45)
    assert seconds_to_stop(job, step, Assumptions.disk_gb_s) < launch.seconds


def test_the_container_installs_versions_that_the_package_allows_and_no_others():
    lines = (LAUNCH / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(name): version for name, _, version in (li.partition("==") for li in lines if "==" in li)}
    assert len(pins) == sum(not line.startswith("#") for line in lines)
    project = tomllib.loads((LAUNCH.parent / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    asked = [*project["build-system"]["requires"], *project["project"]["dependencies"], *extras["tpu"], *extras["gpu"]]
    for requirement in map(Requirement, asked):
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement
    assert {"libtpu", "jax-cuda12-plugin"} <= pins.keys()
    assert "PIP_CONSTRAINT=/src/launch/constraints.txt" in (LAUNCH / "Dockerfile").read_text()
