"""The decoding commands as a user meets them: predictors, packing, quality, decoding, the chat loop, and errors."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from falcon_relu.checkpoints.hf_config import config_to_hf
from falcon_relu.checkpoints.native import save_params
from falcon_relu.cli import bench as bench_command
from falcon_relu.cli import decode as decode_command
from falcon_relu.cli import main
from falcon_relu.config import family
from falcon_relu.tokenizer import train_bpe
from infer import bench
from infer.generation import DecodeStats
from infer.kernels import native
from tests.conftest import random_params
from tests.train.data.texts import prepare_texts

TEXTS = [
    f"The number {i} is {'even' if i % 2 == 0 else 'odd'}; after the number {i} comes {i + 1}." for i in range(900)
]
CONFIG = family("tiny-40b").with_activation("relu").replace(bos_token_id=0, eos_token_id=0)
LINE = re.compile(
    r"prompt (\d+) tokens, [\d.,e+]+ tokens/s; generation (\d+) tokens, [\d.,e+]+ tokens/s; [\d.,]+ MB a step; "
    r"([\d.]+)% of the neurons read; [\d.]+ of [\d.]+ GB/s"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Weights, tokenizer and token shards."""
    folder = tmp_path_factory.mktemp("home")
    train_bpe(TEXTS, CONFIG.vocab_size, folder / "tokenizer.json")
    prepare_texts(folder / "tokens", TEXTS, folder / "tokenizer.json", seq_len=64, validation_fraction=0.1)
    save_params(folder / "model", CONFIG, random_params(CONFIG))
    return folder


def figures(folder: Path, *arguments: object) -> dict:
    """What a command that succeeds writes as JSON."""
    path = folder / "figures.json"
    path.unlink(missing_ok=True)
    assert main([*map(str, arguments), "--json", str(path)]) == 0
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def fitted(home) -> dict:
    """A recording and a predictor, by the commands; the figures of fitting."""
    model, tokens = home / "model", home / "tokens"
    recorded = figures(home, "predictor", "record", model, tokens, home / "recording", "--tokens", 6000)
    assert recorded["tokens"] == 6000
    assert all(0.2 < row["fired"] < 0.8 for row in recorded["layers"])
    how = ["--epochs", 3, "--batch", 64]
    return figures(home, "predictor", "fit", model, home / "recording", home / "predictor.safetensors", *how)


@pytest.fixture(scope="module")
def packed(home, fitted) -> Path:
    predictor = home / "predictor.safetensors"
    assert (
        figures(home, "pack", home / "model", home / "packed", "--predictor", predictor, "--format", "int8,head=bf16")[
            "format"
        ]
        == "int8,head=bf16"
    )
    return home / "packed"


def test_fitting_sweeps_the_ranks_and_tells_the_baseline(fitted):
    for i, row in enumerate(fitted["held out, as many read as fire"]):
        tried = [one for one in fitted["ranks tried"] if one["layer"] == i]
        assert [one["rank"] for one in tried] == [4, 8, 16, 32]
        least = min(tried, key=lambda one: one["weights a token"])
        assert least["chosen"]
        assert row["rank"] == least["rank"]
        assert row["recall"] > row["SVD recall"]
        assert row["read"] <= row["fired"]


def test_the_parts_that_jobs_of_an_array_fit_make_one_predictor(home, fitted, tmp_path, capsys):
    model, how = home / "model", ["--rank", 4, "--epochs", 1, "--batch", 64]
    whole, joined, parts = tmp_path / "whole", tmp_path / "joined", [tmp_path / "0", tmp_path / "1"]
    figures(home, "predictor", "fit", model, home / "recording", whole, *how)
    for i in (1, 0):
        found = figures(home, "predictor", "fit", model, home / "recording", parts[i], *how, "--shard", f"{i}/2")
        assert [row["layer"] for row in found["held out, as many read as fire"]] == [i]
    capsys.readouterr()
    assert main(["predictor", "join", *map(str, (model, joined, parts[0], parts[0]))]) == 1
    assert "layer 0 2 times" in capsys.readouterr().err
    assert main(["held-out", str(model), str(home / "tokens"), "--predictor", str(parts[1])]) == 1
    assert "layers 1 to 1 of 2: put all parts together" in capsys.readouterr().err
    figures(home, "predictor", "join", model, joined, parts[1], parts[0])
    assert joined.read_bytes() == whole.read_bytes()


