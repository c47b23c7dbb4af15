"""One description of a run for `train` and `plan`: its programs, and what both refuse before anything is loaded."""

from __future__ import annotations

import dataclasses
import gc
from collections import Counter, defaultdict
from pathlib import Path

import jax
import pytest
from jax.sharding import NamedSharding

import train.loop
import train.state
import train.watch
from falcon_relu.checkpoints.native import save_params
from falcon_relu.config import family
from falcon_relu.errors import FalconError
from falcon_relu.sharding import make_mesh, use_mesh
from tests.conftest import random_params
from tests.train.runs import config_of, make_data
from train.config import SamplesConfig
from train.data.batches import DataConfig, Manifests, Source
from train.data.shards import Manifest, Split
from train.folder import checkpoints
from train.job import Job, make_job
from train.loss import LossConfig
from train.plan.compile import bytes_per_device, planned_job, read_config
from train.plan.programs import programs

DATA = DataConfig(sources=(Source(Path("nowhere")),), seq_len=32, batch_size=16)
CACHED = {"data": dataclasses.replace(DATA, teacher_cache="teacher"), "loss": LossConfig(kd_weight=1.0, chunk=8)}


def test_a_plan_needs_no_cache_to_compile_for_one(tmp_path):
    config = config_of(tmp_path / "run", **CACHED, microbatches=2)
    job = planned_job(config, jax.devices())
    found = {planned.phase: (planned.arguments, made) for planned, made in shapes(job)}
    rows = {name: found[name][0][1]["tokens_BxT"].shape for name in ("training step", "validation")}
    assert rows == {"training step": (16, 32), "validation": (8, 32)}
    arguments, (state, metrics) = found["training step"]
    assert arguments[1]["teacher"]["ids_BxTxk"].shape == (16, 32, 64)
    assert jax.tree.map(lambda leaf: leaf.shape, state) == jax.tree.map(lambda leaf: leaf.shape, arguments[0])
    assert {"kl", "agreement", "zeros"} <= metrics.keys()


def shapes(job):
    """The programs of a run, and what each returns, without compiling any."""
    generator, made = programs(job), None
    with use_mesh(job.mesh):
        while True:
            try:
                planned = generator.send(made)
            except StopIteration:
                return
            made = planned.function and planned.function.eval_shape(*planned.arguments)
            yield planned, made


def test_what_a_run_holds_while_it_executes_a_program_is_what_the_plan_names(tmp_path, monkeypatch):
    data = make_data(tmp_path)
    weights = str(tmp_path / "weights")
    save_params(Path(weights), family("tiny-40b"), random_params(family("tiny-40b")))
    samples = SamplesConfig(every=1, prompts=("The number",), tokenizer=tmp_path / "tokenizer.json")
    how = {"model": None, "init_from": weights, "activation": "relu", "teacher": weights, "teacher_dtype": "bfloat16"}
    config = config_of(tmp_path / "run", data, **how, mesh=(2, 4, 1), steps=3, samples=samples, checkpoint_every=2)
    config = dataclasses.replace(config, loss=LossConfig(kd_weight=1.0, chunk=8), validate_every=2)
    planned = defaultdict(list)
    for program, _ in shapes(make_job(config, make_mesh(config.mesh), read_config)):
        planned[program.phase].append(bytes_per_device((program.beside, _arrays(program.arguments))))

    gc.collect()
    held, before = Counter[str](), {id(array) for array in jax.live_arrays()}

    def watched(phase, function):
        def call(*arguments, **named):
            arrays = [array for array in jax.live_arrays() if id(array) not in before]
            # Others are copies for a checkpoint: on CPUs a device's memory is the host's.
            ours = [array for array in arrays if isinstance(array.sharding, NamedSharding)]
            held[phase] = max(held[phase], int(bytes_per_device(ours)))
            return function(*arguments, **named)

        return call

    def watch(phase, where, name):
        monkeypatch.setattr(where, name, watched(phase, getattr(where, name)))

    def watch_made(phase, where, name):
        make = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *arguments: watched(phase, make(*arguments)))

    watch_made("training step", train.loop._Loop, "_compiled")
    watch_made("validation", Job, "validation_step")
    watch_made("loading the student", train.state, "moments_program")
    watch_made("samples", train.watch, "sampling_copy")
    watch("checkpoint", checkpoints, "checksums")
    watch("finished weights", train.loop, "save_params")
    train.loop.run(config)
    assert held.keys() <= planned.keys()
    state = int(bytes_per_device(make_job(config, make_mesh(config.mesh), read_config).abstract_state()))
    assert len(held) == 6
    for phase, size in held.items():
        assert any(size == pytest.approx(named, abs=0.05 * state) for named in planned[phase]), (phase, size, planned)


def _arrays(arguments):
    return [leaf for leaf in jax.tree.leaves(arguments) if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"microbatches": 4},
            "a microbatch of 4 rows .* by the 8 devices along data and fsdp: choose --microbatches 2",
        ),
        ({"mesh": (8, 1, 1)}, "cannot be shared evenly: 2 layers .* by the 8 devices along data: choose --mesh 2 4 1"),
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
