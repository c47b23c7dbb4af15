import copy
import html
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from falcon_relu.cli.demo.report import render, write_report
from falcon_relu.cli.main import main

NASTY = "<script>alert('x')</script> & \"$a_b$\" {model.layers} </p>"
PLOTS = {  # title -> what its axes say, with units
    "The teacher learns": ("step", "cross-entropy (nats a token)"),
    "Tuning the ReLU students": ("step", "cross-entropy (nats a token)"),
    "Distance from the teacher": ("step", "KL from the teacher (nats a token)"),
    "Zeros by layer": ("layer", "zero activations"),
    "Quality lost against neurons read": ("neurons read", "KL(dense || sparse) (nats a token)"),
    "Agreement against neurons read": ("neurons read", "same first choice as dense"),
    "Bytes read for a token": ("kB a token",),
    "Speed": ("tokens a second",),
    "Time for a token, random weights": ("milliseconds",),
    "Time by stage": ("seconds",),
}


def log(levels, **also):
    lines = [{"step": i, "cross_entropy": x, **also} for i, x in enumerate(levels, 1)]
    return [*lines, {"step": len(lines), "validation": {"cross_entropy": levels[-1] + 0.1, **also}}]


def quality(model, cross_entropy, accuracy, kl, agreement, zeros):
    return {
        "model": model,
        "cross_entropy": cross_entropy,
        "perplexity": 77.125,
        "accuracy": accuracy,
        "kl": kl,
        "agreement": agreement,
        "zeros": zeros,
    }


def decode(mode, backend, tokens_per_second, kilobytes, share, same):
    return {
        "mode": mode,
        "backend": backend,
        "tokens_per_second": tokens_per_second,
        "kilobytes_per_token": kilobytes,
        "mlp_share_read": share,
        "same_text_as_dense": same,
    }


RESULTS = {
    "machine": {
        "cpu": "A processor",
        "cores": 2,
        "memory_gb": 23.52,
        "platform": "linux",
        "jax": "0.10.2",
        "read_bandwidth_gb_s": 32.84,
    },
    "seconds": {"text": 4.25, "teacher": 231.5},
    "processor_seconds": {"text": 6.0, "teacher": 444.0},
    "model": {
        "parameters": 21_495_808,
        "layers": 2,
        "d_model": 256,
        "d_ff": 1024,
        "heads": 4,
        "kv_heads": 2,
        "vocab": 65024,
        "train_tokens_teacher": 2_457_600,
        "train_tokens_student": 819_200,
    },
    "corpora": [
        {"name": "plays", "about": "old plays", "licence": "public domain", "documents": 42, "tokens": 1_512_339}
    ],
    "curves": {
        "teacher": log([11.0, 7.0, 5.0]),
        "lm_only": log([5.5, 5.0]),
        "lm_kl": log([5.4, 4.9], kl=0.3),
    },
    "quality": [
        quality("teacher (GELU)", 4.3121, 0.2774, None, None, 0.0),
        quality("swapped, not tuned", 5.7131, 0.1648, 1.5221, 0.3311, 0.7213),
        quality("tuned on text alone (LM)", 4.4331, 0.2651, 0.2621, 0.7012, 0.8377),
        quality("tuned with LM + KL", 4.3521, 0.2723, 0.1313, 0.8012, 0.8291),
    ],
    "retained": {"lm_only": 0.9557, "lm_kl": 0.9816, "published": 0.973, "met": True, "why": ""},
    "zeros_by_layer": {"swapped": [0.6, 0.7], "lm_only": [0.8, 0.9], "lm_kl": [0.81, 0.85]},
    "predictor": [
        {
            "layer": i,
            "rank": 64,
            "recall": 0.9812,
            "precision": 0.5234,
            "read": 0.3456,
            "fired": fired,
            "energy": 0.9923,
        }
        for i, fired in enumerate((0.15, 0.19))
    ],
    "tradeoff": [
        {"read": read, "kl": kl, "agreement": 1 - kl, "cross_entropy": 4.4} for read, kl in ((0.1, 0.3), (0.5, 0.01))
    ],
    "operating_point": {"read": 0.3142, "kl": 0.0297, "agreement": 0.9661, "cross_entropy": 4.3761},
    "decode": [
        decode("dense", "native", 400.0, 39_813, 1.0, True),
        decode("exact", "native", 418.92, 36_102, 0.58, True),
        decode("sparse", "native", 500.0, 35_177, 0.3142, 0.93),
        decode("dense", "xla", 201.25, 39_813, 1.0, True),
        decode("sparse", "xla", 171.5, 35_177, 0.3142, False),
    ],
    "widths": [
        {"mode": "sparse", "backend": "xla", "read": 0.1, "milliseconds": 99.5, "gb_s": 9.3},
        {"mode": "dense", "backend": "xla", "read": 1.0, "milliseconds": 121.5, "gb_s": 17.5},
        {"mode": "sparse", "backend": "native", "read": 0.1, "milliseconds": 31.45, "gb_s": 27.3},
        {"mode": "dense", "backend": "native", "read": 1.0, "milliseconds": 84.5, "gb_s": 28.5},
    ],
    "widths_of": {"model": "falcon-40b", "layers": 1, "of_layers": 60, "rank": 1024},
    "samples": [
        {"prompt": "Once", "teacher": "a king", "dense": "a queen", "exact": "a queen", "sparse": "a quiet day"}
    ],
}


