"""Folders of questions that would run, read or follow something are refused by name, and nothing of it is done."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from falcon_relu.cli.main import main
from falcon_relu.errors import FalconError
from falcon_relu.evaluation.local_data import local_note, local_task
from falcon_relu.files import lock
from tests.falcon_relu.evaluation.questions import write_questions

ARC = "allenai/ai2_arc"
RUNS = "{{ cycler.__init__.__globals__.os.system('touch ran') }}"
SETTINGS: dict[str, Any] = {
    "template": {"doc_to_text": RUNS},
    "target": {"doc_to_target": RUNS},
    "choice": {"doc_to_choice": RUNS},
    "function": {"process_docs": "!function os.system"},
    "code": {"dataset_kwargs": {"trust_remote_code": True}},
    "file": {"dataset_kwargs": {"data_files": "/etc/passwd"}},
    "path": {"dataset_path": "/etc"},
    "name": {"dataset_name": "../x"},
    "split as path": {"training_split": "../../x"},
    "split as template": {"fewshot_split": RUNS},
    "split as number": {"test_split": 3},
    "split as list": {"test_split": ["a"]},
    "metric": {"metric_list": [{"metric": "!function x.y"}]},
    "include": {"include": "/etc/passwd"},
}
FILES: dict[str, str] = {
    "list": "[]",
    "null": "null",
    "half": '{"settings": {"test_',
    "list of settings": '{"settings": []}',
    "number for a note": '{"note": 3}',
    "long note": json.dumps({"note": "x" * 2000}),
    "unknown": '{"extra": 1}',
    "deep": "[" * 100_000,
    "infinite": '{"settings": {"test_split": Infinity}}',
    "latin-1": "\xff",
}
PATHS = (
    "/etc/passwd",
    "../../x.jsonl",
    "a/../../x",
    "~/x",
    "https://h/x.jsonl",
    "zip://*::x.zip",
    "file:///x",
    "C:\\x",
)


def _layouts() -> dict[str, str]:
    forms: dict[str, Any] = {
        "one": lambda path: path,
        "list": lambda path: ["train.jsonl", path],
        "splits": lambda path: [{"split": "test", "path": path}],
        "lists": lambda path: [{"split": "test", "path": ["test.jsonl", path]}],
        "mapping": lambda path: {"test": path},
    }
    found = {
        f"{form} {path}": json.dumps({"configs": [{"config_name": "c", "data_files": make(path)}]})
        for path in PATHS
        for form, make in forms.items()
    }
    found["folder"] = json.dumps({"configs": [{"config_name": "c", "data_dir": "../../.."}]})
    found["second"] = json.dumps({"configs": [{"data_files": "a"}, {"data_files": "/etc/passwd"}]})
    found["number"] = json.dumps({"configs": [{"data_files": 3}]})
    found["nested"] = json.dumps({"configs": [{"data_files": [[["a"]]]}]})
    found["no list"] = json.dumps({"configs": {"data_files": "a"}})
    found["not YAML"] = "configs: [}"
    found["a list"] = "- configs"
    found["code"] = "configs: !!python/object/apply:os.system ['touch ran']"
    found["aliases"] = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(24)
    )
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A dataset in a data folder, with a file of somebody's beside it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"secret": 1}\n')
    made = tmp_path / "data" / ARC
    made.mkdir(parents=True)
    (made / "train.jsonl").write_text('{"question": "?"}\n')
    return made


def refused(folder: Path) -> str:
    with pytest.raises(FalconError) as caught:
        local_task(folder.parents[1], ARC)
    assert not Path("ran").exists()
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("case", SETTINGS)
def test_a_task_file_sets_splits_and_nothing_else(folder, case):
    (folder / "task.json").write_text(json.dumps({"settings": SETTINGS[case]}))
    assert next(iter(SETTINGS[case])) in refused(folder)


@pytest.mark.parametrize("case", FILES)
def test_a_task_file_that_is_none_is_refused(folder, case):
    (folder / "task.json").write_bytes(FILES[case].encode("latin-1"))
    assert "task.json" in refused(folder)


@pytest.mark.parametrize("case", _layouts())
@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
def test_a_card_names_files_of_its_folder_alone(folder, card, case):
    text = _layouts()[case]
    (folder / card).write_text(f"---\n{text}\n---\nText.\n" if card == "README.md" else text)
    refused(folder)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("name", ["train.jsonl", "task.json", "README.md"])
@pytest.mark.parametrize(
    "make",
    [lambda p: p.symlink_to("/etc/passwd"), lambda p: p.symlink_to(p), lambda p: p.symlink_to("/dev/zero"), _fifo,
     lambda p: p.symlink_to("nothing"), lambda p: p.symlink_to("../../../x.jsonl")],
    ids=["link", "loop", "device", "pipe", "dangling", "beside"],
)  # fmt: skip
def test_files_are_files_of_the_folder(folder, name, make):
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    refused(folder)


def test_what_is_data_is_read(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "again.jsonl").symlink_to("../train.jsonl")
    card = {"configs": [{"config_name": "c", "sep": "/", "data_files": [{"split": "test", "path": "sub/*.jsonl"}]}]}
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(card['configs'])}\nday: 2020-01-01\n---\n")
    settings = {"training_split": None, "fewshot_split": "test"}
    (folder / "task.json").write_text(json.dumps({"settings": settings, "note": "of two\nlines"}))
    found = local_task(folder.parents[1], ARC)
    assert found == {"dataset_path": str(folder), "dataset_kwargs": found["dataset_kwargs"], **settings}
    (folder / "train.jsonl").write_text('{"question": "!"}\n')
    assert local_task(folder.parents[1], ARC)["dataset_kwargs"] != found["dataset_kwargs"]
    assert local_note(folder.parents[1], ARC) == "of two lines"
    assert local_task(folder.parents[1], "no/such") is None


# ---- by the command


def evaluate(data: Path, *more: str) -> int:
    given = ["eval", "no/model", "--tokenizer", str(data / "t.json"), "--out", "out", "--data", str(data), "--offline"]
    return main([*given, "--tasks", "arc_challenge", *more])


@pytest.fixture
def questions(tmp_path, monkeypatch) -> Path:
    pytest.importorskip("lm_eval")
    from falcon_relu.tokenizer import train_bpe

    monkeypatch.chdir(tmp_path)
    write_questions(tmp_path / "data")
    train_bpe(["a few words"], 300, tmp_path / "data" / "t.json")
    return tmp_path / "data"


def test_the_command_runs_nothing_of_a_data_folder(questions, capsys):
    (questions / ARC / "task.json").write_text(json.dumps({"settings": {"doc_to_text": RUNS}}))
    assert evaluate(questions) == 1
    assert "doc_to_text" in capsys.readouterr().err
    assert not Path("ran").exists()


DAMAGED = {
    "no question": lambda line: line.pop("question"),
    "no answer": lambda line: line.pop("answerKey"),
    "choices of another kind": lambda line: line.update(choices=[1, 2]),
    "no choices": lambda line: line.pop("choices"),
}


@pytest.mark.parametrize("case", [*DAMAGED, "half a line", "nothing", "another split"])
def test_questions_that_are_not_the_tasks_are_told_in_a_line(questions, case, monkeypatch):
    from lm_eval.api.model import LM

    from falcon_relu.evaluation.suite import Benchmark, evaluate

    class Answers(LM):
        def loglikelihood(self, requests):
            return [(-1.0, False) for _ in requests]

        loglikelihood_rolling = generate_until = loglikelihood

    for file in (questions / ARC).glob("*.jsonl"):
        text = file.read_text()
        if case in DAMAGED:
            lines = [json.loads(line) for line in text.splitlines()]
            for line in lines:
                DAMAGED[case](line)
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        elif case == "another split":
            (questions / ARC / "task.json").write_text('{"settings": {"test_split": "exam"}}')
        else:
            file.write_text(text[:50] if case == "half a line" else "")
    with pytest.raises(FalconError, match=r"arc_challenge|ai2_arc") as caught:
        evaluate(Answers(), [Benchmark("ARC", "arc_challenge", 1, "acc_norm,none", "arc")], data=questions, limit=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--limit", "0"], "--limit"),
        (["--shots", "-1"], "--shots"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(1 << 64)], "--seed"),
        (["--out", "file"], "file"),
        (["--out", "file/x"], "file"),
        (["--json", "file/x"], "file"),
        (["--data", "file"], "file is not a folder"),
        (["--data", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_made(questions, more, says, capsys):
    Path("file").write_text("mine")
    assert evaluate(questions, *more) == 1
    assert says in capsys.readouterr().err
    assert Path("file").read_text() == "mine"
    assert not Path("out").exists()


def test_a_second_evaluation_into_a_folder_waits_its_turn(questions, capsys):
    with lock(Path("out")), ThreadPoolExecutor(1) as other:  # a thread that holds nothing
        assert other.submit(evaluate, questions).result() == 1
    assert "being written by another process" in capsys.readouterr().err
    assert not Path("out").exists()


SETTINGS_OF_A_RUN = ["", "[]", "3", "null", "{", "\xff", '{"model": 3}', "{}", '{"extra": "x"}', None]


@pytest.mark.parametrize("text", SETTINGS_OF_A_RUN)
def test_answers_that_are_not_known_to_be_of_the_model_are_refused(questions, text, capsys):
    Path("out").mkdir()
    Path("out/answers.jsonl").write_text('["key", "answer", "sum"]\n')
    if text is not None:
        Path("out/settings.json").write_bytes(text.encode("latin-1"))
    assert evaluate(questions) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "settings.json" in said or "answers of another model" in said
    assert Path("out/answers.jsonl").read_text() == '["key", "answer", "sum"]\n'


def test_a_copy_from_the_hub_among_built_questions_is_listed(tmp_path):
    from falcon_relu.evaluation.questions import DATASETS, build_eval_data

    for name in DATASETS:
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "cais/mmlu/counts.json").write_text('{"a.jsonl": 3}')
    assert [row["documents"] for row in build_eval_data(tmp_path, ["cais/mmlu", "openai/gsm8k"])] == [3, None]
    (tmp_path / "cais/mmlu/counts.json").write_text('{"a.jsonl": "3"}')
    with pytest.raises(FalconError, match=r"counts.json.*a.jsonl"):
        build_eval_data(tmp_path, ["cais/mmlu"])


def test_benchmarks_without_any_questions_are_an_error(questions, capsys):
    (questions / "none").mkdir()
    assert evaluate(questions, "--data", "data/none") == 1
    said = capsys.readouterr()
    assert "not measured" in said.out
    assert "no benchmark was measured" in said.err
