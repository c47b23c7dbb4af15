"""Decode weights: a Falcon's parameters as matrices of which decoding reads whole rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from falcon_relu.checkpoints.load import check_finite, parameter_name, stream_model
from falcon_relu.config import Activation, FalconConfig
from falcon_relu.errors import FalconError
from falcon_relu.model import Params
from falcon_relu.sharding import Leaf
from infer.predictor.predictor import Predictor, PredictorInput
from infer.predictor.recording import Recording
from infer.weights.convert import convert_matrix, convert_predictor
from infer.weights.formats import Array, Format, Rows, rows_like
from infer.weights.memory import need_memory

Kind = Literal["attention", "mlp", "predictor", "head"]

# Fields of LayerWeights and DecodeWeights that hold the matrices of each kind.
KINDS: dict[Kind, tuple[str, ...]] = {
    "attention": ("qkv", "out"),
    "mlp": ("up", "down"),
    "predictor": ("predictor",),
    "head": ("embedding", "head"),
}


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

    @classmethod
    def parse(cls, text: str) -> Formats:
        """Parses "int8" (all kinds) or "int8,head=bf16,predictor=bf16" (all kinds but those named).

        The head of "int4" is int8 unless it is named: in 4 bits it costs several percent of perplexity.

        Raises:
          FalconError: a format or a kind is unknown.
        """
        first, *others = text.split(",")
        named = [tuple(other.split("=")) for other in others]
        for pair in [("attention", first), *named]:
            if len(pair) != 2 or pair[0] not in KINDS or pair[1] not in get_args(Format):
                raise FalconError(
                    f"number format {text!r} is not valid: give one of {', '.join(get_args(Format))}, then exceptions "
                    f"such as head=bf16 after commas; kinds: {', '.join(KINDS)}"
                )
        return dataclasses.replace(cls._defaults(first), **dict(named))  # type: ignore[arg-type]

    @classmethod
    def _defaults(cls, format: Format) -> Formats:
        """The formats before exceptions."""
        return dataclasses.replace(cls.all(format), head="int8" if format == "int4" else format)

    def __str__(self) -> str:
        """As `parse` reads it."""
        default = self._defaults(self.mlp)
        exceptions = (
            f"{kind}={getattr(self, kind)}" for kind in KINDS if getattr(self, kind) != getattr(default, kind)
        )
        return ",".join([self.mlp, *exceptions])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Norm:
    """A LayerNorm's scale and bias, [D] f32."""

    scale_D: Array
    bias_D: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PredictorWeights:
    """A layer's predictor: fc1 [R, D], fc2 [F, R], lowest logit f32 and maximum number of neurons int32 to read."""

    fc1: Rows
    fc2: Rows
    threshold: Array
    budget: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """The weights of one block.

    Attributes:
      attention_norm: the norm before the attention; in "parallel" blocks before the MLP too.
      mlp_norm: the norm before the MLP; None in "parallel" blocks.
      qkv: [K * (G + 2) * H, D]; for each KV head, the rows of its queries, its key and its value.
      out: [D, K * G * H].
      up: [F, D].
      down: [F, D].
      qkv_bias, out_bias, up_bias, down_bias: f32, a number for each row (down_bias: [D]); None without biases.
      predictor: None without sparse decoding.
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
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class DecodeWeights:
    """The decode weights of a whole model.

    Attributes:
      config: the architecture.
      predictor_input: what the predictors read; None without predictors.
      embedding: [V, D].
      layers: the L blocks.
      final_norm: the norm before the head.
      head: [V, D]; None where the embedding is also the head.
    """

    config: FalconConfig = dataclasses.field(metadata=dict(static=True))
    predictor_input: PredictorInput | None = dataclasses.field(metadata=dict(static=True))
    embedding: Rows
    layers: tuple[LayerWeights, ...]
    final_norm: Norm
    head: Rows | None = None

    def __repr__(self) -> str:
        c = self.config
        formats = ", ".join(f"{kind} {format}" for kind, format in dataclasses.asdict(self.formats).items())
        ranks = [layer.predictor.fc1.shape[0] for layer in self.layers if layer.predictor is not None]
        predictor = f"predictors of rank {min(ranks)} to {max(ranks)}" if ranks else "no predictors"
        return (
            f"DecodeWeights(L={c.n_layers}, D={c.d_model}, F={c.d_ff}, V={c.vocab_size}, {c.activation}; {formats}; "
            f"{predictor}; {self.nbytes / 1e6:,.1f} MB)"
        )

    @property
    def head_rows(self) -> Rows:
        """The vocabulary head [V, D]."""
        return self.embedding if self.head is None else self.head

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def formats(self) -> Formats:
        """The number formats."""
        first = self.layers[0]
        predictor = first.up.format if first.predictor is None else first.predictor.fc1.format
        return Formats(attention=first.qkv.format, mlp=first.up.format, predictor=predictor, head=self.embedding.format)

    def with_predictor(
        self, predictor: Predictor, format: Format = "bf16", recording: Recording | None = None
    ) -> DecodeWeights:
        """The same weights with these predictors; nothing else is copied.

        With a recording of the input that they read, int4 maps are rounded for it.

        Raises:
          FalconError: the predictor has another number of layers or other widths than the model.
        """
        check_predictor(predictor, self.config)
        if recording is not None and recording.input != predictor.input:
            recording = None
        layers = tuple(
            dataclasses.replace(
                layer,
                predictor=PredictorWeights(
                    *convert_predictor(i, maps, format, recording),
                    jnp.float32(threshold),
                    jnp.int32(budget),
                ),
            )
            for i, (layer, maps, threshold, budget) in enumerate(
                zip(self.layers, predictor.layers, predictor.thresholds, predictor.budgets, strict=True)
            )
        )
        return dataclasses.replace(self, layers=layers, predictor_input=predictor.input)


def weights_from_params(
    params: Params,
    config: FalconConfig,
    formats: Formats | None = None,
    predictor: Predictor | None = None,
    recording: Recording | None = None,
) -> DecodeWeights:
    """Decode weights from the Flax parameters of `falcon_relu.model`, converted matrix by matrix.

    With a recording of the model, int4 matrices are rounded for their inputs in it.

    Raises:
      FalconError: a number is not finite or does not fit its format, or the predictor does not fit the model.
    """
    leaves = flatten_dict(params)
    pieces = (
        (leaf, layer, array if layer is None else array[layer])
        for leaf, array in leaves.items()
        for layer in (range(config.n_layers) if leaf[0] == "layers" else (None,))
    )
    return from_pieces(config, pieces, formats, predictor, recording)


def weights_from_checkpoint(
    source: str | Path,
    formats: Formats | None = None,
    predictor: Predictor | None = None,
    *,
    activation: Activation | None = None,
    recording: Recording | None = None,
) -> DecodeWeights:
    """Decode weights from a checkpoint, one tensor at a time: no second copy of the model is in memory.

    Args:
      source: native weights, a folder in the Hugging Face layout, or a hub id.
      formats: number formats; bf16 if None.
      predictor: its predictor, for sparse decoding.
      activation: the MLP activation, where a Hugging Face config does not name it.
      recording: of the model, for int4.

    Raises:
      FalconError: as `load_model` and `weights_from_params`, or there is too little memory.
    """
    config, pieces = stream_model(source, activation=activation)
    need_memory(skeleton(config, formats or Formats()).nbytes, f"the weights of {source}")
    return from_pieces(config, pieces, formats, predictor, recording)


def from_pieces(
    config: FalconConfig,
    pieces: Iterable[tuple[Leaf, int | None, Array]],
    formats: Formats | None = None,
    predictor: Predictor | None = None,
    recording: Recording | None = None,
) -> DecodeWeights:
    """Decode weights from all parameters of a model, split by layer, in any order; see `weights_from_params`."""
    if recording is not None:
        recording.check(config)
    shapes = skeleton(config, formats or Formats())
    found: dict[tuple[Leaf, int | None], Any] = {}
    places = {_OURS[name]: name for name in _OURS}
    for leaf, layer, array in pieces:
        part = shapes.layers[layer] if layer is not None else shapes
        wanted = _get(part, places[leaf])
        name = parameter_name(leaf, layer)
        if isinstance(wanted, Rows):
            matrix = array.reshape(wanted.shape)
            found[leaf, layer] = convert_matrix(name, places[leaf], layer, matrix, wanted.format, recording)
        else:
            check_finite(name, np.asarray(array))
            found[leaf, layer] = jnp.asarray(array, jnp.float32).reshape(wanted.shape)

    def fill(part: Any, layer: int | None) -> Any:
        changes: dict[str, Any] = {}
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if isinstance(value, Norm):
                changes[field.name] = Norm(*(found[_OURS[f"{field.name}.{name}"], layer] for name in _NORM))
            elif field.name in _OURS and value is not None:
                changes[field.name] = found[_OURS[field.name], layer]
        return dataclasses.replace(part, **changes)

    layers = tuple(fill(part, i) for i, part in enumerate(shapes.layers))
    weights = dataclasses.replace(fill(shapes, None), layers=layers)
    if predictor is None:
        return weights
    return weights.with_predictor(predictor, (formats or Formats()).predictor, recording)


def skeleton(
    config: FalconConfig,
    formats: Formats,
    ranks: Sequence[int] = (),
    predictor_input: PredictorInput | None = None,
) -> DecodeWeights:
    """The decode weights of a config as shapes and dtypes only, without memory.

    Args:
      config: the architecture.
      formats: number formats.
      ranks: R of each layer's predictor; empty without predictors.
      predictor_input: what the predictors read.
    """
    D, F, V = config.d_model, config.d_ff, config.vocab_size
    heads = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim

    def array(*shape: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    def predictor(R: int) -> PredictorWeights:
        maps = rows_like(R, D, formats.predictor), rows_like(F, R, formats.predictor)
        return PredictorWeights(*maps, array(), array(dtype=jnp.int32))

    def layer(i: int) -> LayerWeights:
        sizes = {"qkv_bias": heads, "out_bias": D, "up_bias": F, "down_bias": D} if config.use_bias else {}
        return LayerWeights(
            attention_norm=Norm(array(D), array(D)),
            mlp_norm=None if config.block == "parallel" else Norm(array(D), array(D)),
            qkv=rows_like(heads, D, formats.attention),
            out=rows_like(D, D, formats.attention),
            up=rows_like(F, D, formats.mlp),
            down=rows_like(F, D, formats.mlp),
            predictor=predictor(ranks[i]) if ranks else None,
            **{name: array(size) for name, size in sizes.items()},
        )

    return DecodeWeights(
        config=config,
        predictor_input=predictor_input,
        embedding=rows_like(V, D, formats.head),
        layers=tuple(layer(i) for i in range(config.n_layers)),
        final_norm=Norm(array(D), array(D)),
        head=None if config.tied_embeddings else rows_like(V, D, formats.head),
    )


# Field of DecodeWeights or LayerWeights -> parameter of the Flax model.
_NORM = ("scale", "bias")
_OURS: dict[str, Leaf] = {
    "embedding": ("embed", "embedding"),
    "head": ("head", "kernel"),
    **{f"final_norm.{name}": ("final_norm", name) for name in _NORM},
    **{f"{norm}.{name}": ("layers", norm, name) for norm in ("attention_norm", "mlp_norm") for name in _NORM},
    **{
        f"{matrix}{bias}": ("layers", module, f"{matrix}{bias}")
        for module, matrices in (("attention", ("qkv", "out")), ("mlp", ("up", "down")))
        for matrix in matrices
        for bias in ("", "_bias")
    },
}


def _get(part: Any, name: str) -> Any:
    field, _, within = name.partition(".")
    value = getattr(part, field)
    return getattr(value, f"{within}_D") if within else value


def check_predictor(predictor: Predictor, config: FalconConfig) -> None:
    """Makes sure that a predictor fits the model.

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
