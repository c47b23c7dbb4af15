from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.flax import save_file

from falcon_relu.checkpoints.schema import seal
from falcon_relu.config import family
from falcon_relu.errors import FalconError
from infer.choice import choose
from infer.predictor.predictor import (
    LayerPredictor,
    Predictor,
    export_powerinfer,
    import_powerinfer,
    load_predictor,
    save_predictor,
    score,
    stack,
)

CONFIG = family("tiny-40b").with_activation("relu")
D, F = CONFIG.d_model, CONFIG.d_ff


def random_predictor(ranks: tuple[int, ...] = (8, 4), dtype=jnp.float32) -> Predictor:
    rng = np.random.default_rng(0)
    layers = tuple(
        LayerPredictor(jnp.asarray(rng.normal(size=(R, D)), dtype), jnp.asarray(rng.normal(size=(F, R)), dtype))
        for R in ranks
    )
    figures = ({"recall": 0.5},) * len(ranks)
    return Predictor(layers=layers, input="block_input", thresholds=(0.25, -1.0), budgets=(F, 17), measured=figures)


def assert_same_maps(a: Predictor, b: Predictor) -> None:
    for x, y in zip(a.layers, b.layers, strict=True):
        for w, v in ((x.fc1_RxD, y.fc1_RxD), (x.fc2_FxR, y.fc2_FxR)):
            assert w.dtype == v.dtype
            np.testing.assert_array_equal(np.asarray(w), np.asarray(v))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_stored_predictor_comes_back_bit_for_bit(tmp_path: Path, dtype) -> None:
    predictor = random_predictor(dtype=dtype)
    save_predictor(predictor, tmp_path / "p.safetensors")
    loaded = load_predictor(tmp_path / "p.safetensors", CONFIG)
    assert_same_maps(predictor, loaded)
    assert loaded.replace(layers=()) == predictor.replace(layers=())


def _rewrite(path: Path, change) -> None:
    """Stores the predictor again after `change(tensors, metadata)`."""
    with safe_open(path, framework="flax") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = json.loads(file.metadata()["falcon_relu_predictor"])
    del metadata["checksum"]
    change(tensors, metadata)
    save_file(tensors, path, {"falcon_relu_predictor": json.dumps(seal(metadata))})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop("layers.1.fc2.weight"), "has no layers.1.fc2.weight"),
        (lambda t, m: t.update({"layers.0.fc1.weight": jnp.zeros((8, D + 1))}), r"layers.0.fc1.weight is .*\[8, 64\]"),
        (lambda t, m: t.update({"layers.0.fc2.weight": jnp.zeros((F, 7))}), r"layers.0.fc2.weight"),
        (lambda t, m: t.update({"layers.0.fc2.weight": jnp.zeros((F, 8))}), "damaged"),
        (lambda t, m: t.update({"layers.2.fc1.weight": jnp.zeros((8, D))}), "only 2 layers"),
        (lambda t, m: t.update({"layers.0.fc1.weight": jnp.zeros(())}), r"layers.0.fc1.weight"),
        (lambda t, m: m.update(version=99), "version 99"),
        (lambda t, m: m.update(input="elsewhere"), "input: input should be 'block_input' or 'mlp_input'"),
        (lambda t, m: m.update(thresholds=[0.0]), "thresholds must be 2"),
        (lambda t, m: m.update(thresholds=[0.0, "1"]), "thresholds.1: input should be a valid number"),
        (lambda t, m: m.update(thresholds=[0.0, float("nan")]), "thresholds.1 must be a finite number"),
        (lambda t, m: m.update(budgets=[0, True]), "budgets.1: input should be a valid integer"),
        (lambda t, m: m.update(measured=[{}] * 3), "measured must be of 2 layers"),
        (lambda t, m: m.update(wings=2), "wings is not known"),
        (lambda t, m: t.update({"layers.0.fc1.weight": jnp.full((8, D), jnp.nan)}), "fc1.weight holds NaN"),
        (lambda t, m: m.update(budgets=[0, F + 1]), "budgets must be 2"),
        (lambda t, m: m.pop("budgets"), "budgets is missing"),
    ],
)
def test_predictor_that_does_not_fit_is_refused(tmp_path: Path, change, message: str) -> None:
    path = tmp_path / "p.safetensors"
    save_predictor(random_predictor(), path)
    _rewrite(path, change)
    with pytest.raises(FalconError, match=message):
        load_predictor(path, CONFIG)


