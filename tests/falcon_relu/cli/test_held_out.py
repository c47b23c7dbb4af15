"""`falcon-relu held-out` on a checkpoint of the hub's layout that does not state its activation."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest

from falcon_relu.checkpoints.convert import export_hf
from falcon_relu.checkpoints.native import save_params
from falcon_relu.cli.main import main
from falcon_relu.config import family
from falcon_relu.sharding import make_mesh
from tests.conftest import random_params
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