def test_calibration_meets_each_kind_of_target_and_draws_the_curve(home, fitted):
    arguments = ["predictor", "calibrate", home / "model", home / "recording", home / "predictor.safetensors"]

    def calibrated(name: str, *target: object, curve: tuple = ()) -> dict:
        return figures(home, *arguments, home / "tokens", home / name, *target, "--batches", 2, "--curve", *curve)

    def recall(found: dict) -> float:
        rows = found["held out"]
        return sum(row["recall"] * row["fired"] for row in rows) / sum(row["fired"] for row in rows)

    by_recall = calibrated("recall", "--recall", 0.95, curve=(0.5, 1.0, 1.5))
    assert 0.95 <= recall(by_recall) < 0.96
    budget = 0.1  # MB: two layers whole are 0.13 and their predictors 0.02 or so
    by_bytes = calibrated("bytes", "--megabytes", budget)
    reads = sum(row["read"] for row in by_bytes["held out"]) * CONFIG.d_ff
    total = 2 * (2 * CONFIG.d_model * reads + by_bytes["predictor weights"])
    assert 0.9 * budget * 1e6 < total <= budget * 1e6
    curve = by_recall["quality against neurons read"]
    assert [row["target"] for row in curve] == [0.5, 1.0, 1.5]
    assert curve[0]["kl"] > curve[1]["kl"] > curve[2]["kl"] > 0
    assert curve[0]["read"] < curve[1]["read"] < curve[2]["read"]


def test_quality_tells_formats_modes_and_kinds_apart(home, fitted):
    predictor = ["--predictor", home / "predictor.safetensors"]
    found = figures(home, "quality", home / "model", home / "tokens", *predictor, "--tokens", 128)["quality"]
    rows = {(row["weights"], row["mode"]): row for row in found}
    assert rows["bf16", "dense"]["kl"] == 0
    assert rows["bf16", "exact"]["kl"] < 1e-6
    assert rows["bf16", "sparse"]["read"] < 1
    assert rows["int8", "dense"]["kl"] > 0
    assert rows["int8", "dense"]["MB a step"] < 0.6 * rows["bf16", "dense"]["MB a step"]
    kinds = {"attention": "dense", "mlp": "dense", "predictor": "sparse", "head": "dense"}
    assert all((f"int8 in {kind} alone", mode) in rows for kind, mode in kinds.items())


def test_powerinfer_gets_predictors_and_gives_them_back(home):
    pytest.importorskip("torch")
    model, recording = home / "model", home / "before"
    figures(home, "predictor", "record", model, home / "tokens", recording, "--input", "block_input", "--tokens", 6000)
    ours, theirs = home / "before.safetensors", home / "powerinfer"
    how = ["--rank", 8, "--epochs", 1, "--batch", 64]
    figures(home, "predictor", "fit", model, recording, ours, *how)
    figures(home, "predictor", "export", model, ours, theirs)
    assert sorted(path.name for path in theirs.iterdir()) == ["model_0.pt", "model_1.pt"]
    figures(home, "predictor", "import", model, theirs, home / "back.safetensors")
    told = decode(home, home / "model", "--predictor", home / "back.safetensors", "--mode", "sparse")
    assert told["mode"] == "sparse"


def decode(home: Path, model: Path, *arguments: object) -> dict:
    asked = ["The number 3", "--tokenizer", home / "tokenizer.json", "--max-new-tokens", 6]
    return figures(home, "decode", model, *asked, *arguments)