class Page(HTMLParser):
    """Tags that nest, and what the page would load or run."""

    def __init__(self, page):
        super().__init__()
        self.open, self.ids, self.loads, self.text = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag != "meta":
            self.open.append(tag)
        self.note(tag, attributes)

    def handle_startendtag(self, tag, attributes):
        self.note(tag, attributes)

    def note(self, tag, attributes):
        named = dict(attributes)
        self.ids += [named["id"]] if "id" in named else []
        links = [v for k, v in attributes if k in ("src", "href", "xlink:href", "srcset") and not v.startswith("#")]
        self.loads += links + [k for k in named if k.startswith("on")]
        self.loads += [tag] if tag in ("script", "link", "iframe", "img", "object", "embed") else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


def words(page):
    return " ".join("".join(Page(page).text).split())


def leaves(value, path=()):
    if not isinstance(value, dict | list):
        return [(path, value)]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [leaf for key, inner in items for leaf in leaves(inner, (*path, key))]


def drawing(page, title):
    """What is written in a plot."""
    svg = re.search(f'<svg role="img" aria-label="{title}"(.*?)</svg>', page, flags=re.S)[1]
    return [html.unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]


def changed(path, value):
    results = copy.deepcopy(RESULTS)
    part = results
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return results


def test_it_needs_nothing_beside_it():
    page = render(RESULTS)
    parsed = Page(page)
    assert parsed.loads == []
    assert "http" not in page
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    assert len(parsed.ids) == len(set(parsed.ids))


def test_the_figures_are_those_given():
    text = words(render(RESULTS))
    for figure in (
        "21,495,808 parameters and GELU was trained on 2,457,600 tokens",
        "tuned on 819,200 tokens",
        "right at 27.2% of held-out positions; the teacher does at 27.7%",
        "98.2% of the teacher",
        "83.0% of its MLP activations",  # the mean of 81 % and 85 %
        "decodes 2.69 times as fast when it reads only",  # 84.5 / 31.45, the backend that is fastest sparse
        "31.4 ms a token for 1 of 60 layers, against 84.5 ms",
        "caches, where reading fewer of them need not save time",
        "1.25 times the speed",  # 500 / 400, the faster backend
        "500.0 tokens a second against 400.0",
        "processor time7.5 minutes",
        "No benchmark was run. The fraction kept",
        "88.4% of the bytes",  # 35,177 / 39,813
        "reaches 98.16% and tuning on text alone 95.57%",
        "ReluFalcon-40B keeps 97.30%",
        "this run: reached.",
        "cross-entropy is 5.713 nats a token; the teacher's is 4.312",
        "17.0% of the neurons fire. At the operating point 31.4% are read",
        "KL(dense || sparse) is 0.0297 nats",
        "same at 96.6% of positions, and cross-entropy is 4.376 nats",
        "reads 32.8 GB/s",
        "all stages235.8 s",
        "The MLPs hold 4.9% of the parameters",  # 2 x 2 x 256 x 1024 of 21,495,808
    ):
        assert figure in text
    page = render(RESULTS)
    for cells in (
        ("tuned with LM + KL", "4.352", "77.12", "27.2%", "0.131", "80.1%", "82.9%"),
        ("1", "64", "98.1%", "99.2%", "52.3%", "34.6%", "19.0%"),
        ("exact", "native", "418.9", "36,102", "58.0%", "yes"),
        ("sparse", "native", "500.0", "35,177", "31.4%", "93.0%"),
        ("sparse", "xla", "171.5", "35,177", "31.4%", "no"),
        ("plays", "old plays", "public domain", "42", "1,512,339"),
    ):
        assert re.search("<tr>" + "".join(f"<td[^>]*>{re.escape(cell)}</td>" for cell in cells) + "</tr>", page)


