"""The card says what was measured, the licence of the base model, and what is missing."""

from __future__ import annotations

import html
import json
import re

import pytest

from falcon_relu.cli.main import main
from falcon_relu.evaluation.card import LICENCES, MISSING, render
from falcon_relu.evaluation.card_facts import markdown_text

RUN = {
    "steps": 70,
    "activation": "relu",
    "teacher": "runs/teacher/weights",
    "compute_dtype": "float32",
    "data": {"batch_size": 32, "seq_len": 128},
    "loss": {"lm_weight": 1.0, "kd_weight": 0.5, "temperature": 1.0},
    "optimizer": {"learning_rate": 3e-5, "final_learning_rate": 0.0, "warmup_steps": 5, "weight_decay": 0.1},
}


DECODE = {"mode": "sparse", "kernels": "native", "prompt tokens": 7, "prompt tokens/s": 3.0, "tokens": 9}
DECODE |= {"tokens/s": 12.5, "MB a step": 1.5, "neurons read": 0.25, "GB/s": 2.0, "memory GB/s": None}
ROW = {"backend": "native", "mode": "sparse", "format": "bf16", "active": 0.1, "ms/token": 2.5, "GB/token": 0.1}
ROW |= {"memory GB/s": 30.0, "share of memory": 0.9, "layers, times dense": 2.5}
BENCH = {"model": "falcon-40b", "layers": 4, "tokens": [ROW | {"tokens/s, 60 layers at 67.2 GB/s": 2.0}]}


def results(value: float | None, note: str = "") -> dict:
    row = {"benchmark": "MMLU", "task": "mmlu", "metric": "acc,none", "shots": 5, "value": value, "error": 0.01}
    return {"rows": [row | {"questions": 20, "note": note}], "average": value, "limit": 4}


