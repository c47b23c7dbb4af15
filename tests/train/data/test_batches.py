"""Batches: each row once an epoch, the same on any number of processes, resumed exactly, packed as the shards say."""

import collections
import itertools
import json
import resource
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from falcon_relu.checkpoints.schema import seal
from falcon_relu.errors import FalconError
from tests.train.data.texts import make_documents, make_tokenizer, prepare_texts, read_rows
from train.data import batches
from train.data.batches import DataConfig, Source, train_batches, validation_batches

T = 32
B = 12


def prepare_source(folder, count, seed, tokenizer, seq_len=T):
    documents = make_documents(count, seed, words=30)
    return prepare_texts(folder, documents, tokenizer, seq_len=seq_len, validation_fraction=0.1, unit_mb=0.008)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tokenizer = make_tokenizer(folder / "tokenizer.json").path
    prepare_source(folder / "wiki", 150, 1, tokenizer)
    prepare_source(folder / "code", 60, 2, tokenizer)
    return folder


@pytest.fixture(scope="module")
def config(folder):
    sources = (Source(folder / "wiki", 3.0), Source(folder / "code", 1.0))
    return DataConfig(sources=sources, seq_len=T, batch_size=B, seed=5, prefetch=4)


def one_source(config, name="wiki", **changes):
    sources = tuple(source for source in config.sources if source.path.name == name)
    return DataConfig(**vars(config) | {"sources": sources} | changes)


def take(batches, count):
    return list(itertools.islice(batches, count))


def stored_rows(folder, split):
    return [row for path in sorted(folder.glob(f"{split}-*")) for row in read_rows(path, T)]


def assert_equal(left, right):
    assert left.keys() == right.keys() == {"tokens_BxT", "segment_ids_BxT", "positions_BxT"}
    for name in left:
        assert left[name].dtype == np.int32
        np.testing.assert_array_equal(left[name], right[name])


def test_rows_are_laid_out_as_stored_and_each_comes_once_an_epoch(config, folder):
    rows = stored_rows(folder / "wiki", "train")
    want = {tokens.tobytes(): runs for tokens, runs in rows}
    assert len(want) == len(rows) > 3 * B
    stream = itertools.chain.from_iterable(
        zip(*batch.values(), strict=True) for batch in train_batches(one_source(config))
    )
    orders = []
    for _ in range(3):
        seen = []
        for tokens, segments, positions in itertools.islice(stream, len(rows)):
            seen.append(tokens.astype("<u2").tobytes())
            place = 0
            for segment, run in enumerate(want[seen[-1]].tolist(), 1):
                assert segments[place : place + run].tolist() == [segment] * run
                assert positions[place : place + run].tolist() == list(range(run))
                place += run
            assert not segments[place:].any()
            assert not positions[place:].any()
        assert set(seen) == set(want)
        orders.append(tuple(seen))
    assert len({tuple(want), *orders}) == 4  # a new order each epoch, and none is the stored one


def test_the_seed_decides_the_order(config):
    def first(seed):
        return take(train_batches(DataConfig(**vars(config) | {"seed": seed})), 1)[0]["tokens_BxT"].tolist()

    assert first(1) == first(1)
    assert first(1) != first(2)


def test_sources_are_mixed_by_weight(config, folder):
    wiki = {tokens.tobytes() for tokens, _ in stored_rows(folder / "wiki", "train")}
    counts = collections.Counter(
        row.astype("<u2").tobytes() in wiki for batch in take(train_batches(config), 20) for row in batch["tokens_BxT"]
    )
    assert abs(counts[True] - 0.75 * 20 * B) <= 1


@settings(max_examples=12)
@given(steps=st.integers(0, 25), before=st.sampled_from([1, 2, 3]), after=st.sampled_from([1, 4, 6]))
def test_any_number_of_processes_and_any_point_of_resume_give_the_same_batches(config, steps, before, after):
    whole = take(train_batches(config), steps + 3)
    states = set()
    for rows in np.split(np.arange(B), before):
        batches = train_batches(config, rows)
        for want in whole[:steps]:
            assert_equal(next(batches), {name: array[rows] for name, array in want.items()})
        states.add(json.dumps(batches.get_state()))
    assert len(states) == 1
    resumed = [train_batches(config, rows) for rows in np.split(np.arange(B), after)]
    for batches in resumed:
        batches.set_state(json.loads(*states))
    for want in whole[steps:]:
        parts = [next(batches) for batches in resumed]
        assert_equal({name: np.concatenate([part[name] for part in parts]) for name in want}, want)


