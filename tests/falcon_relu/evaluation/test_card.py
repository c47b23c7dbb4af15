"""The card says what was measured, the licence of the base model, and what is missing."""

from __future__ import annotations

import json

import pytest

from falcon_relu.cli.main import main
from falcon_relu.evaluation.card import LICENCES, MISSING, render

RUN = {
    "steps": 70,
    "activation": "relu",
    "teacher": "runs/teacher/weights",
    "compute_dtype": "float32",
    "data": {"batch_size": 32, "seq_len": 128},
    "loss": {"lm_weight": 1.0, "kd_weight": 0.5, "temperature": 1.0},
    "optimizer": {"learning_rate": 3e-5, "final_learning_rate": 0.0, "warmup_steps": 5, "weight_decay": 0.1},
}


def results(value: float | None, note: str = "") -> dict:
    row = {"benchmark": "MMLU", "task": "mmlu", "metric": "acc,none", "shots": 5, "value": value, "error": 0.01}
    return {"rows": [row | {"questions": 20, "note": note}], "average": value, "limit": 4}


def test_numbers_stand_beside_each_other_and_what_is_missing_is_said():
    speeds = {"machine": {"cpu": "A CPU", "cores": 2, "memory_gb": 24.0}, "mode": "sparse", "tokens/s": 12.5}
    card = render(
        {
            "name": "My model",
            "base": "tiiuae/falcon-40b",
            "training": RUN,
            "data": {"web": {"splits": {"train": {"tokens": 1234567, "documents": 89}}}},
            "relu": results(0.5416),
            "original": results(0.5689, "of another time"),
            "sparsity": {"zeros": 0.9, "layers": [{"layer": 0, "zeros": 0.8}, {"layer": 1, "zeros": 0.95}]},
            "speeds": [speeds],
        }
    )
    assert f"| MMLU (5-shot) | 54.16 ± 1.00 | 56.89 ± 1.00 | {MISSING} |" in card
    assert f"| average | 54.16 | 56.89 | {MISSING} |" in card
    assert "- MMLU: of another time." in card
    assert "at most 4 questions" in card
    assert f"| web | 89 | 1,234,567 | {MISSING} |" in card
    assert f"| tokens | {70 * 32 * 128:,} |" in card
    assert r"KL(teacher \|\| student) 0.5" in card
    assert "From 80.0 % (layer 0) to 95.0 % (layer 1)" in card
    assert "A CPU, 2 cores, 24 GB" in card
    assert "12.5" in card
    assert f"| perplexity | {MISSING} |" in card


def test_nothing_measured_gives_no_number():
    card = render({"name": "Nothing"})
    body = card.split("# Nothing", 1)[1].split("## Limitations")[0]
    assert not any(letter.isdigit() for letter in body)
    assert card.count(MISSING) > 20
    assert "*not stated*" in card


@pytest.mark.parametrize("base", LICENCES)
def test_licence_is_the_base_models(base):
    card = render({"name": "M", "base": base})
    apache = not base.endswith(("180B", "11B"))
    assert ('license: "apache-2.0"' in card) == apache
    assert ("TII" in card) != apache


def test_command_writes_the_card_from_files(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(RUN))
    (tmp_path / "relu.json").write_text(json.dumps(results(0.25)))
    asked = ["card", str(tmp_path / "README.md"), "--name", "M", "--run", str(tmp_path / "run")]
    assert main([*asked, "--relu", str(tmp_path / "relu.json")]) == 0
    assert "| 25.00 ± 1.00 |" in (tmp_path / "README.md").read_text()
    assert main([*asked, "--base", "someone/else"]) == 1
    assert "licence of someone/else" in capsys.readouterr().err
    (tmp_path / "list.json").write_text("[]")
    assert main([*asked, "--relu", str(tmp_path / "list.json")]) == 1
    assert "holds no object" in capsys.readouterr().err
