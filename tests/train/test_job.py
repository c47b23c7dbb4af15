"""One description of a run for `train` and `plan`: its programs, and what both refuse before anything is loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import pytest

import train.loop
from falcon_relu.errors import FalconError
from falcon_relu.sharding import make_mesh, use_mesh
from tests.train.runs import config_of
from train.data.batches import DataConfig, Manifests, Source
from train.data.shards import Manifest, Split
from train.job import make_job
from train.loss import LossConfig
from train.plan.compile import planned_job, read_config

DATA = DataConfig(sources=(Source(Path("nowhere")),), seq_len=32, batch_size=16)
CACHED = {"data": dataclasses.replace(DATA, teacher_cache="teacher"), "loss": LossConfig(kd_weight=1.0, chunk=8)}


def test_a_plan_needs_no_cache_to_compile_for_one(tmp_path):
    config = config_of(tmp_path / "run", **CACHED, microbatches=2)
    job = planned_job(config, jax.devices())
    programs = job.programs()
    rows = {name: arguments[1]["tokens_BxT"].shape for name, (_, arguments) in programs.items()}
    assert rows == {"training step": (16, 32), "validation": (8, 32)}
    function, arguments = programs["training step"]
    assert arguments[1]["teacher"]["ids_BxTxk"].shape == (16, 32, 64)
    with use_mesh(job.mesh):
        state, metrics = jax.eval_shape(function, *arguments)
    assert jax.tree.map(lambda leaf: leaf.shape, state) == jax.tree.map(lambda leaf: leaf.shape, arguments[0])
    assert {"kl", "agreement", "zeros"} <= metrics.keys()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"microbatches": 4},
            "a microbatch of 4 rows .* by the 8 devices along data and fsdp: change --microbatches 2",
        ),
        ({"mesh": (8, 1, 1)}, "2 layers cannot be shared evenly by the 8 devices along data.*--mesh 2 4 1"),
        ({"mesh": (2, 2, 3)}, "does not fit 8 devices"),
        ({"model": "tiny-rw", "teacher": "tiiuae/falcon-40b"}, "vocabularies differ: teacher 65024, student 512"),
        ({"model": None, "init_from": "somebody/something"}, "is not a folder, and a plan downloads nothing"),
    ],
)
def test_a_plan_refuses_what_cannot_run(changes, says, tmp_path):
    with pytest.raises(FalconError, match=says):
        planned_job(config_of(tmp_path / "run", DATA, **changes), jax.devices())
    assert not list(tmp_path.iterdir())


def test_a_run_refuses_the_same_before_it_writes_or_loads_anything(tmp_path, monkeypatch):
    split = Split(rows=0, tokens=0, documents=0, shards=())
    monkeypatch.setattr(train.loop, "load_model", lambda *_, **__: pytest.fail("weights were read"))
    monkeypatch.setattr(train.loop, "init_params", lambda *_, **__: pytest.fail("weights were made"))
    monkeypatch.setattr(train.loop, "read_manifests", lambda config: Manifests([manifest], []))
    manifest = Manifest(
        seq_len=32,
        vocab_size=512,
        eos_id=0,
        tokenizer_sha256="0" * 64,
        seed=0,
        validation_fraction=0.0,
        sources=(),
        splits={"train": split, "validation": split},
        bad_lines=0,
        bad_examples=(),
    )
    for changes, says in (({"microbatches": 4}, "a microbatch of 4 rows"), ({"mesh": (8, 1, 1)}, "2 layers")):
        with pytest.raises(FalconError, match=says):
            train.loop.run(config_of(tmp_path / "run", DATA, **changes))
        assert not list(tmp_path.iterdir())
    larger = dataclasses.replace(manifest, vocab_size=513)
    config = config_of(tmp_path / "run", DATA)
    with pytest.raises(FalconError, match="tokenizer has 513 entries, the model's vocabulary 512"):
        make_job(config, make_mesh(config.mesh), read_config, manifests=Manifests([larger], []))
    fresh = make_job(config, make_mesh(config.mesh), read_config, manifests=Manifests([manifest], [])).student.config
    assert fresh.eos_token_id == fresh.bos_token_id == 0  # the data's, not Falcon's own
