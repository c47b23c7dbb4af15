"""Between `config.json` of the Hugging Face layout and FalconConfig; pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from falcon_relu.config import Activation, Block, FalconConfig
from falcon_relu.errors import FalconError

# Keys of the configs that came with Falcon's own code (model types RefinedWeb and RefinedWebModel).
_OLD_KEYS = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_head_kv": "num_kv_heads",
    "n_embed": "hidden_size",
}


_ACTIVATIONS = ("gelu", "relu", "relu2")  # transformers' names of those that are ours too
_INTEGERS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_kv_heads", "ffn_hidden_size", "vocab_size",
    "max_position_embeddings", "num_ln_in_parallel_attn",
)  # fmt: skip


def config_from_hf(hf: Mapping[str, Any], activation: Activation | None = None) -> FalconConfig:
    """The config of a Falcon checkpoint, from its `config.json`.

    Args:
      hf: the parsed file, of any age.
      activation: the user's word on the MLP activation. Required where the file has no `activation` field, as with all
        of the original checkpoints (GELU) and with ReLU ones made from them: nothing else tells those apart.

    Raises:
      FalconError: a field is missing, of the wrong type, or asks for something that a Falcon does not have; or the
        activation is unknown or contradicts the file.
    """
    if not isinstance(hf, Mapping):
        raise FalconError("config.json is not a JSON object")
    if hf.get("model_type") not in ("falcon", "RefinedWeb", "RefinedWebModel"):
        raise FalconError(f"config.json is of model_type {hf.get('model_type')!r}, not of a Falcon")
    fields = {_OLD_KEYS.get(key, key): value for key, value in hf.items() if value is not None}
    for key in _INTEGERS:
        if type(fields.get(key, 0)) is not int:
            raise FalconError(f"config.json: {key} must be an integer, got {fields[key]!r}")
    new_decoder = fields.get("new_decoder_architecture", "n_head_kv" in hf)
    try:
        d_model, n_heads = fields["hidden_size"], fields["num_attention_heads"]
        if new_decoder:
            n_kv_heads = fields.get("num_kv_heads", n_heads)
        else:
            n_kv_heads = 1 if fields.get("multi_query", True) else n_heads
        return FalconConfig(
            d_model=d_model,
            n_layers=fields["num_hidden_layers"],
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            d_ff=fields.get("ffn_hidden_size", 4 * d_model),
            activation=_activation(fields, activation),
            vocab_size=fields["vocab_size"],
            max_positions=fields.get("max_position_embeddings", 2048),
            block=_block(fields, new_decoder),
            position="alibi" if fields.get("alibi", False) else "rotary",
            rope_theta=float(_rope_theta(fields)),
            norm_eps=float(fields.get("layer_norm_epsilon", 1e-5)),
            use_bias=bool(fields.get("bias", False)),
            tied_embeddings=bool(fields.get("tie_word_embeddings", True)),
            bos_token_id=_one_id(fields.get("bos_token_id", 11)),
            eos_token_id=_one_id(fields.get("eos_token_id", 11)),
        )
    except KeyError as error:
        raise FalconError(f"config.json has no {error.args[0]!r}") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise FalconError(f"config.json describes no Falcon: {error}") from None


def config_to_hf(config: FalconConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` with which transformers loads a model of this config, its activation written out.

    Args:
      config: the model.
      dtype: name of the weights' dtype, "float32" say.

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


def _activation(fields: Mapping[str, Any], stated: Activation | None) -> Activation:
    found = fields.get("activation")
    if found is None and stated is None:
        raise FalconError(
            "config.json has no `activation` field, and a GELU and a ReLU Falcon look alike: "
            "say which it is with --activation gelu or --activation relu"
        )
    for name in (found, stated):
        if name is not None and name not in _ACTIVATIONS:
            raise FalconError(f"a checkpoint of activation {name!r} cannot be read; known: {', '.join(_ACTIVATIONS)}")
    if None not in (found, stated) and found != stated:
        raise FalconError(
            f"config.json says activation {found!r} and you say {stated!r}: leave yours out, or correct the file if it "
            "is wrong. (To swap a model's activation, load it as it is and use FalconConfig.with_activation.)"
        )
    return found or stated  # type: ignore[return-value]


def _block(fields: Mapping[str, Any], new_decoder: bool) -> Block:
    if fields.get("apply_residual_connection_post_layernorm", False):
        raise FalconError("config.json asks for apply_residual_connection_post_layernorm, which no Falcon uses")
    if not new_decoder:
        return "parallel" if fields.get("parallel_attn", True) else "sequential"
    if not fields.get("parallel_attn", True):
        raise FalconError("config.json says new_decoder_architecture but not parallel_attn; no Falcon is so")
    return "parallel_two_norms" if fields.get("num_ln_in_parallel_attn", 2) == 2 else "parallel"


def _rope_theta(fields: Mapping[str, Any]) -> float:
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise FalconError(f"config.json asks for scaled or partial rotary positions ({rope}), which are not supported")
    return rope.get("rope_theta", fields.get("rope_theta", 10_000.0))


def _one_id(token: Any) -> int:
    if isinstance(token, list):
        if len(token) != 1:
            raise ValueError(f"one token id is expected, not {token}")
        (token,) = token
    return int(token)
