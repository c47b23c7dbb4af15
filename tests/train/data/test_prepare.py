"""Preparing text: nothing lost, the same bytes however the work was split or interrupted, and clear errors."""

import concurrent.futures
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from falcon_relu.cli import main
from falcon_relu.errors import FalconError
from falcon_relu.files import lock_part, write_texts
from tests.train.data.texts import make_documents, make_tokenizer, read_documents
from train.data.prepare import PrepareConfig, prepare
from train.data.shards import read_manifest

T = 64


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture(scope="module")
def documents():
    return make_documents(600, seed=1)


@pytest.fixture(scope="module")
def text(tmp_path_factory, documents):
    folder = tmp_path_factory.mktemp("text")
    for name, part in (("a", documents[:250]), ("b", documents[250:])):
        write_texts(folder / f"{name}.jsonl", part)
    return folder


@pytest.fixture(scope="module")
def config(text, tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "whole"
    return PrepareConfig(
        inputs=(str(text),),
        tokenizer=tokenizer.path,
        out=out,
        seq_len=T,
        validation_fraction=0.1,
        unit_mb=0.01,
        processes=1,
    )


@pytest.fixture(scope="module")
def whole(config):
    """The folder of a run in one go."""
    prepared = prepare(config)
    assert prepared.manifest == read_manifest(config.out)
    assert prepared.units > 10
    return config.out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def changed(config: PrepareConfig, **changes: object) -> PrepareConfig:
    return PrepareConfig(**vars(config) | changes)


def test_every_document_is_there_once_in_one_split(whole, tokenizer, documents):
    manifest = read_manifest(whole)
    found = {split: read_documents(whole, split, T, tokenizer) for split in ("train", "validation")}
    assert found["train"] + found["validation"] != documents
    place = {text: i for i, text in enumerate(documents)}
    for split, texts in found.items():
        assert [place[text] for text in texts] == sorted(place[text] for text in texts)  # in order
        counts = manifest.splits[split]
        assert counts.documents == len(texts)
        assert counts.tokens == sum(len(tokenizer.encode(text)) + 1 for text in texts)
    assert sorted(found["train"] + found["validation"]) == sorted(documents)
    assert 30 < len(found["validation"]) < 90
    assert (manifest.seq_len, manifest.vocab_size, manifest.eos_id) == (T, tokenizer.vocab_size, 0)
    assert manifest.tokenizer_sha256 == tokenizer.sha256


def test_more_processes_and_a_job_array_give_the_same_bytes(whole, config, tmp_path):
    prepare(changed(config, out=tmp_path / "three", processes=3))
    assert contents(tmp_path / "three") == contents(whole)
    manifests = [prepare(changed(config, out=tmp_path / "jobs"), (i, 2)).manifest for i in (1, 0)]
    assert manifests == [None, read_manifest(whole)]
    assert contents(tmp_path / "jobs") == contents(whole)


def test_killed_runs_lose_only_unfinished_units(config, tmp_path):
    out, whole = tmp_path / "killed", tmp_path / "whole"
    units = prepare(changed(config, out=whole, unit_mb=0.0005)).units  # small ones: no run may end before it is killed
    assert units > 200
    command = [sys.executable, "-m", "falcon_relu", "prepare", *config.inputs, "--out", str(out)]
    command += ["--tokenizer", str(config.tokenizer), "--seq-len", str(T), "--validation-fraction", "0.1"]
    command += ["--unit-mb", "0.0005", "--processes", "2"]
    draw = random.Random(0)
    kept = 0
    for stop in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL):
        target = kept + draw.randint(1, 4)
        process = subprocess.Popen(
            command,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            # Tests that run in the background would hand down that it is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        workers: list[psutil.Process] = []
        while len(list((out / "units").glob("*.json"))) < target:
            assert process.poll() is None
            workers = psutil.Process(process.pid).children(recursive=True) or workers
            time.sleep(0.001)
        (os.killpg if stop == signal.SIGINT else os.kill)(process.pid, stop)
        assert process.wait() == (130 if stop == signal.SIGINT else -stop)
        assert not psutil.wait_procs(workers, timeout=20)[1]  # no worker is left behind
        assert not (out / "manifest.json").exists()
        kept = len(list((out / "units").glob("*.json")))
        assert target <= kept < units
    before = {path: path.stat().st_mtime_ns for path in (out / "units").glob("*.json")}
    assert (
        subprocess.run([*command, "--json", str(tmp_path / "f.json")], capture_output=True, check=False).returncode == 0
    )
    assert contents(out) == contents(whole)
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in before.items())


