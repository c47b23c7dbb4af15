"""Decode weights: a Falcon's parameters laid out for reading whole rows, layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from falcon_relu.config import FalconConfig
from falcon_relu.errors import FalconError
from falcon_relu.model import Params
from infer.formats import Array, Format, Rows, quantise
from infer.predictor import Predictor, PredictorInput


@dataclasses.dataclass(frozen=True, kw_only=True)
class Formats:
    """The number format of each kind of matrix.

    Attributes:
      attention: fused query, key and value rows, and the output rows.
      mlp: both maps of the MLP.
      predictor: both maps of the predictor.
      head: vocabulary head and embedding.
    """

    attention: Format = "bf16"
    mlp: Format = "bf16"
    predictor: Format = "bf16"
    head: Format = "bf16"

    @classmethod
    def all(cls, format: Format) -> Formats:
        """The same format for everything."""
        return cls(attention=format, mlp=format, predictor=format, head=format)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Norm:
    """A LayerNorm's scale and bias, [D] f32."""

    scale_D: Array
    bias_D: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PredictorWeights:
    """A layer's predictor: fc1 [R, D], fc2 [F, R], and as data the lowest logit and the most neurons to read."""

    fc1: Rows
    fc2: Rows
    threshold: Array
    budget: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One block.

    Attributes:
      attention_norm: the norm before the attention; before the MLP too in "parallel" blocks.
      mlp_norm: the norm before the MLP; None in "parallel" blocks.
      qkv: [K * (G + 2) * H, D]; of each KV head its queries, its key, its value.
      out: [D, K * G * H].
      up: [F, D].
      down: [F, D].
      qkv_bias, out_bias, up_bias, down_bias: f32, one a row (down_bias: [D]); None without biases.
      predictor: None where only `dense` and `exact` decoding is wanted.
    """

    attention_norm: Norm
    mlp_norm: Norm | None
    qkv: Rows
    out: Rows
    up: Rows
    down: Rows
    qkv_bias: Array | None = None
    out_bias: Array | None = None
    up_bias: Array | None = None
    down_bias: Array | None = None
    predictor: PredictorWeights | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeWeights:
    """A whole model, one entry a layer.

    Attributes:
      config: the architecture.
      predictor_input: what the predictors read; None without predictors.
      embedding: [V, D].
      layers: L blocks.
      final_norm: before the head.
      head: [V, D]; None where the embedding is the head.
    """

    config: FalconConfig = dataclasses.field(metadata=dict(static=True))
    predictor_input: PredictorInput | None = dataclasses.field(metadata=dict(static=True))
    embedding: Rows
    layers: tuple[LayerWeights, ...]
    final_norm: Norm
    head: Rows | None = None

    @property
    def head_rows(self) -> Rows:
        """The vocabulary head [V, D]."""
        return self.embedding if self.head is None else self.head

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def with_predictor(self, predictor: Predictor, format: Format = "bf16") -> DecodeWeights:
        """The same weights with these predictors; nothing else is copied.

        Raises:
          FalconError: the predictor has another number of layers or other widths than the model.
        """
        check_predictor(predictor, self.config)
        layers = tuple(
            dataclasses.replace(
                layer,
                predictor=PredictorWeights(
                    _device(quantise(maps.fc1_RxD, format)),
                    _device(quantise(maps.fc2_FxR, format)),
                    jnp.float32(threshold),
                    jnp.int32(budget),
                ),
            )
            for layer, maps, threshold, budget in zip(
                self.layers, predictor.layers, predictor.thresholds, predictor.budgets, strict=True
            )
        )
        return dataclasses.replace(self, layers=layers, predictor_input=predictor.input)


def from_params(
    params: Params, config: FalconConfig, formats: Formats | None = None, predictor: Predictor | None = None
) -> DecodeWeights:
    """Decode weights from the Flax parameters of `falcon_relu.model`, converted matrix by matrix.

    Raises:
      FalconError: a number is not finite or does not fit its format, or the predictor does not fit the model.
    """
    formats = formats or Formats()
    layers = params["layers"]

    def matrix(leaf: Any, format: Format, rows: int) -> Rows:
        return _device(quantise(leaf.reshape(rows, -1), format))

    def norm(tree: Any, take: Callable[[Any], Any] = lambda leaf: leaf) -> Norm:
        return Norm(_f32(take(tree["scale"])), _f32(take(tree["bias"])))

    def layer(i: int) -> LayerWeights:
        take = lambda leaf: leaf[i]  # noqa: E731
        attention, mlp = layers["attention"], layers["mlp"]
        bias = lambda tree, name: _f32(tree[name][i]).reshape(-1) if config.use_bias else None  # noqa: E731
        heads = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
        return LayerWeights(
            attention_norm=norm(layers["attention_norm"], take),
            mlp_norm=None if config.block == "parallel" else norm(layers["mlp_norm"], take),
            qkv=matrix(attention["qkv"][i], formats.attention, heads),
            out=matrix(attention["out"][i], formats.attention, config.d_model),
            up=matrix(mlp["up"][i], formats.mlp, config.d_ff),
            down=matrix(mlp["down"][i], formats.mlp, config.d_ff),
            qkv_bias=bias(attention, "qkv_bias"),
            out_bias=bias(attention, "out_bias"),
            up_bias=bias(mlp, "up_bias"),
            down_bias=bias(mlp, "down_bias"),
        )

    weights = DecodeWeights(
        config=config,
        predictor_input=None,
        embedding=matrix(params["embed"]["embedding"], formats.head, config.vocab_size),
        layers=tuple(layer(i) for i in range(config.n_layers)),
        final_norm=norm(params["final_norm"]),
        head=None if config.tied_embeddings else matrix(params["head"]["kernel"], formats.head, config.vocab_size),
    )
    return weights if predictor is None else weights.with_predictor(predictor, formats.predictor)


def check_predictor(predictor: Predictor, config: FalconConfig) -> None:
    """Refuses a predictor made for another model.

    Raises:
      FalconError: layers or widths differ.
    """
    if len(predictor.layers) != config.n_layers:
        raise FalconError(f"the predictor has {len(predictor.layers)} layers, the model {config.n_layers}")
    for i, maps in enumerate(predictor.layers):
        R = maps.fc1_RxD.shape[0]
        if maps.fc1_RxD.shape != (R, config.d_model) or maps.fc2_FxR.shape != (config.d_ff, R):
            raise FalconError(
                f"the predictor of layer {i} has maps of {maps.fc1_RxD.shape} and {maps.fc2_FxR.shape}; the model "
                f"needs (R, {config.d_model}) and ({config.d_ff}, R)"
            )


def _f32(leaf: Any) -> jax.Array:
    return jnp.asarray(leaf, jnp.float32)


def _device(rows: Rows) -> Rows:
    """On the CPU device, which takes aligned memory over without a copy."""
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf)), rows)
