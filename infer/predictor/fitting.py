"""Fitting predictors to a recording, a layer at a time.

The loss weights neurons by their contributions. With e the contribution of a neuron (divided by the mean of those that
fire, to a power) and z its logit, it is e * softplus(-z) + price * softplus(z), whose minimum is at
z = log(E[e | x] / price): the logit is above 0 exactly where the expected contribution exceeds the price of reading the
neuron. With power 0 it is a class-weighted cross-entropy as in Deja Vu (arXiv:2310.17157).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from falcon_relu.config import FalconConfig
from falcon_relu.errors import FalconError, check_number, check_seed
from falcon_relu.model import Params
from falcon_relu.progress import progress
from infer.predictor.calibration import measure
from infer.predictor.predictor import LayerPredictor, Predictor, PredictorInput, score, uncalibrated
from infer.predictor.recording import Recording

_ROUND_BYTES = 256 << 20  # of minibatches passed to one compiled call
_SAMPLE = 16_384  # tokens from which a layer's statistics are taken
_START_LOGIT = 4.0  # root mean square of the logits before the first step


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How a predictor is fitted.

    Attributes:
      power: exponent of the contributions in the loss; 0 treats all neurons that fire alike.
      price: cost of reading a neuron, in units of the mean contribution of the layer's neurons.
      epochs: maximum number of passes over the recording; with 0 the result is `linear_start`.
      patience: epochs without a lower loss on held-out tokens after which to stop.
      batch: tokens a step.
      learning_rate: AdamW's initial learning rate, divided by sqrt(D); a cosine decays it to 0.
      weight_decay: AdamW's weight decay.
      seed: seed of the order of the tokens.
    """

    power: float = 1.0
    price: float = 0.3
    epochs: int = 8
    patience: int = 2
    batch: int = 512
    learning_rate: float = 0.12
    weight_decay: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("power", 0), ("epochs", 0), ("patience", 1), ("batch", 1), ("weight_decay", 0)):
            check_number(name, getattr(self, name), low=least)
        for name in ("price", "learning_rate"):
            check_number(name, getattr(self, name), above=0)
        check_seed("seed", self.seed)


def fit_predictor(
    recording: Recording,
    config: FalconConfig,
    params: Params,
    ranks: Sequence[int],
    how: FitConfig | None = None,
    *,
    first_layer: int = 0,
) -> Predictor:
    """Fits the predictors of all layers, in bfloat16, with thresholds at which as many neurons are read as fire.

    `measured` has each layer's results on held-out tokens at that threshold, and `start_recall` and `start_energy` of
    `linear_start` at the same number of reads.

    Args:
      recording: recorded activations of the model.
      config: the model.
      params: its parameters, or `layered_params`; `linear_start` is computed from them.
      ranks: R of each layer, even; of fewer layers than the model has, for a part of a predictor.
      how: settings.
      first_layer: the layer of the first rank.

    Raises:
      FalconError: the recording is not of this model or too short, or a layer of it never fires.
    """
    how = how or FitConfig()
    recording.check(config)
    for R in ranks:
        check_rank(R, config.d_model)
    layers, thresholds, measured = [], [], []
    with progress("fit predictors", len(ranks) * how.epochs, "epochs") as advance:
        for i, R in enumerate(ranks, first_layer):
            up_FxD = up_rows(config, params, i, recording.input)
            fitted = fit_layer(recording, i, up_FxD, R, how, functools.partial(advance, note=f"layer {i}"))
            layers.append(jax.tree.map(lambda w: w.astype(jnp.bfloat16), fitted))
            curve = measure(layers[-1], recording, i)
            start = measure(linear_start(_sample(recording, i)[0], up_FxD, R), recording, i)
            p, q = curve.reading(curve.fired), start.reading(curve.fired)
            thresholds.append(float(curve.threshold_P[p]))
            baseline = {"start_recall": float(start.recall_P[q]), "start_energy": float(start.energy_P[q])}
            measured.append(curve.row(p) | baseline)
    return uncalibrated(layers, recording.input).replace(thresholds=tuple(thresholds), measured=tuple(measured))


