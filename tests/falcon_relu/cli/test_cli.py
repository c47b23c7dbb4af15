"""The commands as a user meets them: real processes, their exit status, what they print and leave behind."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import falcon_relu
from falcon_relu.cli.main import COMMANDS, main

ROOT = Path(falcon_relu.__file__).parents[1]


def _command(*args: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "falcon_relu", *map(str, args)], capture_output=True, text=True, timeout=500, **options
    )


def test_demo_measures_all_that_the_card_prints(finished_demo):
    results = json.loads(finished_demo.with_suffix(".json").read_text())
    quality = {row["model"]: row for row in results["quality"]}
    assert len(quality) == 4
    assert quality["teacher (GELU)"]["zeros"] < 0.01 < quality["tuned with LM + KL"]["zeros"]
    assert quality["tuned with LM + KL"]["kl"] < quality["swapped, not tuned"]["kl"]
    retained = results["retained"]
    assert retained["lm_kl"] == pytest.approx(
        quality["tuned with LM + KL"]["accuracy"] / quality["teacher (GELU)"]["accuracy"]
    )
    assert retained["met"] == (retained["lm_kl"] >= 0.973)
    assert bool(retained["why"]) == (not retained["met"] or retained["lm_kl"] > 1)
    decoded = {(row["mode"], row["backend"]): row for row in results["decode"]}
    for (mode, backend), row in decoded.items():
        assert row["tokens_per_second"] > 0
        if mode != "sparse":
            assert row["same_text_as_dense"] is True
        dense = decoded["dense", backend]["kilobytes_per_token"]
        assert (row["kilobytes_per_token"] < dense) == (mode != "dense")
    for sample in results["samples"]:
        assert sample["exact"] == sample["dense"]
    assert [row["target"] for row in results["tradeoff"]] == [0.5, 1.25]
    assert results["tradeoff"][1]["kl"] < results["tradeoff"][0]["kl"]


def test_demo_writes_a_report_with_the_numbers_that_it_measured(finished_demo):
    page = (finished_demo / "report.html").read_text()
    results = json.loads(finished_demo.with_suffix(".json").read_text())
    assert f"{results['quality'][3]['cross_entropy']:.3f}" in page
    assert page.count("<svg") >= 5
    assert "http" not in page


def test_commands_work_on_what_the_demo_made(finished_demo, tmp_path):
    weights, tokenizer = finished_demo / "lm_kl" / "weights", finished_demo / "tokenizer.json"
    asked = ["import os", "--tokenizer", tokenizer, "--max-new-tokens", 8]
    packed = _command("pack", weights, tmp_path / "packed", "--predictor", finished_demo / "predictor.safetensors")
    assert packed.returncode == 0, packed.stderr
    outputs = {}
    for name, command in {
        "generate": ["generate", weights, *asked, "--dtype", "float32"],
        "dense": ["decode", weights, *asked, "--mode", "dense", "--format", "f32", "--backend", "xla"],
        "exact": ["decode", weights, *asked, "--format", "f32", "--threads", 1],
        "sparse": ["decode", weights, *asked, "--predictor", finished_demo / "predictor.safetensors"],
        "packed": ["decode", tmp_path / "packed", *asked],
    }.items():
        done = _command(*command, "--json", tmp_path / f"{name}.json")
        assert done.returncode == 0, done.stderr
        outputs[name] = json.loads((tmp_path / f"{name}.json").read_text())
        assert "import os" + outputs[name]["texts"][0] in done.stdout
    assert outputs["generate"]["texts"] == outputs["dense"]["texts"] == outputs["exact"]["texts"]
    assert outputs["packed"]["texts"] == outputs["sparse"]["texts"]
    assert outputs["packed"]["mode"] == "sparse"
    assert outputs["exact"]["mode"] == "exact"
    assert outputs["sparse"]["mode"] == "sparse"
    assert outputs["sparse"]["neurons read"] < 1

    chat = _command("decode", weights, *asked[1:], input="def f(\n\nclass\n")
    assert chat.returncode == 0, chat.stderr
    assert chat.stderr.count("generation 8 tokens") == 2  # an empty line begins anew


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        ([], 2, "falcon-relu demo"),
        (["--help"], 0, "falcon-relu demo"),
        (["fly"], 2, "no command 'fly'"),
        (["train"], 2, "--config"),
        (["train", "--config", "nothing"], 2, "no config 'nothing'"),
        (["train", "--config", "falcon_40b", "--stepz", "3"], 2, "--steps"),
        (["train", "--config", "falcon_40b", "--steps", "3"], 2, "warmup_steps"),
        (["train", "--config", "falcon_40b", "--loss.temperature", "0"], 2, "temperature"),
        (["generate", "no/such/folder", "text", "--tokenizer", "nowhere"], 1, "nowhere"),
        (["decode", "x", "text", "--tokenizer", "y"], 1, "y"),
        (["decode", "x", "text", "--tokenizer", "y", "--threads", "9999"], 1, "threads"),
        (["demo", "--config", "falcon_40b"], 1, "there are demo, demo_tiny, laptop"),
        (["convert", str(ROOT / "docs"), "x", "--activation", "gelu"], 1, "docs holds no model"),
        (["convert", "no/such model", "x"], 1, "neither a folder nor the id of a model on the hub"),
    ],
)
def test_wrong_usage_says_what_to_do(arguments, status, says, capsys):
    assert main(arguments) == status
    assert says in re.sub(r"\s+", " ", "".join(capsys.readouterr()))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_that_names_its_options(command, capsys):
    assert main([command, "--help"]) == 0
    printed = capsys.readouterr().out
    assert f"falcon-relu {command}" in printed
    if command != "predictor":  # whose steps have the options
        assert "--json" in printed


WRITES = {
    "export": ["lm_kl/weights"],
    "pack": ["lm_kl/weights"],
    "predictor": ["record", "lm_kl/weights", "tokens/python-stdlib", "--tokens", "500"],
}


@pytest.mark.parametrize("command", WRITES)
def test_what_does_not_fit_on_the_disk_is_not_begun(command, finished_demo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(finished_demo)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    arguments = list(WRITES[command])
    arguments.insert(3 if command == "predictor" else 1, str(tmp_path / "out"))
    assert main([command, *arguments]) == 1
    assert "1e-06 GB are free there: make room" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["export", "pack"])
def test_a_disk_that_fills_up_is_said_and_leaves_nothing(command, finished_demo, tmp_path):
    limited = ["sh", "-c", 'ulimit -f 40; exec "$@"', "sh"]  # blocks: writing on fails as on a full disk
    arguments = [command, *(finished_demo / path for path in WRITES[command]), tmp_path / "out"]
    done = subprocess.run(
        [*limited, sys.executable, "-m", "falcon_relu", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert "make room or choose another disk" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_run_of_another_recipe_is_not_mixed_in(finished_demo, capsys):
    assert main(["demo", "--out", str(finished_demo)]) == 1
    assert "another recipe" in capsys.readouterr().err


def test_nothing_is_left_behind_by_a_failed_conversion(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{")
    done = _command("convert", tmp_path / "hf", tmp_path / "out")
    assert done.returncode == 1
    assert "config.json" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
