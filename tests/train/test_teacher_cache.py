"""Teacher shards: what they say, that they belong to their rows, that writing them can stop; training from them."""

from __future__ import annotations

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader

import train.loop
import train.teacher_cache
from falcon_relu.checkpoints.native import save_params
from falcon_relu.checkpoints.schema import seal, unseal
from falcon_relu.cli.main import main
from falcon_relu.config import family
from falcon_relu.errors import FalconError
from falcon_relu.model import Falcon, next_tokens
from tests.conftest import random_params
from tests.train.data.texts import make_documents, make_tokenizer, prepare_texts
from train.config import OptimizerConfig, TrainConfig
from train.data.batches import DataConfig, Source, train_batches, validation_batches
from train.data.shards import read_manifest
from train.loss import LossConfig
from train.teacher_cache import TeacherCacheConfig, write_teacher_cache

T, K = 32, 7
CONFIG = family("tiny-40b")
PARAMS = random_params(CONFIG)


def _prepare(folder, seed, tokenizer):
    documents = make_documents(60, seed, words=30)
    return prepare_texts(folder, documents, tokenizer, seq_len=T, validation_fraction=0.2, unit_mb=0.004)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Two sources and a teacher."""
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = make_tokenizer(folder / "tokenizer.json").path
    save_params(folder / "weights", CONFIG, PARAMS)
    return _prepare(folder / "a", 1, tokenizer), _prepare(folder / "b", 2, tokenizer), folder / "weights"


def _cache(inputs, **changes):
    *tokens, weights = inputs
    fields = {"teacher": str(weights), "tokens": tuple(tokens), "top_k": K, "compute_dtype": "float32"}
    return TeacherCacheConfig(**fields | {"dtype": "float32", "batch_size": 8, "chunk": 16} | changes)


def _data(inputs, name, **changes):
    sources = tuple(Source(path) for path in inputs[:2])
    return DataConfig(sources=sources, seq_len=T, batch_size=8, prefetch=2, teacher_cache=name, **changes)


@pytest.fixture(scope="module")
def cached(inputs):
    """The first cache of both sources, written as two jobs of an array."""
    config = _cache(inputs, temperature=2.0)
    assert None in write_teacher_cache(config, (1, 2)).manifests
    with pytest.raises(FalconError, match="no finished teacher shards"):
        train_batches(_data(inputs, "teacher"))
    done = write_teacher_cache(config, (0, 2))
    assert None not in done.manifests
    assert done.new_rows
    assert write_teacher_cache(config).new_rows == 0
    return _data(inputs, "teacher")


def _logits(batch):
    tokens, segments = batch["tokens_BxT"], batch["segment_ids_BxT"]
    return Falcon(CONFIG).apply({"params": PARAMS}, tokens, batch["positions_BxT"], segments)


def test_every_row_comes_with_what_the_teacher_says_of_it(cached):
    for batch in (*itertools.islice(train_batches(cached), 3), next(validation_batches(cached))):
        real = batch["segment_ids_BxT"] != 0
        log_p = jax.nn.log_softmax(_logits(batch), -1)
        said = batch["teacher"]
        top, ids = jax.lax.top_k(log_p, K)
        of_ids = jnp.take_along_axis(log_p, jnp.asarray(said["ids_BxTxk"]), -1)  # ties may come in another order
        np.testing.assert_allclose(of_ids[real], np.asarray(top)[real], atol=1e-4)
        assert (said["ids_BxTxk"][real] != np.asarray(ids)[real]).mean() < 0.01
        np.testing.assert_allclose(said["log_probs_BxTxk"][real], np.asarray(top)[real], atol=1e-4)
        targets, _ = next_tokens(jnp.asarray(batch["tokens_BxT"]), jnp.asarray(batch["segment_ids_BxT"]))
        of_next = jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
        np.testing.assert_allclose(said["log_next_BxT"][real], np.asarray(of_next)[real], atol=1e-4)
        for column, temperature in enumerate((1.0, 2.0)):
            mass = jnp.exp(log_p / temperature).sum(-1) - jnp.exp(top / temperature).sum(-1)
            rest = np.exp(said["log_rest_BxTx2"][..., column])
            np.testing.assert_allclose(rest[real], np.asarray(mass)[real], rtol=1e-3, atol=1e-5)


def test_the_record_is_what_the_page_says(cached, inputs):
    folder = inputs[0]
    file = read_manifest(folder).splits["train"].shards[0].file
    reader = ArrayRecordReader(str(folder / "teacher" / file))
    record = reader.read_all()[0]
    reader.close()
    assert len(record) == T * (K * (2 + 4) + 4 * (1 + 1 + 2)) + 4
    ids = np.frombuffer(record, "<u2", T * K).reshape(T, K)
    assert ids.max() < CONFIG.vocab_size
    probabilities = np.frombuffer(record, "<f4", T * K, T * K * 2).reshape(T, K)
    assert (np.diff(probabilities) <= 0).all()
    rest = np.frombuffer(record, "<f4", T * 2, T * (K * 6 + 8)).reshape(T, 2)[:, 0]
    np.testing.assert_allclose(np.exp(probabilities).sum(1) + np.exp(rest), 1, rtol=1e-5)


def test_a_killed_writer_goes_on_where_it_was(inputs, cached, monkeypatch):
    config = _cache(inputs, name="again", temperature=2.0)
    original, done = train.teacher_cache.write_records, []

    def fail_at_third(path, records):
        if len(done) == 2:
            next(iter(records))
            raise KeyboardInterrupt
        done.append(path)
        return original(path, records)

    monkeypatch.setattr(train.teacher_cache, "write_records", fail_at_third)
    with pytest.raises(KeyboardInterrupt):
        write_teacher_cache(config)
    monkeypatch.setattr(train.teacher_cache, "write_records", original)
    before = {path: path.stat().st_mtime_ns for path in done}
    assert None not in write_teacher_cache(config).manifests
    assert before == {path: path.stat().st_mtime_ns for path in done}
    for folder in inputs[:2]:
        for path in (folder / "teacher").glob("*.array_record"):
            assert path.read_bytes() == (folder / "again" / path.name).read_bytes()


def test_what_does_not_belong_together_is_refused(inputs, cached, tmp_path):
    with pytest.raises(FalconError, match=r"other settings \(top_k\)"):
        write_teacher_cache(_cache(inputs, temperature=2.0, top_k=K + 1))
    save_params(tmp_path / "other", CONFIG, random_params(CONFIG, seed=9))
    with pytest.raises(FalconError, match=r"other settings \(teacher\)"):
        write_teacher_cache(_cache((*inputs[:2], tmp_path / "other"), temperature=2.0))
    with pytest.raises(FalconError, match="smaller than"):
        write_teacher_cache(_cache(inputs, name="wide", top_k=CONFIG.vocab_size + 1))

    manifest = inputs[1] / "teacher" / "manifest.json"
    kept = manifest.read_text()
    for change, message in (
        ({"tokens": "0" * 64}, "other token shards"),
        ({"temperature": 3.0}, "differ in temperature"),
        ({"teacher": {"weights": "x"}}, "different teachers"),
        ({"splits": {"train": 1}}, "splits.train"),
        ({"top_k": 10**9}, "top_k must be"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"dtype": "int8"}, "dtype"),
    ):
        manifest.write_text(json.dumps(seal(unseal(json.loads(kept), "", "") | change)))
        with pytest.raises(FalconError, match=message):
            train_batches(cached)
    manifest.write_text(kept)

    names = [shard.file for shard in read_manifest(inputs[0]).splits["train"].shards]
    files = [inputs[0] / "teacher" / name for name in names[:2]]
    first, second = (path.read_bytes() for path in files)
    files[0].write_bytes(first[:-1])
    with pytest.raises(FalconError, match=r"bytes, not the .* of its manifest.* `falcon-relu teacher-cache`"):
        train_batches(cached)
    files[0].write_bytes(first)
    manifest = inputs[0] / "teacher" / "manifest.json"
    kept = manifest.read_text()
    table = unseal(json.loads(kept), "", "")
    shards = table["splits"]["train"]
    shards[0]["bytes"], shards[1]["bytes"] = len(second), len(first)
    manifest.write_text(json.dumps(seal(table)))
    files[0].write_bytes(second)
    files[1].write_bytes(first)
    with pytest.raises(FalconError, match=r"cannot read row \d+ of the teacher's shards in .*another row"):
        list(itertools.islice(train_batches(cached), 40))
    files[0].write_bytes(first)
    files[1].write_bytes(second)
    manifest.write_text(kept)


def test_training_from_a_cache_of_the_whole_vocabulary_is_training_online(inputs, tmp_path):
    """Through the command, in float32: the same figures and losses at every step."""
    whole = CONFIG.vocab_size
    tokens = [str(folder) for folder in inputs[:2]]
    command = ["teacher-cache", "--teacher", str(inputs[2]), "--tokens", *tokens, "--name", "whole", "--top-k", whole]
    command += ["--dtype", "float32", "--compute-dtype", "float32", "--json", tmp_path / "figures.json"]
    assert main(list(map(str, command))) == 0
    assert json.loads((tmp_path / "figures.json").read_text())["finished"] is True
    online = TrainConfig(
        out=tmp_path / "online",
        model="tiny-40b",
        activation="relu",
        teacher=str(inputs[2]),
        data=_data(inputs, None),
        loss=LossConfig(kd_weight=1.0, chunk=8),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        steps=4,
        compute_dtype="float32",
        teacher_dtype="float32",
        log_every=1,
    )
    offline = dataclasses.replace(online, out=tmp_path / "offline", teacher=None, data=_data(inputs, "whole"))
    figures = [train.loop.run(config) for config in (online, offline)]
    logs = [
        [json.loads(line) for line in (config.out / "log.jsonl").read_text().splitlines()]
        for config in (online, offline)
    ]
    for name in ("loss", "kl", "agreement", "teacher_cross_entropy", "teacher_accuracy", "accuracy"):
        np.testing.assert_allclose(figures[1][name], figures[0][name], rtol=1e-4)
        steps = [[line[name] for line in log if name in line] for log in logs]
        assert len(steps[0]) == 4
        np.testing.assert_allclose(steps[1], steps[0], rtol=1e-4)
    hot = dataclasses.replace(offline, loss=LossConfig(kd_weight=1.0, temperature=2.0))
    with pytest.raises(FalconError, match=r"temperatures 1 and 1\.0, the loss wants 2\.0"):
        train.loop.run(dataclasses.replace(hot, out=tmp_path / "hot"))
    assert not (tmp_path / "hot").exists()  # refused before anything is written
    with pytest.raises(FalconError, match="both a teacher and"):
        dataclasses.replace(offline, teacher=str(inputs[2]))