def test_the_same_part_is_prepared_once_at_a_time_and_other_parts_beside_it(whole, config, tmp_path):
    out = tmp_path / "out"
    with lock_part(out, 0, 2):  # as another process does
        refused = [(0, 2), (0, 1)]
        prepared = call_in_thread(lambda: prepare(changed(config, out=out), (1, 2)))
        assert prepared.manifest is None
        for part in refused:
            with pytest.raises(FalconError, match="another process"):
                call_in_thread(lambda part=part: prepare(changed(config, out=out), part))
    assert prepare(changed(config, out=out), (0, 2)).manifest is not None
    assert contents(out) == contents(whole)


def call_in_thread(call):
    """In a thread of its own, which does not have the locks of this one."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def test_lost_and_damaged_shards_are_made_again(whole, config, tmp_path):
    here = changed(config, out=tmp_path / "out")
    prepare(here)
    shards = sorted(here.out.glob("*.array_record"))
    shards[0].unlink()
    shards[-1].write_bytes(shards[-1].read_bytes()[:-10])
    with pytest.raises(FalconError, match="is missing"):
        read_manifest(here.out)
    assert prepare(here).new_tokens > 0
    assert contents(here.out) == contents(whole)
    assert prepare(here).new_tokens == 0


def test_other_settings_or_inputs_do_not_mix(whole, config, text, tmp_path):
    with pytest.raises(FalconError, match="seq_len was 64, now 128"):
        prepare(changed(config, seq_len=128))
    with pytest.raises(FalconError, match=r"b\.jsonl:1 is not what .* was made from"):
        prepare(changed(config, inputs=(str(text / "b.jsonl"), str(text / "a.jsonl"))))
    lines = (text / "a.jsonl").read_bytes().splitlines(keepends=True)
    first_unit = next(i for i in range(len(lines)) if sum(map(len, lines[:i])) >= 10_000)
    (tmp_path / "cut.jsonl").write_bytes(b"".join(lines[:first_unit]))
    with pytest.raises(FalconError, match="more units than the inputs give"):
        prepare(changed(config, inputs=(str(tmp_path / "cut.jsonl"),)))


def test_bad_lines_are_counted_and_named(tokenizer, tmp_path, capsys):
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "good"}\n{"text": 3}\n\n{"text": "also good"}\n{"text"\n')
    figures = tmp_path / "figures.json"
    command = ["prepare", str(source), "--tokenizer", str(tokenizer.path), "--out", str(tmp_path / "out")]
    assert main([*command, "--validation-fraction", "1e-9", "--json", str(figures)]) == 0
    manifest = read_manifest(tmp_path / "out")
    assert [line.split(": ")[0] for line in manifest.bad_examples] == [f"{source}:{n}" for n in (2, 3, 5)]
    assert manifest.bad_lines == 3
    assert json.loads(figures.read_text())["bad lines"] == 3
    assert "no validation rows" in capsys.readouterr().err
    assert read_documents(tmp_path / "out", "train", 2048, tokenizer) == ["good", "also good"]


def test_wrong_use(config, tmp_path, capsys):
    source = tmp_path / "a.jsonl"
    source.write_text('{"body": "text under another name"}\n')
    with pytest.raises(FalconError, match=r"no document: 1 lines .* no text under 'text'"):
        prepare(changed(config, inputs=(str(source),), out=tmp_path / "out"))
    assert list(tmp_path.iterdir()) == [source]  # nothing of it stays
    with pytest.raises(FalconError, match="2/2: the first number"):
        prepare(config, (2, 2))
    with pytest.raises(FalconError, match=r"a\.jsonl is not a folder"):
        prepare(changed(config, out=source / "below-a-file"))
    for field, value in (("seq_len", 1), ("validation_fraction", 1.0), ("inputs", ())):
        with pytest.raises(FalconError, match=field.rstrip("s")):
            changed(config, **{field: value})
    assert main(["prepare", str(source), "--tokenizer", "none", "--out", str(tmp_path / "o"), "--shard", "a"]) == 1
    assert "--shard must look like" in capsys.readouterr().err
    assert main(["prepare", str(source), "--tokenizer", "none"]) == 2
