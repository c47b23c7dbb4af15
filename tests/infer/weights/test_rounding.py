"""int4 codes and scales: the native library and what defines it, and what recorded inputs are good for."""

from __future__ import annotations

import numpy as np
import pytest

from falcon_relu.errors import FalconError
from infer.weights import rounding
from infer.weights.formats import widen
from infer.weights.library import native_library
from infer.weights.rounding import Inputs, int4_codes, quantise

SHAPE = M, D = 90, 330  # no multiple of anything


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def error_of_products(difference_MxD: np.ndarray, inputs: Inputs) -> float:
    products = inputs.of_tokens @ (difference_MxD if inputs.weigh_rows else difference_MxD.T)
    return float(np.square(products).sum())


@pytest.mark.parametrize("weigh_rows", [False, True])
def test_error_feedback_halves_the_error_of_products_with_correlated_inputs(weigh_rows, monkeypatch):
    """On held-out tokens; and the library rounds as numpy does."""
    monkeypatch.setattr(rounding, "_TOGETHER", 200)  # several blocks of inputs
    x = normal(0, *SHAPE) * 0.02
    width = M if weigh_rows else D
    mixing = normal(1, 20, width)
    tokens = normal(2, 3000, 20) @ mixing + 0.3 * normal(3, 3000, width)
    if weigh_rows:
        tokens = np.maximum(tokens, 0)
    fitted, held_out = Inputs(tokens[:2000], weigh_rows), Inputs(tokens[2000:], weigh_rows)
    plain, calibrated = (np.asarray(widen(quantise(x, "int4", i))) - x for i in (None, fitted))
    assert error_of_products(calibrated, held_out) < 0.5 * error_of_products(plain, held_out)
    monkeypatch.setattr(rounding, "_native", lambda: None)
    defined = np.asarray(widen(quantise(x, "int4", fitted))) - x
    # A number between two levels may go either way, and others follow it.
    assert error_of_products(calibrated, fitted) == pytest.approx(error_of_products(defined, fitted), rel=0.02)


def test_scales_follow_what_columns_count(monkeypatch):
    x, importance = normal(0, *SHAPE), np.abs(normal(1, D)) ** 3
    x[3] = 0  # its scales are 0
    x[4, :32], x[5, :32] = 1e7, 1e-9  # beyond f16's largest scale, and below its smallest

    def error(codes: np.ndarray, scales: np.ndarray) -> float:
        y = rounding._LEVELS[codes] * np.repeat(scales.astype(np.float32), 32, axis=1)[:, :D]
        assert np.isfinite(y).all()
        return float(np.square(np.delete(x - y, 4, axis=0)) @ importance @ np.ones(M - 1))

    plain, weighted = error(*int4_codes(x, np.ones(D, np.float32))), int4_codes(x, importance)
    assert error(*weighted) < 0.95 * plain
    assert not weighted[1][3].any()
    monkeypatch.setattr(rounding, "_native", lambda: None)
    assert error(*int4_codes(x, importance)) == pytest.approx(error(*weighted), rel=1e-3)


def test_the_library_is_what_rounds_where_it_was_built():
    try:
        native_library()
    except OSError:
        pytest.skip("not built")
    assert rounding._native() is not None


def test_inputs_of_another_width_are_refused():
    with pytest.raises(FalconError, match=r"inputs of \(50, 90\) do not fit a matrix of \(90, 330\)"):
        quantise(normal(0, *SHAPE), "int4", Inputs(normal(1, 50, M)))