def fit_layer(
    recording: Recording,
    i: int,
    up_FxD: jax.Array,
    R: int,
    how: FitConfig,
    advance: Callable[[int], None] = lambda _: None,
) -> LayerPredictor:
    """Fits layer `i`, starting from `linear_start`; returns the weights with the lowest held-out loss, float32."""
    (x_NxD, c_NxF), held_out = recording.layer(i), recording.held_out
    if len(held_out) < how.batch:
        raise FalconError(
            f"{recording.folder} is too short: batches of {how.batch} need {10 * how.batch} tokens; record more, or "
            "give a smaller batch"
        )
    sample_nxD, sample_nxF = _sample(recording, i)
    fires = sample_nxF > 0
    if not fires.any():
        raise FalconError(f"no neuron of layer {i} fires on the recorded text; is it the right model?")
    size = float(np.sqrt(np.square(sample_nxD).mean()))
    goal = _Goal(
        size=size,
        unit=float(sample_nxF[fires].mean()),
        power=how.power,
        price=how.price * float(fires.mean()),
        learning_rate=how.learning_rate / x_NxD.shape[1] ** 0.5,
        weight_decay=how.weight_decay,
        steps=how.epochs * (held_out.start // how.batch),
    )
    start = linear_start(sample_nxD, up_FxD, R)
    # Inputs are scaled to a root mean square of 1, so that one learning rate suits all layers; fc1 takes the scale.
    best = layer = LayerPredictor(start.fc1_RxD * size, start.fc2_FxR)
    moments = _adam(goal).init(layer)
    rng = np.random.default_rng(how.seed)
    best_loss, stale = np.inf, 0
    for epoch in range(how.epochs):
        for minibatches in _rounds(rng.permutation(held_out.start), how.batch, x_NxD, c_NxF):
            layer, moments = _train(goal, layer, moments, *minibatches)
        held_loss = sum(float(_evaluate(goal, layer, *m)) for m in _rounds(held_out, how.batch, x_NxD, c_NxF))
        stale = 0 if held_loss < best_loss else stale + 1
        if not stale:
            best, best_loss = layer, held_loss
        advance(1)
        if stale == how.patience:
            advance(how.epochs - epoch - 1)
            break
    return LayerPredictor(best.fc1_RxD / size, best.fc2_FxR)


def up_rows(config: FalconConfig, params: Params, i: int, input: PredictorInput) -> jax.Array:
    """W_up of layer `i` [F, D], as it acts on a predictor's input up to a positive factor; biases are left out.

    Before the LayerNorm that is W_up with the norm's scale and centring folded in.
    """
    layers = params["layers"]
    up_FxD = jnp.asarray(layers["mlp"]["up"][i], jnp.float32)
    if input == "mlp_input":
        return up_FxD
    norm = "attention_norm" if config.block == "parallel" else "mlp_norm"
    up_FxD = up_FxD * jnp.asarray(layers[norm]["scale"][i], jnp.float32)[None]
    return up_FxD - up_FxD.mean(1, keepdims=True)


def linear_start(x_nxD: np.ndarray, up_FxD: jax.Array, R: int) -> LayerPredictor:
    """A predictor without training: the best approximation of W_up of rank R / 2 on the inputs.

    It minimises the mean squared error of W_up x over the inputs x: the truncated SVD of W_up S, with S the square root
    of the inputs' second moment. Each direction is used with both signs, as relu(a) - relu(-a) = a.
    """
    check_rank(R, up_FxD.shape[1])
    moment_DxD = x_nxD.T @ x_nxD / len(x_nxD)
    eigen_D, basis_DxD = jnp.linalg.eigh(moment_DxD)
    root_D = jnp.sqrt(jnp.maximum(eigen_D, 1e-5 * eigen_D.mean()))  # directions without inputs must not divide by 0
    up_root_FxD = up_FxD @ (basis_DxD * root_D[None])
    directions_DxR = jnp.linalg.eigh(up_root_FxD.T @ up_root_FxD)[1][:, -(R // 2) :]
    fc1 = (basis_DxD / root_D[None] @ directions_DxR).T
    fc2 = up_root_FxD @ directions_DxR
    fc2 *= _START_LOGIT / jnp.sqrt(jnp.square(fc2).sum(1).mean())
    return LayerPredictor(jnp.concatenate([fc1, -fc1]), jnp.concatenate([fc2, -fc2], axis=1))


def check_rank(R: int, D: int) -> None:
    """Makes sure that `linear_start` can make a predictor of rank R.

    Raises:
      FalconError: it is odd, or outside 2 to 2 D.
    """
    if R % 2 or not 2 <= R <= 2 * D:
        raise FalconError(f"a predictor's rank must be even, from 2 to 2 D = {2 * D}, got {R}")


def choose_rank(
    recording: Recording,
    i: int,
    up_FxD: jax.Array,
    candidates: Sequence[int],
    *,
    energy: float,
    how: FitConfig | None = None,
) -> tuple[int, list[dict[str, float]]]:
    """The rank of layer `i` with the fewest weights read a token: those of both maps, and 2 D for each selected neuron.

    Every candidate is fitted for one epoch and compared at the threshold that covers the fraction `energy` of the
    held-out energy.

    Returns:
      The rank and, for each candidate, rank, neurons read a token and weights read a token.
    """
    check_number("energy", energy, above=0, high=1)
    how = dataclasses.replace(how or FitConfig(), epochs=1)
    D, F = recording.d_model, recording.d_ff
    tried = []
    for R in candidates:
        curve = measure(fit_layer(recording, i, up_FxD, R, how), recording, i)
        read = float(curve.read_P[curve.covering(energy)])
        tried.append({"rank": R, "read": read, "weights": R * (D + F) + 2 * D * read})
    return int(min(tried, key=lambda row: row["weights"])["rank"]), tried


def _sample(recording: Recording, i: int) -> tuple[np.ndarray, ...]:
    """Inputs and contributions of the first tokens, float32."""
    return tuple(a[: min(_SAMPLE, recording.held_out.start)].astype(np.float32) for a in recording.layer(i))


@struct.dataclass
class _Goal:
    """Settings of a layer's loss and optimizer; arrays of the compiled step, so that all layers use one program."""

    size: float  # root mean square of the inputs
    unit: float  # mean contribution of a neuron that fires
    power: float
    price: float
    learning_rate: float
    weight_decay: float
    steps: int


def _adam(goal: _Goal) -> optax.GradientTransformation:
    return optax.adamw(
        lambda count: goal.learning_rate * (0.5 + 0.5 * jnp.cos(jnp.pi * jnp.minimum(count / goal.steps, 1))),
        weight_decay=goal.weight_decay,
    )


def _loss(goal: _Goal, layer: LayerPredictor, x_nxD: jax.Array, c_nxF: jax.Array) -> jax.Array:
    z_nxF = score(layer, x_nxD.astype(jnp.float32) / goal.size)
    c_nxF = c_nxF.astype(jnp.float32)
    worth_nxF = jnp.where(c_nxF > 0, (c_nxF / goal.unit) ** goal.power, 0)
    return jnp.mean(worth_nxF * jax.nn.softplus(-z_nxF) + goal.price * jax.nn.softplus(z_nxF))


@functools.partial(jax.jit, donate_argnums=2)
def _train(
    goal: _Goal, layer: LayerPredictor, moments: optax.OptState, x_SxnxD: jax.Array, c_SxnxF: jax.Array
) -> tuple[LayerPredictor, optax.OptState]:
    def step(
        carry: tuple[LayerPredictor, optax.OptState], rows: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[LayerPredictor, optax.OptState], None]:
        layer, moments = carry
        gradient = jax.grad(_loss, argnums=1)(goal, layer, *rows)
        updates, moments = _adam(goal).update(gradient, moments, layer)
        return (optax.apply_updates(layer, updates), moments), None

    return jax.lax.scan(step, (layer, moments), (x_SxnxD, c_SxnxF))[0]


@jax.jit
def _evaluate(goal: _Goal, layer: LayerPredictor, x_SxnxD: jax.Array, c_SxnxF: jax.Array) -> jax.Array:
    return jax.lax.map(lambda rows: _loss(goal, layer, *rows), (x_SxnxD, c_SxnxF)).sum()


def _rounds(rows: Sequence[int] | np.ndarray, batch: int, *arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Full minibatches of the given rows, [S, n, ...] of each array, as many at a time as fit into _ROUND_BYTES."""
    row_bytes = sum(a[:1].nbytes for a in arrays)
    at_once = max(_ROUND_BYTES // (batch * row_bytes), 1)
    minibatches = np.reshape(rows[: len(rows) // batch * batch], (-1, batch))
    for s in range(0, len(minibatches), at_once):
        chosen = minibatches[s : s + at_once]
        yield tuple(a[chosen] for a in arrays)