def test_truncated_foreign_and_missing_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    save_predictor(random_predictor(), path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FalconError, match="cannot be read"):
        load_predictor(path, CONFIG)
    save_predictor(random_predictor(), tmp_path / "q.safetensors")
    path.write_bytes((tmp_path / "q.safetensors").read_bytes().replace(b"block_input", b"mlp_input  "))
    with pytest.raises(FalconError, match=r"changed since it was written.*; copy or fit it again"):
        load_predictor(path, CONFIG)
    save_file({"w": jnp.zeros(3)}, path)
    with pytest.raises(FalconError, match="not a predictor"):
        load_predictor(path, CONFIG)
    with pytest.raises(FalconError, match="does not exist"):
        load_predictor(tmp_path / "none", CONFIG)


def test_powerinfer_files_round_trip(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    predictor = random_predictor().astype(jnp.float16).astype(jnp.float32)
    export_powerinfer(predictor, tmp_path / "pt")
    imported = import_powerinfer(tmp_path / "pt", CONFIG)
    assert_same_maps(predictor, imported)
    assert (imported.input, imported.thresholds, imported.budgets) == ("block_input", (0.0, 0.0), (F, F))
    with pytest.raises(FalconError, match="mlp_input"):
        export_powerinfer(predictor.replace(input="mlp_input"), tmp_path / "other")

    torch.save({"fc1.weight": torch.zeros(4, D)}, tmp_path / "pt" / "model_1.pt")
    with pytest.raises(FalconError, match=r"model_1.pt has no fc2.weight"):
        import_powerinfer(tmp_path / "pt", CONFIG)
    whole = {"fc1.weight": torch.zeros(4, D), "fc2.weight": torch.zeros(F, 4)}
    torch.save(whole | {"fc2.bias": torch.zeros(F)}, tmp_path / "pt" / "model_1.pt")
    with pytest.raises(FalconError, match=r"model_1.pt has 'fc2.bias': only predictors of two maps without biases"):
        import_powerinfer(tmp_path / "pt", CONFIG)
    torch.save(whole | {"fc1.weight": torch.zeros(4, D).to_sparse()}, tmp_path / "pt" / "model_1.pt")
    with pytest.raises(FalconError, match=r"model_1.pt: 'fc1.weight' is a tensor without numbers, or not a dense one"):
        import_powerinfer(tmp_path / "pt", CONFIG)
    torch.save(torch.nn.Linear(1, 1), tmp_path / "pt" / "model_1.pt")  # a pickled object: never run
    with pytest.raises(FalconError, match=r"model_1.pt is not a plain torch weights file"):
        import_powerinfer(tmp_path / "pt", CONFIG)
    (tmp_path / "pt" / "model_1.pt").unlink()
    with pytest.raises(FalconError, match=r"model_1.pt does not exist"):
        import_powerinfer(tmp_path / "pt", CONFIG)


def test_stacking_layers_of_several_ranks_keeps_their_logits() -> None:
    predictor = random_predictor()
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, D)), jnp.float32)
    stacked = stack(predictor.layers)
    for i, layer in enumerate(predictor.layers):
        wide = LayerPredictor(stacked.fc1_RxD[i], stacked.fc2_FxR[i])
        np.testing.assert_allclose(score(wide, x), score(layer, x), rtol=1e-5, atol=1e-4)


def test_selection_is_threshold_then_the_highest_within_budget() -> None:
    logits = jnp.array([[0.5, -1.0, 2.0, 0.0], [-3.0, -1.0, -2.0, -4.0]])
    np.testing.assert_array_equal(choose(logits, 0.0, 4), [[1, 0, 1, 1], [0, 0, 0, 0]])
    np.testing.assert_array_equal(choose(logits, 0.0, 2), [[1, 0, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(choose(logits, -10.0, 1), [[0, 0, 1, 0], [0, 1, 0, 0]])
    assert not choose(logits, -10.0, 0).any()
