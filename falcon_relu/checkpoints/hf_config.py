"""Conversion between a Hugging Face `config.json` and FalconConfig; pure functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from falcon_relu.checkpoints.schema import parse
from falcon_relu.config import Activation, Block, FalconConfig
from falcon_relu.errors import FalconError

# Keys of configs older than transformers' Falcon (model types RefinedWeb and RefinedWebModel), and their new names.
_OLD_KEYS = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_head_kv": "num_kv_heads",
    "n_embed": "hidden_size",
}

_ACTIVATIONS = ("gelu", "relu", "relu2")  # those with the same name in transformers


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rope:
    """`rope_parameters` of transformers 5, `rope_scaling` before; "type" is the older name of "rope_type"."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: float | None = None
    partial_rotary_factor: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _HfConfig:
    """The fields of config.json that define the model, with transformers' defaults, which null means too."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    num_kv_heads: int | None = None
    ffn_hidden_size: int | None = None
    max_position_embeddings: int = 2048
    num_ln_in_parallel_attn: Literal[1, 2] = 2
    new_decoder_architecture: bool | None = None
    multi_query: bool = True
    parallel_attn: bool = True
    apply_residual_connection_post_layernorm: bool = False
    activation: str | None = None
    alibi: bool = False
    bias: bool = False
    tie_word_embeddings: bool = True
    layer_norm_epsilon: float = 1e-5
    rope_theta: float | None = None
    partial_rotary_factor: float | None = None
    rope_parameters: _Rope | None = None
    rope_scaling: _Rope | None = None
    bos_token_id: int | list[int] = 11
    eos_token_id: int | list[int] = 11


def config_from_hf(
    hf: Mapping[str, Any], activation: Activation | None = None, where: object = "config.json"
) -> FalconConfig:
    """The config of a Falcon checkpoint, from its `config.json`.

    If there are several end-of-text token ids, the first is used.

    Args:
      hf: the parsed file, written by any version of transformers or by Falcon's original code.
      activation: the MLP activation. Required where the file has no `activation` field, as in all original checkpoints
        (GELU) and ReLU checkpoints made from them: nothing else distinguishes these.
      where: the file, for error messages.

    Raises:
      FalconError: a field is missing, of the wrong type, or asks for something that a Falcon does not have; or the
        activation is unknown or contradicts the file.
    """
    if not isinstance(hf, Mapping):
        raise FalconError(f"{where} is not a JSON object")
    if hf.get("model_type") not in ("falcon", "RefinedWeb", "RefinedWebModel"):
        raise FalconError(f"{where} is of model_type {str(hf.get('model_type'))[:40]!r}, not of a Falcon")
    stated = {key: value for key, value in hf.items() if value is not None}
    for old, new in _OLD_KEYS.items():
        if old in stated and stated.setdefault(new, stated[old]) != stated[old]:
            raise FalconError(f"{where}: {old} and {new} contradict each other")
    known = {field.name for field in dataclasses.fields(_HfConfig)}
    fields = parse(_HfConfig, {key: value for key, value in stated.items() if key in known}, where, unknown_keys=True)
    new_decoder = fields.new_decoder_architecture
    if new_decoder is None:
        new_decoder = "n_head_kv" in hf
    if new_decoder:
        n_kv_heads = fields.num_attention_heads if fields.num_kv_heads is None else fields.num_kv_heads
    else:
        n_kv_heads = 1 if fields.multi_query else fields.num_attention_heads
    try:
        return FalconConfig(
            d_model=fields.hidden_size,
            n_layers=fields.num_hidden_layers,
            n_heads=fields.num_attention_heads,
            n_kv_heads=n_kv_heads,
            d_ff=4 * fields.hidden_size if fields.ffn_hidden_size is None else fields.ffn_hidden_size,
            activation=_activation(fields.activation, activation),
            vocab_size=fields.vocab_size,
            max_positions=fields.max_position_embeddings,
            block=_block(fields, new_decoder),
            position="alibi" if fields.alibi else "rotary",
            rope_theta=_rope_theta(fields),
            norm_eps=fields.layer_norm_epsilon,
            use_bias=fields.bias,
            tied_embeddings=fields.tie_word_embeddings,
            bos_token_id=_first_id("bos_token_id", fields.bos_token_id),
            eos_token_id=_first_id("eos_token_id", fields.eos_token_id),
        )
    except FalconError as error:
        raise FalconError(f"{where}: {error}") from None


def config_to_hf(config: FalconConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` with which transformers loads a model of this config; it names the activation.

    Args:
      config: the model.
      dtype: dtype of the weights, such as "float32".

    Raises:
      FalconError: transformers has no such Falcon.
    """
    if config.activation not in _ACTIVATIONS:
        raise FalconError("transformers has no shifted ReLU; fold the shift into the up-projection's bias or retrain")
    multi_query = config.n_kv_heads == 1
    new_decoder = config.block == "parallel_two_norms" or (config.block == "parallel" and not multi_query)
    if not new_decoder and config.n_kv_heads not in (1, config.n_heads):
        raise FalconError(f"transformers has no sequential Falcon with {config.n_kv_heads} key-value heads")
    return {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "activation": config.activation,
        "alibi": config.position == "alibi",
        "attention_dropout": 0.0,
        "bias": config.use_bias,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "ffn_hidden_size": config.d_ff,
        "hidden_dropout": 0.0,
        "hidden_size": config.d_model,
        "layer_norm_epsilon": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "multi_query": multi_query,
        "new_decoder_architecture": new_decoder,
        "num_attention_heads": config.n_heads,
        "num_hidden_layers": config.n_layers,
        "num_kv_heads": config.n_kv_heads,
        "num_ln_in_parallel_attn": (2 if config.block == "parallel_two_norms" else 1) if new_decoder else None,
        "parallel_attn": config.block != "sequential",
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_embeddings,
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
    }


