from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from falcon_relu.cli import main
from falcon_relu.config import family
from tests.benchmarks.measuring_40b import DEVICES, MEMORY_GB, compiled
from tests.train.launches import gke, slurm
from train.flops import TPUS
from train.plan import hlo

D, HEADS, T, V = 8192, 128, 2048, 65024


def _plan(folder: Path, *arguments: str) -> tuple[dict[str, Any], str, str]:
    """Figures, compiled text and what was printed, of a plan in a process of its own."""
    command = [sys.executable, "-m", "falcon_relu", "plan", *arguments]
    outputs = ["--json", str(folder / "plan.json"), "--text", str(folder / "step.txt")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([*command, *outputs], env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "plan.json").read_text()), (folder / "step.txt").read_text(), done.stdout


def _assert_no_large_arrays(text: str, rows: int, mesh: tuple[int, int, int]) -> None:
    """Neither logits of a microbatch's rows on one device nor scores of all its heads are anywhere in the program."""
    _, fsdp, tensor = mesh
    vocabulary, widths = {V, V // tensor}, {D, D // fsdp}
    seen = 0
    for array in hlo.arrays(text):
        shape = set(array.shape)
        if shape & vocabulary and not shape & widths:  # logits, where what has a width is the head
            seen += 1
            assert array.size < rows * T * V // tensor, array
        if array.shape.count(T) >= 2:
            assert array.size < HEADS // tensor * T * T, array
    assert seen


# Every program of a run that starts from a checkpoint and is taught by another.
PHASES = [
    "training step",
    "loading the student",
    "resuming",
    "loading the teacher",
    "validation",
    "samples",
    "checkpoint",
    "finished weights",
]
SAMPLES = ("--samples.every", "500", "--samples.prompts", "Falcons are", "--samples.tokenizer", "not-here.json")


def _assert_fits(figures: dict[str, Any], memory_gb: float, seconds: float = float("inf")) -> None:
    assert figures["fits"]
    assert [row["change"] for row in figures["tried"]] == ["as configured"]
    assert [row["program"] for row in figures["programs"]] == PHASES
    assert all(0 < row["GB a device"] <= memory_gb for row in figures["programs"]), figures["programs"]
    assert figures["seconds from a stop signal to the end"] <= seconds


def test_every_program_of_the_slurm_launch_fits_its_40_devices(tmp_path):
    """The published run."""
    launch = slurm()
    figures, text, printed = _plan(tmp_path, *launch.plan_arguments, *SAMPLES)
    _assert_fits(figures, min(launch.memory_gb, launch.chip.memory_gb), launch.seconds)
    # 12 bytes a parameter; five machines share them.
    model, tokens = family("falcon-40b"), 1920 * T
    copied = {row["program"]: row["GB copied to each host"] for row in figures["programs"]}
    assert copied["checkpoint"] == pytest.approx(12 * model.n_params / 5e9, rel=1e-3)
    assert figures["hardware / model FLOPs"] <= 1.10
    assert "hardware / model FLOPs" in printed
    # By hand: 8 N a token; attention over the whole square for teacher, student, once more, and twice for gradients.
    attention = 2 * 2 * model.n_layers * D * T
    hand = tokens * (8 * model.n_params + 5 * attention) / launch.devices
    assert figures["hardware TFLOPs a step"] == pytest.approx(hand / 1e12, rel=0.002)
    _assert_no_large_arrays(text, 1, (5, 8, 1))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("arguments", "seconds", "mesh", "rows", "limit"),
    [
        (gke().plan_arguments, gke().seconds, (4, 16, 1), 2, 1.10),
        (
            ["--config=falcon_40b_v5e_256", "--topology=v5e:16x16"],  # as a comment in gke.yaml offers
            gke().seconds,
            (1, 128, 2),
            1,
            1.35,
        ),
    ],
    ids=["gke", "v5e"],
)
def test_every_program_of_the_gke_launch_fits_its_tpus(tmp_path, arguments, seconds, mesh, rows, limit):
    pytest.importorskip("libtpu")
    figures, text, _ = _plan(tmp_path, *arguments, *SAMPLES)
    _assert_fits(figures, figures["GB of"], seconds)
    assert figures["hardware / model FLOPs"] <= limit
    assert "splash_mha_fwd" in text
    _assert_no_large_arrays(text, rows, mesh)


def test_what_does_not_divide_is_said_in_a_sentence_with_the_config_made_for_it(capsys, monkeypatch):
    devices = [jax.devices()[0]] * 64  # of a v5p:4x4x4, which needs libtpu
    monkeypatch.setattr("falcon_relu.cli.plan.topology_devices", lambda _: (devices, TPUS["v5p"]))
    assert main(["plan", "--config", "falcon_40b", "--topology", "v5p:4x4x4"]) == 1
    assert " ".join(capsys.readouterr().err.split()) == (
        "falcon-relu plan: cannot be shared evenly: a microbatch of 40 rows (batch_size 1920 / microbatches 48) by the "
        "64 devices along data and fsdp, and 60 layers of parameters and moments by the 8 devices along data; take "
        "--config falcon_40b_v5p_64, made for v5p:4x4x4"
    )


SMALL = """
import dataclasses
from configs import falcon_40b
PUBLISHED = falcon_40b.CONFIG
CONFIG = dataclasses.replace(
    PUBLISHED, init_from=None, init_activation=None, model="tiny-40b", teacher=None, mesh=(2, 2, 2), microbatches=1,
    remat="none", loss=dataclasses.replace(PUBLISHED.loss, kd_weight=0.0),
    data=dataclasses.replace(PUBLISHED.data, seq_len=256, batch_size=8),
)
"""


def test_what_does_not_fit_is_made_to_by_the_knobs_that_the_plan_names(tmp_path):
    (tmp_path / "small.py").write_text(SMALL)
    arguments = ("--config", str(tmp_path / "small.py"), "--devices", "8", "--device-memory-gb", "0.006")
    figures, _, _ = _plan(tmp_path, *arguments)
    first, *others = figures["tried"]
    assert first == {"change": "as configured", "GB a device": first["GB a device"], "fits": False}
    assert figures["fits"]
    assert "--microbatches" in others[-1]["change"]
    assert others[-1]["GB a device"] <= 0.006 < first["GB a device"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--topology"),
        (["--topology", "v9:2x2"], "v5p"),
        (["--devices", "3"], "plan in a process of its own"),  # the tests' process has 8
        (["--devices", "8", "--mesh", "1", "8", "1", "--microbatches", "480"], "choose --microbatches"),
    ],
)
def test_wrong_usage_says_what_to_do(arguments, says, capsys):
    assert len(jax.devices()) == 8
    assert main(["plan", "--config", "falcon_40b", *arguments]) == 1
    assert says in " ".join("".join(capsys.readouterr()).split())


def test_a_topology_without_the_tpu_compiler_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    assert main(["plan", "--config", "falcon_40b", "--topology", "v5p:4x4x4"]) == 1
    assert "pip install 'falcon-relu[tpu]'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_40b_is_recorded_and_measured_on_eight_devices_with_80_gb(dtype):
    programs = [*compiled("falcon-40b", jnp.dtype(dtype))]
    assert [program.planned.phase for program in programs] == [
        "sparsity", "held-out, with a teacher", "held-out, with a predictor", "record",
    ]  # fmt: skip
    weights = family("falcon-40b").n_params * jnp.dtype(dtype).itemsize / DEVICES
    for program in programs:
        assert 0.99 * weights < program.bytes < 0.9 * MEMORY_GB * 1e9, (program.planned.phase, program.memory)