def test_prompts_from_a_file_together_or_alone_are_continued_alike_with_one_line_of_figures(home, packed, capfd):
    prompts = home / "prompts.txt"
    prompts.write_text("The number 4\n\nafter the number 17 comes\n")
    texts = []
    for batch in (1, 2, 3):
        told = decode(home, packed, "--mode", "exact", "--file", prompts, "--batch", batch)
        assert told["prompts"] == ["The number 3", "The number 4", "after the number 17 comes"]
        texts.append(told["texts"])
        out, err = capfd.readouterr()
        assert all(prompt + text in out for prompt, text in zip(told["prompts"], told["texts"], strict=True))
        assert len(LINE.findall(err)) == 1
    assert texts[0] == texts[1] == texts[2]


def test_sampling_follows_its_seed(home, packed):
    def sampled(seed: int) -> list[str]:
        return decode(home, packed, "--temperature", 1.5, "--top-k", 100, "--seed", seed)["texts"]

    assert sampled(1) == sampled(1) != sampled(2)


def test_chat_at_a_terminal(home, packed):
    """A real process on a pseudo-terminal: an answer a line, figures a line, an empty line, the end of input."""
    ours, theirs = pty.openpty()
    command = ["-m", "infer", str(packed), "--tokenizer", str(home / "tokenizer.json"), "--max-new-tokens", "5"]
    with subprocess.Popen([sys.executable, *command], stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        said = ""
        for typed in (b"The number 3\n", b"is odd\n", b"\n", b"The number 3\n", b"\x04"):
            said += until(ours, "> ")
            os.write(ours, typed)
        said += until(ours, "")
        assert process.wait(60) == 0
    lines = LINE.findall(said)
    assert len(lines) == 3
    assert lines[0] == lines[2] != lines[1]  # after the empty line the text starts anew
    # The second turn reads its own tokens and the last one of the first answer, which no step had read.
    assert int(lines[1][0]) < int(lines[0][0]) + 6


def test_chat_writes_its_turns_and_goes_on_after_a_bad_line(home, monkeypatch, capfd):
    typed = "The number 3\nis \udcff odd\nis odd\n\nThe number 3\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    asked = ["--tokenizer", home / "tokenizer.json", "--max-new-tokens", 4, "--temperature", 1, "--seed", 2**32 - 1]
    told = figures(home, "decode", home / "model", *asked)
    out, err = capfd.readouterr()
    assert "from character 4" in err or "at character 4" in err
    turns = told["turns"]
    assert [(turn["prompt"], turn["anew"]) for turn in turns] == [
        ("The number 3\n", True),
        ("is odd\n", False),
        ("The number 3\n", True),
    ]
    assert out == "".join(turn["text"] + "\n\n" for turn in turns)
    assert all(turn["tokens"] for turn in turns)


def test_prompt_files_are_lines_and_nothing_else(home, tmp_path, capsys):
    """A byte order mark is dropped; only line feeds, with or without a carriage return, separate prompts."""
    lines = ["one\u2028still one", "two\x0cstill\x1ctwo\x85", "th\rree"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes("\ufeff".encode() + "\r\n\n".join(lines).encode() + b"\n \r\n")
    asked = ["decode", home / "model", "--tokenizer", home / "tokenizer.json", "--max-new-tokens", 1, "--file", prompts]
    assert figures(home, *asked)["prompts"] == lines
    for content, reason in ((b" \n\r\n\n", "no prompt"), (b"", "no prompt"), (b"a\xff\n", "not UTF-8")):
        prompts.write_bytes(content)
        assert reason in refused(capsys, *asked)
    prompts.unlink()
    os.mkfifo(prompts)
    assert "device or pipe" in refused(capsys, *asked)


def until(terminal: int, text: str) -> str:
    """What the terminal shows until `text` comes at the end, or until all is over."""
    shown = ""
    while not (text and shown.endswith(text)):
        try:
            shown += os.read(terminal, 4096).decode()
        except OSError:  # the other end is closed
            break
    return shown


def refused(capsys, *arguments: object) -> str:
    assert main([*map(str, arguments)]) == 1
    return " ".join(capsys.readouterr().err.split())


def test_what_cannot_be_done_is_refused_before_weights_are_read(home, packed, tmp_path, capsys):
    """The weights' files are gone, so that nothing can have been read."""
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "decode.json").write_text((packed / "decode.json").read_text())
    ask = ["decode", bare, "--tokenizer", home / "tokenizer.json"]
    assert "missing" in refused(capsys, *ask, "The number")
    assert "context of 256" in refused(capsys, *ask, "number " * 300)
    assert "context of 256" in refused(capsys, *ask, "number", "--max-new-tokens", 256)
    assert "packed already" in refused(capsys, *ask, "number", "--format", "bf16")
    assert "at least 1" in refused(capsys, *ask, "number", "--batch", 0)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "falcon.json").write_text((home / "model" / "falcon.json").read_text())
    assert "context of 256" in refused(
        capsys, "generate", tmp_path / "empty", "number " * 300, "--tokenizer", home / "tokenizer.json"
    )
    wide = family("tiny-7b").with_activation("relu")
    save_params(tmp_path / "wide", wide, random_params(wide))
    predictor = home / "predictor.safetensors"
    other = ["decode", tmp_path / "wide", "x", "--tokenizer", home / "tokenizer.json"]
    assert re.search(r"layers.0.fc1.weight is .* the model needs", refused(capsys, *other, "--predictor", predictor))
    assert "needs a predictor" in refused(capsys, *other, "--mode", "sparse")
    assert "kinds: attention" in refused(capsys, *other, "--format", "int9")
    manifest = json.loads((bare / "decode.json").read_text())
    (bare / "decode.json").write_text(json.dumps(manifest | {"version": 7}))
    assert "version 7" in refused(capsys, *ask, "The number")


