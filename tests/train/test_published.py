"""The published run at tiny widths: from raw text to a folder that transformers loads, by the page's commands alone."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from falcon_relu.checkpoints.load import load_model
from falcon_relu.files import write_texts
from falcon_relu.model import Falcon
from tests.train.data.texts import make_documents, make_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "distillation.md"
SOURCES = ("wikipedia", "pile", "stackoverflow")
# What makes the commands small; all else is as the page and the published config say.
SMALL = {
    "prepare": "--seq-len 32 --validation-fraction 0.1 --processes 1",
    "teacher-cache": "--top-k 16 --batch-size 4",
    "train": "--data.seq-len 32 --data.batch-size 8 --loss.chunk 8 --query-chunk 8 --steps 6 "
    "--mesh 1 -1 1 --microbatches 2 "
    "--optimizer.warmup-steps 1 --optimizer.learning-rate 1e-3 --checkpoint-every 3 --validate-every 3 --log-every 1",
}


def _commands() -> list[list[str]]:
    """The commands of the page's first block."""
    block = re.search(r"^```sh\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert block
    lines = block[1].replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def _original(folder: Path) -> None:
    """A tiny Falcon with the 40B's arrangement, as published: its config does not say which activation it has."""
    config = transformers.FalconConfig(
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
        bos_token_id=11,
        eos_token_id=11,
    )
    transformers.FalconForCausalLM(config).save_pretrained(folder)
    stored = json.loads((folder / "config.json").read_text())
    del stored["activation"]
    (folder / "config.json").write_text(json.dumps(stored))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Text, tokenizer and the original, where the page's commands look for them; then the commands, one by one."""
    folder = tmp_path_factory.mktemp("published")
    for seed, source in enumerate(SOURCES):
        (folder / "text" / source).mkdir(parents=True)
        write_texts(folder / "text" / source / "part-0.jsonl", make_documents(60, seed))
    make_tokenizer(folder / "tokenizer.json")
    _original(folder / "tiiuae" / "falcon-40b")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    for program, command, *rest in _commands():
        assert program == "falcon-relu"
        small = shlex.split(SMALL.get(command, ""))
        done = subprocess.run(
            [sys.executable, "-m", "falcon_relu", command, *rest, *small],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
    return folder


def test_the_exported_student_is_a_relu_falcon_that_transformers_loads(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf" / "relu-falcon-40b")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "hf" / "relu-falcon-40b")
    assert model.config.activation == "relu"
    ids = tokenizer("kestrel hovers, falcon stoops", return_tensors="pt").input_ids
    with torch.no_grad():
        theirs = model(ids).logits.numpy()
    config, params = load_model(folder / "runs" / "falcon_40b" / "weights")
    ours = Falcon(config).apply({"params": params}, jnp.asarray(ids.numpy(), jnp.int32))
    np.testing.assert_allclose(theirs, ours, atol=1e-4)


def test_both_ways_to_be_taught_train_on_all_sources(folder):
    for run, neither in (("falcon_40b", "teacher_cache"), ("cached", "teacher")):
        settings = json.loads((folder / "runs" / run / "config.json").read_text())
        assert {**settings["data"], **settings}[neither] is None
        assert [source["weight"] for source in settings["data"]["sources"]] == [1.0, 2.0, 1.0]
        assert settings["activation"] == "relu"
        lines = [json.loads(line) for line in (folder / "runs" / run / "log.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if "loss" in line]
        assert losses[-1] < losses[0]
        metrics = json.loads((folder / "runs" / run / "metrics.json").read_text())
        assert metrics["kl"] >= 0
        assert 0 < metrics["zeros"][0] < 1


def test_the_tests_config_trains_from_the_cache(folder):
    done = subprocess.run(
        [sys.executable, "-m", "falcon_relu", "train", "--config", "tiny"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "runs" / "tiny" / "weights").is_dir()