def test_it_leads_with_the_speed_at_a_large_models_widths_and_not_at_tiny_ones():
    text = words(render(RESULTS))
    assert text.index("2.69 times as fast") < text.index("98.2%") < text.index("1.25 times the speed")
    tiny = [row | {"megabytes": 0.1234} for row in RESULTS["widths"]]
    text = words(render(RESULTS | {"widths": tiny}))
    assert "times as fast" not in text
    assert "have 0.1234 MB and stay in the processor's caches" in text


def test_benchmarks_are_not_said_to_be_missing_where_they_are_shown():
    row = {
        "benchmark": "MMLU",
        "shots": 5,
        "questions": 12,
        "original": 0.25,
        "relu": 0.25,
        "sparse": 0.25,
        "error": 0.1,
    }
    page = render(RESULTS | {"benchmarks": [row | {"chance": 0.25}], "benchmarks_missing": "TruthfulQA"})
    assert "<td>12</td><td>25.0%</td>" in page
    assert "Missing: TruthfulQA." in words(page)
    assert "No benchmark was run" not in page
    assert "Missing:" not in words(render(RESULTS | {"benchmarks": [row], "benchmarks_missing": ""}))


def test_a_log_that_was_edited_is_drawn_as_far_as_it_is_one():
    curves = {"teacher": [{"step": 1, "cross_entropy": "low"}, {"step": 2, "cross_entropy": 3.5}, {"step": 3}, {}]}
    assert "<svg" in render(RESULTS | {"curves": curves})


def test_a_miss_says_by_how_much_and_why():
    missed = {"lm_only": 0.9, "lm_kl": 0.9611, "published": 0.973, "met": False, "why": "Too few tokens."}
    text = words(render({**RESULTS, "retained": missed}))
    assert "this run: missed by 1.19 percentage points. Too few tokens." in text


def test_every_plot_has_its_title_labels_and_legend():
    page = render(RESULTS)
    assert set(re.findall(r'<svg role="img" aria-label="([^"]*)"', page)) == set(PLOTS)
    for title, labels in PLOTS.items():
        assert {title, *labels} <= set(drawing(page, title))
    assert {"LM, training", "LM + KL, held out", "teacher, held out"} <= set(drawing(page, "Tuning the ReLU students"))
    for title in ("Quality lost against neurons read", "Agreement against neurons read"):
        assert {"operating point", "neurons that fire"} <= set(drawing(page, title))
    assert {"sparse, native", "35,177"} <= set(drawing(page, "Bytes read for a token"))
    assert {"sparse, native", "31.4"} <= set(drawing(page, "Time for a token, random weights"))
    assert {"teacher", "231.5"} <= set(drawing(page, "Time by stage"))


def test_without_results_nothing_is_filled_in():
    text = words(render({}))
    assert text.count("not measured") > 40
    assert "None" not in text
    stated = re.sub("ReluFalcon-40B", "", text)
    assert not re.search(r"\d", stated)
    assert "<svg" not in render({})


def test_what_is_missing_is_said_to_be(monkeypatch):
    monkeypatch.setattr("falcon_relu.cli.demo.report._plots", lambda results: {})
    whole = render(RESULTS).count("not measured")
    only_plotted = {"curves", "tradeoff", "swapped", "lm_only", "why"}  # and why: empty here
    shown = [path for path, value in leaves(RESULTS) if value is not None and not only_plotted & set(path)]
    assert len(shown) > 100
    for path in [*shown, ("retained", "lm_only")]:
        assert render(changed(path, None)).count("not measured") > whole, path
    assert "percentage points</strong>. <span" in render({"retained": {"met": False}})