def test_numbers_stand_beside_each_other_and_what_is_missing_is_said():
    card = render(
        {
            "name": "My model",
            "base": "tiiuae/falcon-40b",
            "training": RUN,
            "data": {"web": {"splits": {"train": {"tokens": 1234567, "documents": 89}}}},
            "relu": results(0.5416),
            "original": results(0.5689, "of another time"),
            "sparsity": {
                "zeros": 0.9,
                "layers": [{"layer": 0, "zeros": 0.8}, {"layer": 1, "zeros": 0.95}],
                "allowed": [{"allowed kl": 0.01, "kl": kl, "read": 0.3} for kl in (0.02, 0.005)],
            },
            "speeds": [DECODE | {"machine": {"cpu": "A CPU", "cores": 2, "memory_gb": 24.0}}, BENCH],
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
    assert "| 0.01 | 0.0200 (not kept) | 30.0 % |\n| 0.01 | 0.0050 | 30.0 % |" in card
    assert "A CPU, 2 cores, 24 GB" in card
    assert f"| 7 | 3 | 9 | 12.5 | 1.5 | 0.25 | 2 | {MISSING} |" in card
    assert "| native | sparse | bf16 | 0.1 | 2.5 | 0.1 | 30 | 0.9 | 2.5 |" in card
    assert "67.2" not in card  # what is projected from a measurement
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


def card(folder, **files) -> int:
    """Runs the command on files of the given texts, into README.md."""
    given = ["card", str(folder / "README.md"), "--name", files.pop("name", "M"), "--overwrite"]
    for option, text in files.items():
        path = folder / {"run": "run/config.json", "data": "data/manifest.json"}.get(option, f"{option}.json")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
        given += [f"--{option.replace('_', '-')}", str(path.parent if option in ("run", "data") else path)]
    return main(given)


def test_command_writes_the_card_from_files(tmp_path, capsys):
    assert card(tmp_path, run=json.dumps(RUN), relu=json.dumps(results(0.25))) == 0
    assert "| 25.00 ± 1.00 |" in (tmp_path / "README.md").read_text()
    asked = ["card", str(tmp_path / "README.md"), "--name", "M"]
    assert main([*asked, "--overwrite", "--base", "someone/else"]) == 1
    assert "licence of someone/else" in capsys.readouterr().err
    assert main(asked) == 1
    assert "exists already" in capsys.readouterr().err
    assert "25.00" in (tmp_path / "README.md").read_text()


NASTY = "a\n---\n| b | `c` <script>1</script>\n# [d](javascript:e) *f* _g_ \\| $h$ ~~i~~ ![j](k) &amp; \u202e"


def nasty_everywhere() -> dict:
    row = {"benchmark": NASTY, "metric": NASTY, "shots": 1, "value": 0.5, "error": None, "note": NASTY}
    row_of_speeds = ROW | {"backend": NASTY, "mode": NASTY, NASTY: NASTY}
    speeds = {"machine": {"cpu": NASTY}, "model": NASTY, "layers": 1, "tokens": [row_of_speeds]}
    return {
        "name": NASTY,
        "training": RUN | {"teacher": NASTY, "compute_dtype": NASTY},
        "data": {NASTY: {"splits": {NASTY: {"tokens": 1}, "train": {"tokens": 2}}}},
        "relu": {"rows": [row], "average": 0.5},
        "speeds": [speeds, DECODE | {"kernels": NASTY, NASTY: NASTY}],
    }


def test_text_from_outside_is_only_ever_text():
    plain = json.loads(json.dumps(nasty_everywhere()).replace(json.dumps(NASTY)[1:-1], "plain"))
    shown, wanted = render(nasty_everywhere()), render(plain)
    assert "<script" not in shown
    assert shown.encode()  # no half of a surrogate pair
    outline = re.sub("plain", "@", wanted)
    assert re.sub(re.escape(markdown_text(NASTY)), "@", shown) == outline
    assert shown.count("\n") == wanted.count("\n")


def test_markdown_shows_the_text_itself():
    md = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])
    shown = html.unescape(re.sub("<[^>]*>", "", md.render(f"| {markdown_text(NASTY)} | x |\n|---|---|\n| y | z |\n")))
    assert " ".join(shown.split()) == " ".join(NASTY.replace("\u202e", "\ufffd").split()) + " x y z"
    assert "<a" not in md.render(markdown_text(NASTY))
    assert "<em>" not in md.render(markdown_text(NASTY))


