from __future__ import annotations

import json

import pytest

from falcon_relu.cli import main
from infer.kernels import native

SMALL = ["--model", "tiny-40b", "--layers", "1", "--rank", "8", "--steps", "2", "--context", "16", "--active", "0.25"]
BACKENDS = ("native", "xla") if native.missing() is None else ("xla",)


def test_whole_tokens_read_the_active_share_and_project_to_the_whole_model(tmp_path):
    path = tmp_path / "figures.json"
    assert main(["bench", *SMALL, "--prompt", "9", "--backends", *BACKENDS, "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    rows = figures["tokens"]
    assert figures["prefill"][0]["prompt"] == 9
    assert [(row["backend"].split()[0], row["mode"]) for row in rows] == [
        (backend, mode) for backend in BACKENDS for mode in ("dense", "exact", "sparse")
    ]
    for row in rows:
        if row["mode"] == "exact":  # nearly all neurons fire
            assert 0.9 < row["active"] <= 1
        else:
            assert row["active"] == (0.25 if row["mode"] == "sparse" else 1)
        assert row["GB/s"] == pytest.approx(row["GB/token"] / row["ms/token"] * 1e3)
        assert row["mode"] != "dense" or row["layers, times dense"] == 1
        assert (row["choosing, share of layers"] == 0) == (row["mode"] != "sparse")
        layers = 2 * (row["GB/token"] - 512 * 64 * 2 / 1e9)  # tiny-40b has two layers and a head of 512 x 64 bf16
        whole = layers + 512 * 64 * 2 / 1e9
        assert row["tokens/s, 2 layers at 67.2 GB/s"] == pytest.approx(67.2 * row["share of memory"] / whole)


def test_single_kernels_have_a_row_each(tmp_path):
    path = tmp_path / "figures.json"
    assert main(["bench", "--micro", *SMALL, "--format", "int8", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    names = ["rows_dot", "weighted_row_sum", "gathered_rows_dot", "gathered_weighted_row_sum"]
    assert [row["kernel"] for row in figures["kernels"]] == names * len(BACKENDS)
    assert len(figures["choosing neurons"]) == 2 * len(BACKENDS)


def test_wrong_arguments_are_refused(capsys):
    assert main(["bench", "--model", "falcon-1t"]) == 1
    assert "falcon-40b" in capsys.readouterr().err
    assert main(["bench", "--active", "0"]) == 1