def test_what_a_plot_lacks_is_said_in_its_legend():
    legend = drawing(render(changed(("zeros_by_layer", "swapped"), None)), "Zeros by layer")
    assert "swapped, not tuned: not measured" in legend
    legend = drawing(render(changed(("operating_point",), None)), "Agreement against neurons read")
    assert "operating point: not measured" in legend
    legend = drawing(render(changed(("predictor",), None)), "Agreement against neurons read")
    assert "neurons that fire: not measured" in legend


def test_a_bar_that_is_missing_keeps_its_place():
    speed = drawing(render(changed(("decode", 1, "tokens_per_second"), None)), "Speed")
    assert {"exact, native", "not measured"} <= set(speed)


def test_text_from_outside_is_only_ever_text():
    results = copy.deepcopy(RESULTS)
    results["samples"] = [dict.fromkeys(("prompt", "teacher", "dense", "exact", "sparse"), NASTY)]
    results["corpora"][0] |= {"name": NASTY, "about": NASTY, "licence": NASTY}
    results["machine"] |= {"cpu": NASTY}
    results["retained"] |= {"met": False, "why": NASTY}
    results["quality"][3]["model"] += NASTY
    results["decode"][0]["backend"] = results["decode"][0]["mode"] = "<i>$x_1$&"
    results["seconds"] = {"<b>$y_1$&": 1.0}
    page = render(results)
    assert Page(page).loads == []
    assert words(page).count(NASTY) == 11
    assert "<b>$y_1$&" in drawing(page, "Time by stage")
    assert "<i>$x_1$&, <i>$x_1$&" in drawing(page, "Speed")
    assert "<script" not in page


def test_what_differs_from_dense_is_marked():
    page = render(RESULTS)
    sample = page[page.index("<article>") :]
    assert "<h4>exact</h4><p>a queen</p>" in sample
    assert "<h4>sparse</h4><p>a qu<mark>iet day</mark></p>" in sample


@settings(max_examples=30)
@given(st.text(), st.text(), st.text())
def test_samples_come_back_as_they_were(prompt, dense, sparse):
    page = render({"samples": [{"prompt": prompt, "teacher": dense, "dense": dense, "exact": dense, "sparse": sparse}]})
    sample = re.search("<article>(.*)</article>", page, flags=re.S)[1]
    shown = [html.unescape(re.sub("</?mark>", "", cell)) for cell in re.findall("<p>(.*?)</p>", sample, flags=re.S)]
    assert shown == [html.unescape(html.escape(text)) for text in (dense, dense, dense, sparse)]


def test_the_same_results_give_the_same_file(tmp_path):
    path = tmp_path / "report.html"
    write_report(path, RESULTS)
    assert path.read_text(encoding="utf-8") == render(RESULTS)
    with pytest.raises(TypeError):
        write_report(path, changed(("seconds", "text"), "soon"))
    assert path.read_text(encoding="utf-8") == render(RESULTS)
    write_report(path, {"samples": [{"prompt": "\ud800"}]})  # half a surrogate pair, which JSON can carry
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert "&#55296;" in path.read_text(encoding="utf-8")


STATE = {  # a file of a run, and what it holds
    "recipe.json": ["", "[]", "3", "null", '{"rank":', "\xff", '{"rank": 7}', "[" * 90_000],
    "results/text.json": [
        "",
        "[]",
        "null",
        "{}",
        '{"seconds": 1}',
        '{"seconds": 1, "results": [], "checksum": 3}',
        "{\xff",
    ],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in STATE.items() for text in texts])
def test_a_damaged_state_of_a_run_is_told_in_a_line(tmp_path, capsys, name, text):
    (tmp_path / "run" / "results").mkdir(parents=True)
    (tmp_path / "run" / name).write_bytes(text.encode("latin-1"))
    assert main(["demo", "--config", "demo_tiny", "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "recipe" in said if text == '{"rank": 7}' else name in said
    assert (tmp_path / "run" / name).read_bytes() == text.encode("latin-1")
