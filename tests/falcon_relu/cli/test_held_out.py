"""`falcon-relu held-out` on a checkpoint of the hub's layout that does not state its activation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from falcon_relu.checkpoints.convert import export_hf
from falcon_relu.checkpoints.native import save_params
from falcon_relu.cli.main import main
from falcon_relu.config import family
from falcon_relu.sharding import make_mesh
from infer.predictor.recording import open_recording
from tests.conftest import random_params
from tests.train.processes import free_port
from tests.train.runs import make_data
from train.data.batches import open_folders
from train.validation import validate


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Token shards, an original (GELU) model as native weights, and the same as the hub has it: silent about GELU."""
    folder = tmp_path_factory.mktemp("held out")
    make_data(folder)
    config = family("tiny-40b").replace(d_model=64, n_heads=2, n_kv_heads=1, d_ff=128, n_layers=1)
    save_params(folder / "native", config, random_params(config))
    export_hf(folder / "native", folder / "hub")
    stored = json.loads((folder / "hub" / "config.json").read_text())
    del stored["activation"]
    (folder / "hub" / "config.json").write_text(json.dumps(stored))
    return folder


def measured(folder: Path, model: str, *more: str) -> dict:
    path = folder / "found.json"
    assert (
        main(["held-out", str(folder / model), str(folder / "tokens"), "--json", str(path), "--overwrite", *more]) == 0
    )
    return json.loads(path.read_text())


def test_an_original_is_read_and_swapped(folder, capsys):
    native = measured(folder, "native")
    assert native["activation"] == "gelu"
    alone = validate(
        folder / "native", open_folders([folder / "tokens"], 8)[0], mesh=make_mesh((1, 1, 1), jax.devices()[:1])
    )
    assert native["cross_entropy"] == pytest.approx(alone["cross_entropy"], rel=1e-5)  # that was on eight devices
    rounded = measured(folder, "native", "--dtype", "bfloat16", "--mesh", "2", "2", "2")
    assert rounded["cross_entropy"] != native["cross_entropy"]
    assert rounded["cross_entropy"] == pytest.approx(native["cross_entropy"], rel=0.01)
    hub = measured(folder, "hub", "--activation", "gelu")
    assert hub["perplexity"] == native["perplexity"]
    assert max(hub["zeros"]) < 0.01
    swapped = measured(
        folder, "hub", "--activation", "gelu", "--swap-to", "relu",
        "--teacher", str(folder / "hub"), "--teacher-activation", "gelu",
    )  # fmt: skip
    assert swapped["activation"] == "relu"
    assert swapped["kl"] > 0 < min(swapped["zeros"])
    assert swapped["perplexity"] != native["perplexity"]
    capsys.readouterr()
    for more, says in (
        ([], "--activation gelu"),  # which is what helps
        (["--activation", "gelu", "--teacher", str(folder / "hub")], "--teacher-activation gelu"),
        (["--activation", "gelu", "--teacher-activation", "gelu"], "--teacher"),
        (["--activation", "gelu", "--batch-size", "0"], "--batch-size"),
        (["--activation", "gelu", "--batches", "0"], "--batches"),
    ):
        status = 2 if more and more[-1] == "0" else 1  # a number that is refused before there is a command to run
        assert main(["held-out", str(folder / "hub"), str(folder / "tokens"), *more]) == status
        said = capsys.readouterr().err
        assert says in said
        assert "Traceback" not in said


PROCESS = """
import contextlib, sys
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[4]))
from falcon_relu.cli import devices
from falcon_relu.cli.main import main
from train.distributed import DistributedConfig, joined
rank, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
several = ["--distributed.coordinator", f"127.0.0.1:{port}", "--distributed.num-processes", "2"]
several += ["--distributed.process-id", str(rank)]
alone = port == "0"
join = DistributedConfig() if alone else DistributedConfig(
    coordinator=f"127.0.0.1:{port}", num_processes=2, process_id=rank, heartbeat_seconds=10)
with joined(join):  # once for all commands
    devices.joined = lambda config: contextlib.nullcontext()
    for name, *arguments in (
        ["held-out", "relu", "tokens", "--teacher", "native"],
        ["predictor", "record", "relu", "tokens", f"recording{port}", "--tokens", "500"],
        ["sparsity", "relu", "tokens", "--batch-size", "8", "--batches", "2", "--out", f"sparsity{port}"],
        ["teacher-cache", "--teacher", "native", "--tokens", "tokens", "--name", f"cache{port}"],
        ["generate", "relu", "The number 7", "--tokenizer", "tokenizer.json", "--dtype", "float32"],
    ):
        json = ["--json", f"{name}{port}.json"]
        assert main([name, *arguments, *json, *([] if alone else several)]) == 0, name
"""


@pytest.mark.slow
def test_two_processes_measure_as_one_does(folder):
    """held-out, record, sparsity, teacher-cache and generate, on two devices of one process and of two."""
    original = family("tiny-40b").replace(d_model=64, n_heads=2, n_kv_heads=1, d_ff=128, n_layers=1)
    save_params(folder / "relu", original.with_activation("relu"), random_params(original))
    port = str(free_port())

    def start(rank: int, port: str, devices: int) -> subprocess.Popen:
        command = [sys.executable, "-c", PROCESS, str(rank), port, str(folder), str(devices)]
        return subprocess.Popen(command, cwd=folder, env=os.environ | {"JAX_PLATFORMS": "cpu"})

    assert [process.wait(timeout=300) for process in (start(0, port, 1), start(1, port, 1))] == [0, 0]
    assert start(0, "0", 2).wait(timeout=300) == 0

    def found(name: str, port: str) -> dict:
        return json.loads((folder / f"{name}{port}.json").read_text())

    for name, values in (
        ("held-out", ("cross_entropy", "kl")),
        ("predictor", ("tokens", "GB")),
        ("sparsity", ("zeros", "tokens")),
        ("teacher-cache", ("finished", "new rows", "new bytes")),
    ):
        for value in values:
            assert found(name, port)[value] == pytest.approx(found(name, "0")[value], rel=1e-5), name
    assert found("generate", port)["texts"] == found("generate", "0")["texts"]
    one, two = (open_recording(folder / f"recording{p}") for p in ("0", port))
    for a, b in zip(one.layer(0), two.layer(0), strict=True):
        np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), rtol=0.3, atol=1e-3)