WRONG = {  # option -> texts, and the field that is named
    "relu": [
        ("[]", ""),
        ("3", ""),
        ("null", ""),
        ("", ""),
        ('{"rows": [', ""),
        ("\xff", ""),
        ("[" * 90_000, ""),
        ("{}", "rows"),
        ('{"rows": {}}', "rows"),
        ('{"rows": [3]}', "rows.0"),
        ('{"rows": [{"benchmark": null}]}', "rows.0.benchmark"),
        ('{"rows": [{"benchmark": "a", "value": "1"}]}', "rows.0.value"),
        ('{"rows": [], "average": NaN}', "average"),
        ('{"rows": [{"benchmark": "a", "value": 1e400}]}', "rows.0.value"),
        ('{"rows": [], "limit": -1}', "limit"),
        ('{"rows": [], "average": true}', "average"),
        ('{"rows": [{"benchmark": "a", "shots": 1.5}]}', "rows.0.shots"),
        ('{"rows": [{"benchmark": "a", "note": []}]}', "rows.0.note"),
        ('{"rows": [], "average": 1e300}', "average"),
    ],
    "held_out": [
        ("{}", "perplexity"),
        ('{"perplexity": "1"}', "perplexity"),
        ('{"perplexity": 1, "sparse": []}', "sparse"),
        ('{"perplexity": 1, "agreement": 7}', "agreement"),
        ('{"perplexity": [1]}', "perplexity"),
    ],
    "sparsity": [
        ("{}", "zeros"),
        ('{"zeros": 2}', "zeros"),
        ('{"zeros": 0.5, "layers": [{}]}', "layers.0"),
        ('{"zeros": 0.5, "layers": [{"layer": 1, "zeros": null}]}', "layers.0.zeros"),
        ('{"zeros": 0.5, "union": {"batch": 1}}', "union"),
        ('{"zeros": 0.5, "allowed": [{"kl": 1}]}', "allowed.0"),
        ('{"zeros": 0.5, "allowed": [{"allowed kl": "x", "kl": 1, "read": 0}]}', "allowed.0"),
    ],
    "speeds": [
        ("[]", ""),
        ("{}", "prompt tokens is missing"),
        ('{"answer": 42}', "prompt tokens"),
        ('{"machine": []}', "machine"),
        (json.dumps(DECODE | {"machine": {"cpu": 3}}), "machine.cpu"),
        (json.dumps(DECODE | {"tokens": "many"}), "tokens"),
        (json.dumps(DECODE | {"neurons read": 7}), "neurons read"),
        (json.dumps(DECODE | {"turns": []}), "turns"),
        ('{"tokens": [3]}', "model"),
        (json.dumps(BENCH | {"tokens": []}), "tokens"),
        (json.dumps(BENCH | {"tokens": [3]}), "tokens.0"),
        (json.dumps(BENCH | {"tokens": [ROW | {"ms/token": "1"}]}), "tokens.0.ms/token"),
        (json.dumps(BENCH | {"machine": {"cores": 1.5}}), "machine.cores"),
        (json.dumps(BENCH | {"layers": []}), "layers"),
        ('{"model": "falcon-40b", "kernels": [{}]}', "kernels.0.kernel"),
        ('{"tokens/s": Infinity}', "tokens/s"),
    ],
    "run": [
        ("{}", "steps"),
        ('{"steps": "70"}', "steps"),
        ('{"steps": 7, "data": []}', "data"),
        ('{"steps": 7, "activation": "<script>"}', "activation"),
        ('{"steps": 7, "loss": {"lm_weight": "1"}}', "loss.lm_weight"),
        ('{"steps": 7, "optimizer": {"warmup_steps": 1.5}}', "optimizer.warmup_steps"),
        ('{"steps": 7, "data": {"batch_size": -1}}', "data.batch_size"),
        ('{"steps": 1' + "0" * 5000 + "}", ""),
    ],
    "data": [
        ("{}", "splits"),
        ('{"splits": []}', "splits"),
        ('{"splits": {"train": 3}}', "splits.train"),
        ('{"splits": {"train": {"tokens": -1}}}', "splits.train.tokens"),
    ],
}


@pytest.mark.parametrize(("option", "text", "field"), [(o, *case) for o, cases in WRONG.items() for case in cases])
def test_a_file_that_is_not_the_commands_is_named_with_its_field(tmp_path, capsys, option, text, field):
    assert card(tmp_path, **{option: text.encode("latin-1") if text == "\xff" else text}) == 1
    said = capsys.readouterr().err
    named = {"run": "config.json", "data": "manifest.json"}.get(option, f"{option}.json")
    assert named in said
    assert field in said
    assert said.count("\n") == 1
    assert not (tmp_path / "README.md").exists()


def test_shards_of_one_name_are_told_apart(tmp_path):
    for i, parent in enumerate(("a", "b"), 1):
        (tmp_path / parent / "tokens").mkdir(parents=True)
        (tmp_path / parent / "tokens" / "manifest.json").write_text(json.dumps({"splits": {"train": {"tokens": i}}}))
    folders = [str(tmp_path / parent / "tokens") for parent in ("a", "b")]
    assert main(["card", str(tmp_path / "card.md"), "--name", "M", "--data", *folders]) == 0
    text = (tmp_path / "card.md").read_text()
    assert f"a/tokens | {MISSING} | 1 |" in text
    assert f"b/tokens | {MISSING} | 2 |" in text