def _activation(found: str | None, stated: Activation | None) -> Activation:
    if found is None and stated is None:
        raise FalconError(
            "no `activation` field, and nothing else distinguishes a GELU from a ReLU Falcon: "
            "give it with --activation gelu or --activation relu"
        )
    for name in (found, stated):
        if name is not None and name not in _ACTIVATIONS:
            raise FalconError(f"a checkpoint of activation {name!r} cannot be read; known: {', '.join(_ACTIVATIONS)}")
    if None not in (found, stated) and found != stated:
        raise FalconError(
            f"the file has activation {found!r} and {stated!r} was given: leave it out, or correct the file if it "
            "is wrong. (To swap a model's activation, load it as it is and use FalconConfig.with_activation.)"
        )
    return found or stated  # type: ignore[return-value]


def _block(fields: _HfConfig, new_decoder: bool) -> Block:
    if fields.apply_residual_connection_post_layernorm:
        raise FalconError("it asks for apply_residual_connection_post_layernorm, which no Falcon uses")
    if not new_decoder:
        return "parallel" if fields.parallel_attn else "sequential"
    if not fields.parallel_attn:
        raise FalconError("it has new_decoder_architecture without parallel_attn, which no Falcon has")
    return "parallel_two_norms" if fields.num_ln_in_parallel_attn == 2 else "parallel"


def _rope_theta(fields: _HfConfig) -> float:
    stated = [fields.rope_theta]
    for rope in (fields.rope_scaling, fields.rope_parameters):
        if rope is not None:
            kind = rope.rope_type or rope.type or "default"
            if kind != "default" or rope.partial_rotary_factor not in (None, 1.0):
                raise FalconError(f"it asks for scaled or partial rotary positions ({kind}), which are not supported")
            stated.append(rope.rope_theta)
    if fields.partial_rotary_factor not in (None, 1.0):
        raise FalconError("it asks for partial rotary positions, which are not supported")
    return next((theta for theta in reversed(stated) if theta is not None), 10_000.0)


def _first_id(name: str, token: int | list[int]) -> int:
    if isinstance(token, int):
        return token
    if not token:
        raise FalconError(f"{name} is an empty list")
    return token[0]