def test_validation_is_read_once_in_order_and_filled_up(config, folder):
    rows = [row for name in ("wiki", "code") for row in stored_rows(folder / name, "validation")]
    batches = list(validation_batches(config))
    assert len(batches) == -(-len(rows) // B)
    assert len(rows) % B
    tokens = np.concatenate([batch["tokens_BxT"] for batch in batches])
    segments = np.concatenate([batch["segment_ids_BxT"] for batch in batches])
    np.testing.assert_array_equal(tokens[: len(rows)], [row for row, _ in rows])
    assert not tokens[len(rows) :].any()
    assert not segments[len(rows) :].any()
    halves = [list(validation_batches(config, rows)) for rows in np.split(np.arange(B), 2)]
    for whole, *parts in zip(batches, *halves, strict=True):
        assert_equal({name: np.concatenate([part[name] for part in parts]) for name in whole}, whole)


def test_a_source_of_one_row(config, folder, tmp_path):
    tiny = prepare_source(tmp_path / "one", 1, 8, folder / "tokenizer.json", seq_len=512)
    batch = next(train_batches(DataConfig(sources=(Source(tiny),), seq_len=512, batch_size=3)))
    assert (batch["tokens_BxT"] == batch["tokens_BxT"][0]).all()
    with pytest.raises(FalconError, match="no source holds validation rows"):
        validation_batches(DataConfig(sources=(Source(tiny),), seq_len=512, batch_size=3))


def test_what_does_not_fit_is_told_before_reading(config, folder, tmp_path):
    for changes, message in (
        ({"seq_len": 64}, "rows of 32 tokens, the config wants 64"),
        ({"sources": (Source(tmp_path / "none"),)}, "no finished token shards"),
    ):
        with pytest.raises(FalconError, match=message):
            train_batches(DataConfig(**vars(config) | changes))
    other = prepare_source(tmp_path / "other", 5, 3, _other_tokenizer(tmp_path))
    with pytest.raises(FalconError, match="made by different tokenizers"):
        train_batches(DataConfig(**vars(config) | {"sources": (*config.sources, Source(other))}))
    for changes, message in (
        ({"sources": ()}, "sources is empty"),
        ({"sources": (Source(folder, -1.0),)}, "weight of .* -1.0"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"threads": 9}, "prefetch"),
    ):
        with pytest.raises(FalconError, match=message):
            DataConfig(**vars(config) | changes)


def _other_tokenizer(folder):
    from falcon_relu.tokenizer import train_bpe

    return train_bpe(["another text"], 300, folder / "other.json").path


def test_missing_short_and_damaged_shards_are_named(config, folder, tmp_path):
    copy = shutil.copytree(folder / "wiki", tmp_path / "copy")
    here = one_source(config)
    here = DataConfig(**vars(here) | {"sources": (Source(copy),)})
    shard = sorted(copy.glob("train-*"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(FalconError, match=f"{shard.name} has .* bytes, not the"):
        train_batches(here)
    middle = bytearray(data)
    middle[200:4000] = bytes(b ^ 0x5A for b in middle[200:4000])
    shard.write_bytes(middle)
    with pytest.raises(FalconError, match=r"cannot read row \d+ of .*copy: .* shard is damaged"):
        take(train_batches(here), 40)
    shard.unlink()
    with pytest.raises(FalconError, match=f"{shard.name} is missing"):
        train_batches(here)
    manifest = copy / "manifest.json"
    sealed = json.loads(manifest.read_text())
    whole = {name: value for name, value in sealed.items() if name != "checksum"}
    for change, reason in (
        (sealed | {"format": 2}, "not a manifest of format"),
        (sealed | {"eos_id": 1}, "was changed since"),
        (seal({**whole, "vocab_size": 10**12}), "vocab_size must be"),
        (seal({**whole, "vocab_size": "400"}), "vocab_size: .* integer"),
        (seal({**whole, "seq_len": 10**9}), "seq_len must be"),
        (seal({**whole, "splits": {}}), "splits must be"),
        (seal({**whole, "splits": {**whole["splits"], "train": {**whole["splits"]["train"], "rows": 1}}}), "1 rows"),
    ):
        manifest.write_text(json.dumps(change))
        with pytest.raises(FalconError, match=rf"manifest\.json.*{reason}"):
            train_batches(here)


def test_open_files_are_asked_for_only_where_the_shards_need_them(monkeypatch):
    """A low limit is raised as far as allowed, and enough for what is open and the shards."""
    limits = [64, 64]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.__setitem__(slice(None), new))
    monkeypatch.setattr(batches, "_open_files", lambda: 20)
    batches._allow_open_files(1)
    batches._allow_open_files(44)
    assert limits == [64, 64]
    with pytest.raises(FalconError, match=r"45 token shards need more open files than .* \(64\)"):
        batches._allow_open_files(45)
    limits[:] = [64, 4096]
    batches._allow_open_files(1000)
    assert limits == [1512, 4096]
