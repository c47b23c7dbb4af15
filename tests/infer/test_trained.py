"""Decoding a model that was really trained: the same tokens as Flax and transformers, and what number formats cost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from falcon_relu.checkpoints.convert import export_hf
from falcon_relu.checkpoints.load import load_model
from falcon_relu.config import FalconConfig
from falcon_relu.generation import Sampling
from falcon_relu.generation import generate as flax_generate
from falcon_relu.model import Falcon, Params
from falcon_relu.tokenizer import Tokenizer
from infer.generation import generate
from infer.predictor.calibration import calibrate_predictor
from infer.predictor.fitting import FitConfig, fit_predictor
from infer.predictor.quality import compare_sparse, sensitivity
from infer.predictor.recording import record_activations
from infer.quality import DecodeSetting, measure_quality, one_kind, teacher_forced
from infer.weights.layout import Formats, weights_from_params
from tests.benchmarks import int4_kl
from tests.conftest import same_but_for_ties
from tests.infer import trained
from tests.infer.test_step import BACKENDS, covering_predictor
from train.data.batches import train_batches, validation_batches

PROMPT = '    def __init__(self, name):\n        """'
NEW_TOKENS = 256


class Trained(NamedTuple):
    folder: Path
    config: FalconConfig
    params: Params
    prompt: list[int]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    subprocess.run([sys.executable, "-m", "tests.infer.trained", str(folder)], check=True, capture_output=True)
    config, params = load_model(folder / "student" / "weights")
    return Trained(folder, config, params, Tokenizer(folder / "tokenizer.json").encode(PROMPT))


@pytest.fixture(scope="module")
def greedy(model) -> list[int]:
    """What the Flax model says, 256 tokens."""
    tokens = flax_generate(Falcon(model.config), model.params, [model.prompt], Sampling(max_new_tokens=NEW_TOKENS))[0]
    assert len(set(tokens)) > 20  # it is text, not one token over and over
    return tokens


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_mode_says_what_the_flax_model_says_for_256_tokens(model, greedy, backend):
    weights = weights_from_params(model.params, model.config, Formats.all("f32"), covering_predictor(model.config))
    for mode in ("dense", "exact", "sparse"):
        sampling = Sampling(max_new_tokens=NEW_TOKENS)
        found = generate(weights, [model.prompt], sampling, mode=mode, backend=backend, cache="f32")[0]
        assert same_but_for_ties(Falcon(model.config), model.params, model.prompt, found, greedy), mode


def test_transformers_says_the_same_256_tokens(model, greedy):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    export_hf(model.folder / "student" / "weights", model.folder / "hf")
    theirs = transformers.FalconForCausalLM.from_pretrained(model.folder / "hf").eval()
    theirs.generation_config.eos_token_id = None
    with torch.no_grad():
        said = theirs.generate(torch.tensor([model.prompt]), do_sample=False, max_new_tokens=NEW_TOKENS)
    found = said[0, len(model.prompt) :].tolist()
    assert same_but_for_ties(Falcon(model.config), model.params, model.prompt, found, greedy)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_logits_are_no_further_from_f32_than_the_flax_models_in_bf16(model, greedy, backend):
    tokens_BxT = jnp.asarray([model.prompt + greedy], jnp.int32)
    f32, bf16 = (
        jax.jit(Falcon(model.config, dtype).apply)({"params": model.params}, tokens_BxT)[0]
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    ours, _ = teacher_forced(weights_from_params(model.params, model.config), tokens_BxT, backend=backend)
    assert error(ours, f32[None]) <= error(bf16, f32)


def error(logits, reference) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(logits) - np.asarray(reference)))))


def test_int8_costs_less_than_the_limit_and_every_kind_of_matrix_is_told_apart(model):
    predictor = covering_predictor(model.config)
    bf16, int8 = (weights_from_params(model.params, model.config, Formats.all(f), predictor) for f in ("bf16", "int8"))
    kinds = ("attention", "mlp", "head")
    ways = {kind: DecodeSetting(one_kind(bf16, int8, kind)) for kind in kinds}
    found = measure_quality(
        bf16, ways | {"all": DecodeSetting(int8), "exact": DecodeSetting(bf16, "exact")}, validation_rows(model, 512)
    )
    assert 0 < found["all"]["kl"] <= 0.005
    assert found["all"]["agreement"] > 0.95
    for kind in kinds:
        assert 0 < found[kind]["kl"] <= found["all"]["kl"]
        assert found["all"]["bytes"] < found[kind]["bytes"]
    assert sum(found[kind]["kl"] for kind in kinds) == pytest.approx(found["all"]["kl"], rel=0.5)  # errors add up
    assert found["exact"]["kl"] < 1e-6
    assert found["exact"]["fired"] < 0.6


