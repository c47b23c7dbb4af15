"""Our engines and lm-eval's own Hugging Face model on the same exported folder: every answer, every score."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval")
torch = pytest.importorskip("torch")

os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from falcon_relu import corpora  # noqa: E402
from falcon_relu.checkpoints.convert import export_hf  # noqa: E402
from falcon_relu.checkpoints.load import load_config, load_model  # noqa: E402
from falcon_relu.checkpoints.native import save_params  # noqa: E402
from falcon_relu.config import family  # noqa: E402
from falcon_relu.errors import FalconError  # noqa: E402
from falcon_relu.evaluation import questions as eval_data  # noqa: E402
from falcon_relu.evaluation.harness import HarnessModel  # noqa: E402
from falcon_relu.evaluation.journal import Journal  # noqa: E402
from falcon_relu.evaluation.scoring import Engine, FlaxEngine  # noqa: E402
from falcon_relu.evaluation.suite import SUITES, Benchmark, evaluate  # noqa: E402
from falcon_relu.generation import Sampling  # noqa: E402
from falcon_relu.model import Falcon  # noqa: E402
from falcon_relu.sharding import init_params  # noqa: E402
from falcon_relu.tokenizer import Tokenizer, train_bpe  # noqa: E402
from infer.scoring import DecodeEngine  # noqa: E402
from infer.weights.layout import Formats, weights_from_params  # noqa: E402
from tests.conftest import random_params  # noqa: E402
from tests.falcon_relu.evaluation.questions import phrase, write_questions  # noqa: E402
from tests.train.data.texts import prepare_texts  # noqa: E402
from train import loop  # noqa: E402
from train.config import OptimizerConfig, TrainConfig  # noqa: E402
from train.data.batches import DataConfig, Source  # noqa: E402


@pytest.fixture(scope="module")
def small_data(tmp_path_factory) -> Path:
    data = tmp_path_factory.mktemp("data")
    write_questions(data)
    return data


SMALL = (
    Benchmark("ARC-Challenge", "arc_challenge", 3, "acc_norm,none", "arc"),
    Benchmark("Winogrande", "winogrande", 2, "acc,none", "winogrande"),
    Benchmark("GSM8K", "gsm8k", 1, "exact_match,strict-match", "gsm8k"),
)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory) -> Path:
    """A random ReLU Falcon, exported with a tokenizer of its own."""
    folder, rng = tmp_path_factory.mktemp("model"), np.random.default_rng(1)
    tokenizer = train_bpe(
        [f"Question: {phrase(rng, 20)}\nAnswer: {i} ####" for i in range(200)], 400, folder / "t.json"
    )
    config = family("tiny-40b").replace(
        activation="relu",
        vocab_size=tokenizer.vocab_size,
        max_positions=400,
        bos_token_id=tokenizer.eos_id,
        eos_token_id=tokenizer.eos_id,
    )
    save_params(folder / "native", config, random_params(config, 5))
    export_hf(folder / "native", folder / "hf", tokenizer=folder / "t.json")
    return folder / "hf"


def engines(folder: Path) -> dict[str, Engine]:
    config, params = load_model(folder)
    weights = weights_from_params(params, config, Formats.all("f32"))
    return {"flax": FlaxEngine(Falcon(config), params), "exact": DecodeEngine(weights, "exact", cache="f32")}


def answers(results: dict[str, Any]) -> dict[str, list]:
    """Every answer of a run by task, in the order of the questions."""
    return {
        name: [[answer for (answer,) in record["resps"]] for record in sorted(records, key=lambda r: r["doc_id"])]
        for name, records in results["samples"].items()
    }


def compare(mine: dict[str, Any], theirs: dict[str, Any]) -> tuple[int, float]:
    """Makes sure that all answers and scores agree; how many answers, and the largest difference of log-likelihoods."""
    count, worst = 0, 0.0
    found, wanted = answers(mine), answers(theirs)
    assert found.keys() == wanted.keys()
    for name in wanted:
        for a, b in zip(itertools.chain(*found[name]), itertools.chain(*wanted[name]), strict=True):
            count += 1
            if isinstance(b, str):
                assert a == b, name
            else:
                worst = max(worst, abs(float(a[0]) - float(b[0])))
                assert a[1] == b[1], name
    assert worst < 1e-3
    assert mine["rows"] == theirs["rows"]
    return count, worst


def test_answers_and_scores_are_those_of_transformers(small_data, small_model):
    theirs = evaluate(
        HFLM(str(small_model), device="cpu", dtype="float32", batch_size=1), SMALL, data=small_data, limit=4
    )
    for engine in engines(small_model).values():
        mine = evaluate(HarnessModel(engine, Tokenizer(small_model)), SMALL, data=small_data, limit=4)
        count, _ = compare(mine, theirs)
        assert count == 4 * (4 + 2 + 2)  # GSM8K's texts count twice: it has two filters


def test_a_killed_evaluation_goes_on_and_gives_the_same_table(small_data, small_model, tmp_path):
    command = [sys.executable, "-m", "falcon_relu", "eval", small_model, "--tokenizer", small_model]
    command += ["--out", tmp_path / "run", "--data", small_data, "--offline", "--engine", "exact", "--format", "f32"]
    command = list(map(str, [*command, "--tasks", "arc_challenge", "gsm8k", "--shots", 2]))
    kept = tmp_path / "run" / "answers.jsonl"
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        while process.poll() is None and (not kept.exists() or kept.read_bytes().count(b"\n") < 9):
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "run" / "results.json").exists()
    with kept.open("ab") as file:
        file.write(b'["half a li')
    before = kept.read_bytes().splitlines()[:9]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "fatal" not in done.stderr  # git's, where the folder is no repository
    assert kept.read_bytes().splitlines()[:9] == before
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    benchmarks = [b._replace(shots=2) for b in SUITES["open-llm-v1"] if b.task in ("arc_challenge", "gsm8k")]
    whole = evaluate(HarnessModel(engines(small_model)["exact"], Tokenizer(small_model)), benchmarks, data=small_data)
    assert results["rows"] == whole["rows"]
    for name, records in whole["samples"].items():
        lines = (tmp_path / "run" / "samples" / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line)["resps"] for line in lines] == json.loads(json.dumps([r["resps"] for r in records]))

    other = subprocess.run([*command, "--activation", "relu"], capture_output=True, text=True, timeout=300, check=False)
    assert other.returncode == 1
    assert "another model or with other settings (activation)" in other.stderr


def test_windows_of_long_texts_are_those_of_transformers(small_model):
    rng = np.random.default_rng(3)
    texts = [Instance("loglikelihood_rolling", {}, (phrase(rng, n),), 0) for n in (3, 900)]
    wanted = HFLM(str(small_model), device="cpu", dtype="float32", batch_size=1).loglikelihood_rolling(texts)
    for engine in engines(small_model).values():
        found = HarnessModel(engine, Tokenizer(small_model)).loglikelihood_rolling(texts)
        np.testing.assert_allclose(found, wanted, atol=1e-2, rtol=1e-5)


# ---- requests as tasks make them


@pytest.fixture(scope="module")
def stopping_model(small_model, tmp_path_factory) -> Path:
    """The small model with a special token <|stop|>, which it says wherever it would say the commonest word."""
    folder = tmp_path_factory.mktemp("stopping")
    config, params = load_model(small_model)
    tokenizer = json.loads((small_model / "tokenizer.json").read_text())
    stop = config.vocab_size
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"].append({"id": stop, "content": "<|stop|>", "special": True, **flags})
    (folder / "t.json").write_text(json.dumps(tokenizer))
    said = FlaxEngine(Falcon(config), params).generate([[40, 41, 42]], Sampling(max_new_tokens=12), lambda ids: False)[
        0
    ]
    embedding = np.asarray(params["embed"]["embedding"])
    common = said[6]
    params["embed"]["embedding"] = np.concatenate([embedding, 1.5 * embedding[common : common + 1]])
    config = config.replace(vocab_size=stop + 1)
    save_params(folder / "native", config, params)
    export_hf(folder / "native", folder / "hf", tokenizer=folder / "t.json")
    return folder / "hf"


ASKED = (  # generation as tasks ask for it, and as transformers takes it
    {"until": ["<|stop|>"], "do_sample": False, "num_beams": 1, "repetition_penalty": 1.0},
    {"until": ["<|stop|>", " "], "temperature": 0.0},
    {"until": ["never <|stop|>"], "max_gen_toks": 9},
    {"until": [], "max_gen_toks": 7, "do_sample": False, "top_p": 1.0},
)


def test_generation_is_asked_for_and_stops_as_in_transformers(stopping_model):
    contexts = ["Question: oak elm", "ash"]
    asked = [Instance("generate_until", {}, (c, {"max_gen_toks": 12, **a}), 0) for c in contexts for a in ASKED]
    wanted = HFLM(str(stopping_model), device="cpu", dtype="float32", batch_size=1).generate_until(asked)
    stopped = [text for text, instance in zip(wanted, asked, strict=True) if instance.args[1]["until"] == ["<|stop|>"]]
    whole = Tokenizer(stopping_model)
    assert any(len(whole.encode(text)) < 12 for text in stopped)  # it does say the special token
    for engine in engines(stopping_model).values():
        assert HarnessModel(engine, whole).generate_until(asked) == wanted


def test_what_a_batch_adds_behind_a_special_stop_token_is_cut(stopping_model):
    """The Flax engine looks for stop sequences now and then alone, and other prompts of a batch go on."""
    tokenizer = Tokenizer(stopping_model)
    stop = tokenizer.encode("<|stop|>")
    assert len(stop) == 1
    said = [*tokenizer.encode("oak elm"), *stop, *tokenizer.encode(" ash fir")]

    class Says:
        config, prompts_together = load_config(stopping_model), 2

        def generate(self, prompts, sampling, until):
            return [said for _ in prompts]

    asked = ({"until": ["<|stop|>"]}, {"until": ["never"]}, {"until": ["elm<|stop|> a"]}, {"until": ["fir", "k"]})
    found = HarnessModel(Says(), tokenizer).generate_until([Instance("g", {}, ("oak", a), 0) for a in asked])
    assert found == [
        "oak elm",
        "oak elm ash fir",
        "oak elm" + tokenizer.decode(said[said.index(*stop) + 1 :][:1]),
        "oa",
    ]


def test_settings_of_sampling_mean_nothing_without_it(small_model):
    plain = {"until": ["#"], "max_gen_toks": 6}
    asked = [plain, *({**plain, "do_sample": False, **a} for a in ({"top_k": -1}, {"top_p": 0}, {"temperature": 7}))]
    model = HarnessModel(engines(small_model)["exact"], Tokenizer(small_model))
    first, *others = model.generate_until([Instance("generate_until", {}, ("oak elm", a), 0) for a in asked])
    assert others == [first] * 3
    for wrong in (
        {"num_beams": 2},
        {"do_sample": True, "top_k": -1},
        {"max_gen_toks": 0},
        {"temperature": "hot"},
        {"max_gen_toks": None, "logits": 1},
    ):
        with pytest.raises(FalconError, match="a task asks for generation"):
            model.generate_until([Instance("generate_until", {}, ("oak", {**plain, **wrong}), 0)])


def test_a_continuation_inside_the_contexts_last_token_is_named_and_scored(small_model, capsys):
    tokenizer = Tokenizer(small_model)
    word = next(t for t in range(300, 400) if len(tokenizer.decode([t]).strip()) > 3)
    text = "oak" + tokenizer.decode([word])
    ids = tokenizer.encode(text)
    assert len(tokenizer.encode(text[:-1])) >= len(ids)
    pairs = [("oak", " elm"), (text[:-1], text[-1]), ("", ""), ("oak", "")]
    model = HarnessModel(engines(small_model)["exact"], tokenizer)
    found = model.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    assert all(np.isfinite(logprob) and logprob < 0 for logprob, _ in found)
    whole = model._loglikelihood_tokens([(pairs[1], ids[:-1], ids[-1:])])
    assert found[1] == whole[0]
    assert repr(text[:-1]) in capsys.readouterr().err
    wanted = HFLM(str(small_model), device="cpu", dtype="float32").loglikelihood([Instance("x", {}, pairs[0], 0)])
    assert found[0][0] == pytest.approx(wanted[0][0], abs=1e-3)


def test_sampled_texts_depend_on_the_seed_and_greedy_ones_do_not(small_model, tmp_path):
    asked = [
        Instance("generate_until", {}, (context, {"until": [], "max_gen_toks": 12, **how}), 0)
        for how in ({}, {"do_sample": True, "temperature": 1.0})
        for context in ("oak", "elm elm", "oak")
    ]

    def answers(seed: int, journal: str | None) -> list[str]:
        kept = Journal(None if journal is None else tmp_path / journal)
        return HarnessModel(engine, tokenizer, kept, seed).generate_until(asked)

    engine, tokenizer = engines(small_model)["exact"], Tokenizer(small_model)
    one, two = answers(1, "j"), answers(2, "j")
    size = (tmp_path / "j").stat().st_size
    assert one == answers(1, None) == answers(1, "j")
    assert two == answers(2, None) == answers(2, "j")
    assert (tmp_path / "j").stat().st_size == size  # known, all of them
    assert one[:3] == two[:3]
    assert one[3:] != two[3:]
    assert one[3] != one[5]  # asked twice, drawn twice


# ---- the same on real questions


@pytest.fixture(scope="module")
def real_data(tmp_path_factory) -> Path:
    data = tmp_path_factory.mktemp("real data")
    try:
        eval_data.build_eval_data(data)
    except FalconError as error:
        pytest.skip(f"pip cannot reach a registry: {error}")
    return data


@pytest.fixture(scope="module", params=["random", "trained"])
def real_model(request, tmp_path_factory) -> Path:
    """A tiny ReLU Falcon with room for 25 examples, as it starts or after some steps on Wikipedia."""
    folder = tmp_path_factory.mktemp(request.param)
    texts = list(itertools.islice(corpora.documents("wikipedia-sample"), 60))
    tokenizer = train_bpe(texts, 4096, folder / "tokenizer.json")
    ends = {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id}
    config = family("tiny-40b").replace(activation="relu", vocab_size=4096, max_positions=4096, **ends)
    weights = folder / "fresh"
    save_params(weights, config, random_params(config) if request.param == "random" else init_params(config, 0))
    if request.param == "trained":
        weights = _train(folder, texts)
    export_hf(weights, folder / "hf", tokenizer=folder / "tokenizer.json")
    return folder / "hf"


def _train(folder: Path, texts: list[str]) -> Path:
    prepare_texts(folder / "tokens", texts, folder / "tokenizer.json", seq_len=128)
    loop.run(
        TrainConfig(
            out=folder / "run",
            init_from=str(folder / "fresh"),
            data=DataConfig(sources=(Source(folder / "tokens"),), seq_len=128, batch_size=16),
            optimizer=OptimizerConfig(learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=10),
            steps=100,
            compute_dtype="float32",
            checkpoint_every=0,
        )
    )
    return folder / "run" / "weights"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("task", "limit", "least"),
    [
        ("arc_challenge", 200, 200),
        ("hellaswag", 200, 200),
        ("mmlu", 4, 200),  # of each subject
        ("winogrande", 200, 200),
        ("gsm8k", 20, 20),
    ],
)
def test_answers_to_real_questions_are_those_of_transformers(real_data, real_model, task, limit, least):
    (benchmark,) = (b for b in SUITES["open-llm-v1"] if b.task == task)
    start = time.perf_counter()
    theirs = evaluate(
        HFLM(str(real_model), device="cpu", dtype="float32", batch_size=1), [benchmark], data=real_data, limit=limit
    )
    assert theirs["rows"][0]["questions"] >= least
    told = [f"{task}: {theirs['rows'][0]['questions']} questions, transformers {time.perf_counter() - start:.0f} s"]
    for name, engine in engines(real_model).items():
        start = time.perf_counter()
        mine = evaluate(HarnessModel(engine, Tokenizer(real_model)), [benchmark], data=real_data, limit=limit)
        count, worst = compare(mine, theirs)
        told.append(f"{name} {time.perf_counter() - start:.0f} s, {count} answers, difference {worst:.1e} at most")
    print("; ".join(told))
