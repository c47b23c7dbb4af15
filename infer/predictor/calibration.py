"""Calibration: a threshold and a budget for every layer, chosen together for the whole model.

The error that a layer makes by not reading neurons that fire is measured as energy, the sum of their squared
contributions. The outputs of skipped neurons are nearly uncorrelated, so that this is about the squared error of the
MLP's output, and to second order KL(dense || sparse) is a weighted sum of the layers' squared errors. Thresholds are
therefore chosen so that reading one more neuron lowers the (weighted) lost energy by the same amount in every layer.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from falcon_relu.errors import FalconError, check_number
from infer.predictor.predictor import EVERY, LayerPredictor, Predictor, score
from infer.predictor.recording import Recording

_POINTS = 512  # thresholds on a curve
_CHUNK_BYTES = 64 << 20  # of logits at a time
_WITHIN_BUDGET = 0.999  # fraction of the tokens that select no more neurons than the budget


@dataclasses.dataclass(frozen=True)
class Curve:
    """A layer's predictor at P thresholds, measured on held-out tokens; in order of falling thresholds.

    Attributes:
      threshold_P: the thresholds.
      read_P: neurons selected for a token, mean.
      recall_P: fraction of the neurons that fire that are selected.
      energy_P: the same, neurons weighted by their squared contributions to the output.
      fired: neurons that fire for a token, mean.
    """

    threshold_P: np.ndarray
    read_P: np.ndarray
    recall_P: np.ndarray
    energy_P: np.ndarray
    fired: float

    def covering(self, energy: float) -> int:
        """The first point whose `energy_P` is at least `energy`."""
        return min(int(np.searchsorted(self.energy_P, energy)), len(self.energy_P) - 1)

    def reading(self, neurons: float) -> int:
        """The last point that reads at most `neurons` neurons a token; the first if none does."""
        return max(int(np.searchsorted(self.read_P, neurons, side="right")) - 1, 0)

    def row(self, p: int) -> dict[str, float]:
        """Results at point `p`, as a predictor stores them: read, fired (neurons a token), recall, precision, ..."""
        read, recall = float(self.read_P[p]), float(self.recall_P[p])
        return {
            "read": read,
            "fired": self.fired,
            "recall": recall,
            "precision": recall * self.fired / read if read else 0.0,
            "energy": float(self.energy_P[p]),
        }


def measure(layer: LayerPredictor, recording: Recording, i: int) -> Curve:
    """The curve of layer `i`'s predictor on the recording's held-out tokens; read once, in chunks."""
    threshold_P = np.empty(0)
    sums_3xQ = np.zeros((3, _POINTS + 1))
    for z_nxF, c_nxF in _scored(layer, recording, i):
        if not threshold_P.size:
            threshold_P = _grid(z_nxF)
        first_nxF = np.searchsorted(-threshold_P, -z_nxF).ravel()  # the first threshold to select each neuron, or P
        for row, weight in zip(sums_3xQ, (np.ones_like(c_nxF), c_nxF > 0, c_nxF**2), strict=True):
            row += np.bincount(first_nxF, weight.ravel(), _POINTS + 1)
    read_Q, fired_Q, energy_Q = np.cumsum(sums_3xQ, axis=1)
    tokens = len(recording.held_out)
    recall_P, energy_P = (q[:-1] / max(q[-1], 1e-30) for q in (fired_Q, energy_Q))
    return Curve(threshold_P, read_Q[:-1] / tokens, recall_P, energy_P, float(fired_Q[-1]) / tokens)


def calibrate_predictor(
    predictor: Predictor,
    recording: Recording,
    *,
    energy: float | None = None,
    recall: float | None = None,
    neurons: float | None = None,
    kl: float | None = None,
    sensitivity: Sequence[float] | None = None,
    curves: Sequence[Curve] | None = None,
) -> Predictor:
    """Sets thresholds, budgets and measured results, from the recording's held-out tokens, for one target.

    Args:
      predictor: as fitted.
      recording: recorded activations of its model, at its input.
      energy: target: fraction of the energy to cover, averaged over layers, with the fewest neurons read.
      recall: target: fraction to cover of the neurons that fire, over all layers, with the fewest neurons read.
      neurons: target: neurons to read a token, summed over layers, with the most energy covered.
      kl: target: expected KL(dense || sparse), nats a token, with the fewest neurons read; needs `sensitivity`.
      sensitivity: weight of each layer's fraction of lost energy, nats (see `quality.sensitivity`); equal if None.
      curves: results of `measure` for every layer, if they were computed already.

    Raises:
      FalconError: the recording is of another input or model, or as `check_target`.
    """
    check_target(energy=energy, recall=recall, neurons=neurons, kl=kl)
    if kl is not None and sensitivity is None:
        raise FalconError("calibrating to a KL needs the layers' sensitivity")
    if recording.input != predictor.input:
        raise FalconError(f"the recording is of {recording.input}, the predictor reads {predictor.input}")
    if recording.n_layers != len(predictor.layers):
        raise FalconError(f"the recording is of {recording.n_layers} layers, the predictor of {len(predictor.layers)}")
    curves = curves or [measure(layer, recording, i) for i, layer in enumerate(predictor.layers)]
    if recall is None:
        weight_L = np.ones(len(curves)) if sensitivity is None else np.asarray(sensitivity, np.float64)
        losses = [weight * (1 - curve.energy_P) for weight, curve in zip(weight_L, curves, strict=True)]
        max_loss = kl if energy is None else (1 - energy) * float(weight_L.sum())
    else:
        losses = [curve.fired * (1 - curve.recall_P) for curve in curves]
        max_loss = (1 - recall) * sum(curve.fired for curve in curves)
    points = allocate([curve.read_P for curve in curves], losses, max_cost=neurons, max_loss=max_loss)
    thresholds = tuple(float(curve.threshold_P[p]) for curve, p in zip(curves, points, strict=True))
    budgets = tuple(
        _budget(layer, recording, i, threshold)
        for i, (layer, threshold) in enumerate(zip(predictor.layers, thresholds, strict=True))
    )
    measured = tuple(curve.row(p) for curve, p in zip(curves, points, strict=True))
    return predictor.replace(thresholds=thresholds, budgets=budgets, measured=measured)


def check_target(**targets: float | None) -> None:
    """Makes sure that exactly one target of `calibrate_predictor`, or megabytes a token, is given, and is in range.

    Raises:
      FalconError: none or several are given, or it is out of range.
    """
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        raise FalconError(f"give one target: {', '.join(targets)}")
    for name, value in given.items():
        check_number(name, value, above=0, high=1 if name in ("energy", "recall") else math.inf)


def neurons_for_bytes(predictor: Predictor, bytes_per_token: float, weight_bytes: float) -> float:
    """Neurons a token may read, summed over layers, so that MLPs and predictors together read at most these bytes.

    Raises:
      FalconError: the predictors alone read more, or a number is not above 0.
    """
    check_number("bytes of a weight", weight_bytes, above=0)
    D, F = predictor.layers[0].fc1_RxD.shape[1], predictor.layers[0].fc2_FxR.shape[0]
    own = sum(predictor.ranks) * (D + F) * weight_bytes
    if own >= bytes_per_token:
        raise FalconError(f"the predictors alone read {own:,.0f} bytes a token, {bytes_per_token:,.0f} were asked for")
    return (bytes_per_token - own) / (2 * D * weight_bytes)


def allocate(
    costs: Sequence[np.ndarray],
    losses: Sequence[np.ndarray],
    *,
    max_cost: float | None = None,
    max_loss: float | None = None,
) -> list[int]:
    """Chooses a point on every layer's curve of loss against cost.

    Goes along the lower convex hulls of all curves, always taking the steepest remaining segment: with `max_cost` while
    the total cost stays within it, with `max_loss` until the total loss is low enough or no segment is left. No other
    choice of points with the same total cost has less loss (Everett's theorem on Lagrange multipliers, 1963).

    Args:
      costs: of each layer's points.
      losses: of the same points.
      max_cost: limit of the total cost, or
      max_loss: limit of the total loss.

    Returns:
      An index into each layer's points.
    """
    hulls = [_lower_hull(cost, loss) for cost, loss in zip(costs, losses, strict=True)]
    chosen = [hull[0] for hull in hulls]
    steps = sorted(
        ((losses[i][b] - losses[i][a]) / (costs[i][b] - costs[i][a]), i, b)
        for i, hull in enumerate(hulls)
        for a, b in itertools.pairwise(hull)
    )

    def total(values: Sequence[np.ndarray], points: Sequence[int]) -> float:
        return float(sum(v[p] for v, p in zip(values, points, strict=True)))

    for _, i, b in steps:
        if max_loss is not None and total(losses, chosen) <= max_loss:
            break
        taken = [*chosen[:i], b, *chosen[i + 1 :]]
        if max_cost is not None and total(costs, taken) > max_cost:
            break
        chosen = taken
    return chosen


def _lower_hull(cost_P: np.ndarray, loss_P: np.ndarray) -> list[int]:
    """Indices of the falling part of the lower convex hull, by rising cost; slopes rise strictly and stay below 0."""
    hull: list[int] = []
    for p in np.lexsort((loss_P, cost_P)):
        if hull and loss_P[p] >= loss_P[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(cost_P, loss_P, hull[-2], hull[-1]) >= _slope(cost_P, loss_P, hull[-1], p):
            hull.pop()
        hull.append(int(p))
    return hull


def _slope(cost_P: np.ndarray, loss_P: np.ndarray, a: int, b: int) -> float:
    return float((loss_P[b] - loss_P[a]) / (cost_P[b] - cost_P[a]))


def _budget(layer: LayerPredictor, recording: Recording, i: int, threshold: float) -> int:
    """The number of neurons that all but a thousandth of the held-out tokens do not exceed at a threshold."""
    count_n = np.concatenate([(z_nxF >= threshold).sum(1) for z_nxF, _ in _scored(layer, recording, i)])
    return int(np.quantile(count_n, _WITHIN_BUDGET, method="higher"))


def _scored(layer: LayerPredictor, recording: Recording, i: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Logits and contributions [n, F], float32, of the held-out tokens, a chunk of tokens at a time."""
    x_NxD, c_NxF = recording.layer(i)
    tokens = max(_CHUNK_BYTES // (4 * recording.d_ff), 1)
    for start in range(recording.held_out.start, recording.held_out.stop, tokens):
        rows = slice(start, min(start + tokens, recording.held_out.stop))
        yield np.asarray(_score(layer, x_NxD[rows])), c_NxF[rows].astype(np.float32)


def _grid(z_nxF: np.ndarray) -> np.ndarray:
    """Falling thresholds that select from a ten-thousandth of the neurons to all, geometrically spaced."""
    threshold_P = np.quantile(z_nxF, 1 - np.geomspace(1e-4, 1, _POINTS))
    threshold_P[-1] = EVERY
    return threshold_P


_score = jax.jit(score)