def test_int4_costs_less_than_q4_0_and_with_a_recording_less_than_two_thirds(model, fitted):
    """Each kind of matrix too; `python -m tests.benchmarks.int4_kl` prints the whole table."""
    pytest.importorskip("gguf")
    reference = int4_kl.bf16(model.params)
    batches = list(validation_batches(trained.data(model.folder)))[:8]
    ways = {how: int4_kl.rounded(model.config, reference, how, fitted[1]) for how in int4_kl.HOWS}
    ways |= {m: int4_kl.rounded(model.config, reference, "int4, calibrated", fitted[1], [m]) for m in int4_kl.MATRICES}
    found = int4_kl.compare(model.config, reference, ways, batches)
    q4_0, plain, calibrated = (found[how] for how in int4_kl.HOWS)
    assert plain["kl"] <= q4_0["kl"]
    assert calibrated["kl"] <= 0.5 * q4_0["kl"]
    assert calibrated["agreement"] > max(plain["agreement"], q4_0["agreement"])
    for matrix in int4_kl.MATRICES:
        assert 0 < found[matrix]["kl"] < calibrated["kl"]


def validation_rows(model: Trained, tokens: int) -> list[np.ndarray]:
    """Held-out rows [1, T], `tokens` in all."""
    rows = (row[None] for batch in validation_batches(trained.data(model.folder)) for row in batch["tokens_BxT"])
    return [row for row, _ in zip(rows, range(tokens // trained.SEQ_LEN), strict=False)]


@pytest.fixture(scope="module")
def fitted(model):
    """Predictors fitted to the model, and their recording."""
    batches = train_batches(trained.data(model.folder))
    folder = model.folder / "recording"
    recording = record_activations(model.config, model.params, batches, folder, tokens=20_000, input="mlp_input")
    predictor = fit_predictor(recording, model.config, model.params, [32] * model.config.n_layers, FitConfig(epochs=4))
    return predictor, recording


def test_fitted_predictors_beat_the_untrained_ones_on_held_out_tokens(fitted):
    for figures in fitted[0].measured:
        assert figures["recall"] > figures["start_recall"]
        assert figures["energy"] > figures["start_energy"]


def test_sparse_keeps_the_quality_while_reading_half_more_than_fires(model, fitted):
    predictor, recording = fitted
    data = trained.data(model.folder)
    weights = sensitivity(model.config, model.params, predictor, [next(train_batches(data))])
    firing = sum(figures["fired"] for figures in predictor.measured)
    calibrated = calibrate_predictor(predictor, recording, neurons=1.5 * firing, sensitivity=weights)
    found = compare_sparse(model.config, model.params, calibrated, validation_batches(data))
    assert found["read"] <= 1.55 * found["fired"]
    assert found["kl"] <= 0.01
    assert found["agreement"] >= 0.98

    # The decode step reads and says what the masked Flax model does.
    dense = weights_from_params(model.params, model.config, Formats.all("f32"))
    rows = validation_rows(model, 256)
    ways = {"sparse": DecodeSetting(dense.with_predictor(calibrated, "f32"), "sparse")}
    decoded = measure_quality(dense, ways, rows)["sparse"]
    masked = compare_sparse(model.config, model.params, calibrated, [as_batch(row) for row in rows])
    for figure in ("kl", "agreement", "read"):
        assert decoded[figure] == pytest.approx(masked[figure], rel=0.02, abs=1e-5)


def as_batch(tokens_BxT: np.ndarray) -> dict[str, np.ndarray]:
    """One document a row."""
    positions = np.broadcast_to(np.arange(tokens_BxT.shape[1], dtype=np.int32), tokens_BxT.shape)
    return {"tokens_BxT": tokens_BxT, "segment_ids_BxT": np.ones_like(tokens_BxT), "positions_BxT": positions}
