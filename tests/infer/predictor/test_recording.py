from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infer.predictor.recording
from falcon_relu.config import family
from falcon_relu.errors import FalconError
from falcon_relu.model import BATCH_KEYS, Falcon
from infer.predictor.recording import open_recording, record_activations
from tests.conftest import random_params, sharded
from tests.infer.predictor.planted import random_batch

CONFIG = family("tiny-40b").with_activation("relu")


@pytest.mark.parametrize("input", ["block_input", "mlp_input"])
def test_recording_holds_what_the_model_saw_without_padding(tmp_path: Path, input: str) -> None:
    params = random_params(CONFIG)
    batches = [random_batch(seed, CONFIG.vocab_size) for seed in range(3)]
    real = [batch["segment_ids_BxT"] != 0 for batch in batches]
    tokens = sum(int(r.sum()) for r in real) - 5  # ends within the last batch
    made = record_activations(CONFIG, params, batches, tmp_path / "r", tokens=tokens, input=input)
    assert open_recording(tmp_path / "r") == made
    made.check(CONFIG)

    observe = jax.jit(lambda *batch: Falcon(CONFIG).apply({"params": params}, *batch, mutable=["activations"])[1])
    seen = [observe(*(b[k] for k in BATCH_KEYS)) for b in batches]
    layers = [variables["activations"]["layers"] for variables in seen]
    for i in range(CONFIG.n_layers):
        inputs_NxD, contributions_NxF = made.layer(i)
        x_NxD = np.concatenate([np.asarray(seen[input][i])[r] for seen, r in zip(layers, real, strict=True)])[:tokens]
        h_NxF = np.concatenate([np.asarray(seen["mlp"]["neurons"][i])[r] for seen, r in zip(layers, real, strict=True)])
        c_NxF = h_NxF[:tokens] * np.linalg.norm(params["layers"]["mlp"]["down"][i], axis=-1)
        np.testing.assert_allclose(inputs_NxD.astype(np.float32), x_NxD, rtol=1e-2, atol=1e-4)
        # Another program: a few neurons within rounding of 0 may fire in one of them alone.
        assert ((contributions_NxF.astype(np.float32) != 0) != (h_NxF[:tokens] != 0)).sum() <= 3
        np.testing.assert_allclose(contributions_NxF.astype(np.float32), c_NxF, rtol=0.13, atol=1e-4)
        for matrix, of in (
            ("qkv", lambda s: s["attention_input"]),
            ("out", lambda s: s["attention"]["heads"]),
            ("up", lambda s: s["mlp_input"]),
        ):
            x_NxC = np.concatenate([np.asarray(of(s)[i])[r] for s, r in zip(layers, real, strict=True)])[:tokens]
            np.testing.assert_allclose(made.matrix_inputs(matrix, i).astype(np.float32), x_NxC, rtol=1e-2, atol=1e-4)
    hidden = Falcon(CONFIG).apply({"params": params}, *(batches[0][k] for k in BATCH_KEYS), method="hidden")[real[0]]
    head_inputs = made.matrix_inputs("head")[: len(hidden)].astype(np.float32)
    np.testing.assert_allclose(head_inputs, hidden, rtol=1e-2, atol=1e-3)


def test_contributions_out_of_range_still_tell_what_fires(tmp_path: Path) -> None:
    params = random_params(CONFIG)
    params["layers"]["mlp"]["down"] = params["layers"]["mlp"]["down"].at[0].multiply(1e-9).at[1].multiply(1e9)
    batch = random_batch(0, CONFIG.vocab_size)
    made = record_activations(CONFIG, params, [batch], tmp_path / "r", tokens=100, input="mlp_input")
    for i in range(2):
        share = (made.layer(i)[1].astype(np.float32) > 0).mean()
        assert 0.2 < share < 0.8
        assert np.isfinite(made.layer(i)[1].astype(np.float32)).all()


def test_recordings_that_cannot_be_made_or_opened(tmp_path: Path) -> None:
    params, batch = random_params(CONFIG), random_batch(0, CONFIG.vocab_size)
    with pytest.raises(FalconError, match="GELU"):
        record_activations(
            CONFIG.with_activation("gelu"), params, [batch], tmp_path / "r", tokens=10, input="mlp_input"
        )
    with pytest.raises(FalconError, match="ended after 112 of 1000"):
        record_activations(CONFIG, params, [batch], tmp_path / "r", tokens=1000, input="mlp_input")
    assert not list(tmp_path.iterdir())

    record_activations(CONFIG, params, [batch], tmp_path / "r", tokens=100, input="mlp_input")
    with pytest.raises(FalconError, match="L, D, F"):
        open_recording(tmp_path / "r").check(family("tiny-7b"))
    with (tmp_path / "r" / "001.inputs").open("r+b") as file:
        file.truncate(10)
    with pytest.raises(FalconError, match=r"001\.inputs is not whole: it has 10 of 12,800 bytes; record it again"):
        open_recording(tmp_path / "r")
    with pytest.raises(FalconError, match="does not exist"):
        open_recording(tmp_path / "none")


def test_bf16_models_can_be_recorded(tmp_path: Path) -> None:
    params, batch = random_params(CONFIG), random_batch(0, CONFIG.vocab_size)
    made = record_activations(CONFIG, params, [batch], tmp_path / "r", tokens=50, input="mlp_input", dtype=jnp.bfloat16)
    assert made.layer(0)[0].shape == (50, CONFIG.d_model)


def test_pieces_on_a_mesh_see_the_context_before_them_and_are_no_larger_than_allowed(
    tmp_path: Path, monkeypatch
) -> None:
    params = random_params(CONFIG)
    batches = [random_batch(seed, CONFIG.vocab_size, B=2) for seed in range(2)]
    at_once = record_activations(CONFIG, params, batches, tmp_path / "whole", tokens=112, input="mlp_input")
    monkeypatch.setattr(
        infer.predictor.recording, "_PIECE_BYTES", 5 * 4 * CONFIG.n_layers * 2 * (CONFIG.d_ff + 2 * CONFIG.d_model) // 8
    )  # 5 positions, T is 32
    pieces, original = [], infer.predictor.recording.observe_piece

    def noted(*arguments: Any) -> Any:
        pieces.append(arguments[-1].shape)
        return original(*arguments)

    monkeypatch.setattr(infer.predictor.recording, "observe_piece", noted)
    with sharded(CONFIG, params, (1, 2, 4)) as placed:
        in_pieces = record_activations(CONFIG, placed, batches, tmp_path / "pieces", tokens=112, input="mlp_input")
    assert set(pieces) == {(2, 5)}
    # Whole rows one after the other, or pieces of them: (batch, row, position) of each token, 28 of 32 are not padding.
    order = [
        (n, b, t) for n in range(2) for start in range(0, 28, 5) for b in range(2) for t in range(start, start + 5)
    ]
    places = [n * 56 + b * 28 + t for n, b, t in order if t < 28]
    for i in range(CONFIG.n_layers):
        (x_NxD, c_NxF), (of_pieces_NxD, of_pieces_NxF) = at_once.layer(i), in_pieces.layer(i)
        np.testing.assert_allclose(
            x_NxD[places].astype(np.float32), of_pieces_NxD.astype(np.float32), rtol=1e-2, atol=1e-4
        )
        np.testing.assert_allclose(
            c_NxF[places].astype(np.float32), of_pieces_NxF.astype(np.float32), rtol=0.3, atol=1e-3
        )
        assert ((c_NxF[places] != 0) != (of_pieces_NxF != 0)).sum() <= 3  # within rounding of 0