def test_a_damaged_weight_file_is_named(home, packed, tmp_path, capsys):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in packed.iterdir():
        content = bytearray(file.read_bytes())
        if file.name == "layer_001.safetensors":
            content[-9] ^= 1
        (damaged / file.name).write_bytes(content)
    ask = ["--tokenizer", home / "tokenizer.json"]
    assert re.search(r"layer_001\S* is damaged", refused(capsys, "decode", damaged, "The number", *ask))


def test_too_little_memory_is_said_before_weights_are_looked_for(home, tmp_path, capsys):
    huge = family("falcon-40b").replace(n_layers=2000, activation="relu", bos_token_id=0, eos_token_id=0)
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(huge, "bfloat16")))
    said = refused(capsys, "decode", tmp_path, "The number", "--tokenizer", home / "tokenizer.json")
    assert re.search(r"need [\d.,]+ GB of memory and [\d.,]+ GB are free", said)


def test_the_slower_backend_is_said_once_with_the_reason(monkeypatch, capsys):
    monkeypatch.setattr(native, "missing", lambda: "no compiler was there")
    monkeypatch.setattr(bench_command, "_kernels", lambda args: {"kernels": []})
    assert main(["bench", "--micro"]) == 0
    assert capsys.readouterr().err.count("no compiler was there") == 1
    assert main(["decode", "nowhere", "text", "--tokenizer", "nowhere"]) == 1
    assert capsys.readouterr().err.count("no compiler was there") == 1
    assert main(["decode", "nowhere", "text", "--tokenizer", "nowhere", "--backend", "xla"]) == 1
    assert "compiler" not in capsys.readouterr().err


def test_texts_are_written_before_memory_is_measured(home, packed, monkeypatch, capsys):
    path = home / "killed.json"

    def killed() -> float:
        raise KeyboardInterrupt

    asked = [
        "decode",
        str(packed),
        "The number 3",
        "--tokenizer",
        str(home / "tokenizer.json"),
        "--max-new-tokens",
        "6",
    ]
    monkeypatch.setattr(decode_command, "memory_bandwidth", killed)
    assert main([*asked, "--json", str(path)]) != 0
    told = json.loads(path.read_text())
    assert told["texts"]
    assert told["memory GB/s"] is None


def test_memory_is_not_measured_where_too_little_is_free(monkeypatch):
    monkeypatch.setattr(bench, "free_memory", lambda: 900e6)
    assert bench.memory_bandwidth() is None
    assert "of ? GB/s" in decode_command._line(DecodeStats(), None)
