"""`config.json` files of every age against the family table, and back."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falcon_relu.checkpoints.hf_config import config_from_hf, config_to_hf
from falcon_relu.config import FAMILY, FalconConfig, family
from falcon_relu.errors import FalconError

# The architecture fields as the checkpoints' own files have them, those of Falcon's first code included.
PUBLISHED = {
    "falcon-40b": [
        {"model_type": "RefinedWeb", "hidden_size": 8192, "n_head": 128, "n_head_kv": 8, "n_layer": 60,
         "alibi": False, "bias": False, "parallel_attn": True, "vocab_size": 65024, "layer_norm_epsilon": 1e-05},
        {"model_type": "falcon", "hidden_size": 8192, "num_attention_heads": 128, "num_kv_heads": 8, "bias": False,
         "num_hidden_layers": 60, "alibi": False, "multi_query": True, "new_decoder_architecture": True,
         "parallel_attn": True, "rope_scaling": None, "rope_theta": 10000.0, "vocab_size": 65024},
    ],
    "falcon-7b": [
        {"model_type": "RefinedWebModel", "hidden_size": 4544, "n_head": 71, "n_layer": 32, "alibi": False,
         "bias": False, "multi_query": True, "parallel_attn": True, "vocab_size": 65024},
        {"model_type": "falcon", "hidden_size": 4544, "num_attention_heads": 71, "num_kv_heads": 71, "bias": False,
         "num_hidden_layers": 32, "alibi": False, "multi_query": True, "new_decoder_architecture": False,
         "parallel_attn": True, "vocab_size": 65024},
    ],
    "falcon2-11b": [
        {"model_type": "falcon", "hidden_size": 4096, "num_attention_heads": 32, "num_kv_heads": 8, "bias": False,
         "num_hidden_layers": 60, "alibi": False, "multi_query": True, "new_decoder_architecture": True,
         "num_ln_in_parallel_attn": 1, "parallel_attn": True, "ffn_hidden_size": 16384, "activation": "gelu",
         "max_position_embeddings": 8192, "rope_theta": 500042.0, "tie_word_embeddings": False, "vocab_size": 65024},
        {"model_type": "falcon", "hidden_size": 4096, "num_attention_heads": 32, "num_kv_heads": 8,
         "num_hidden_layers": 60, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1,
         "max_position_embeddings": 8192, "rope_parameters": {"rope_theta": 500042.0, "rope_type": "default"},
         "tie_word_embeddings": False, "vocab_size": 65024, "eos_token_id": [11]},
    ],
    "falcon-rw-1b": [
        {"model_type": "falcon", "hidden_size": 2048, "num_attention_heads": 32, "num_hidden_layers": 24,
         "alibi": True, "bias": True, "multi_query": False, "new_decoder_architecture": False,
         "parallel_attn": False, "vocab_size": 50304, "bos_token_id": 1, "eos_token_id": 2},
    ],
}  # fmt: skip
MINIMAL = PUBLISHED["falcon-40b"][1]


@pytest.mark.parametrize(("name", "hf"), [(name, hf) for name, files in PUBLISHED.items() for hf in files])
def test_published_configs_are_the_family(name, hf):
    stated = None if "activation" in hf else "gelu"
    assert config_from_hf(hf, stated) == family(name)
    if stated:
        with pytest.raises(FalconError, match="--activation"):
            config_from_hf(hf)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "not of a Falcon"),
        ({"activation": "gelu_new"}, "activation 'gelu_new' cannot be read"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "scaled or partial rotary"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "scaled or partial rotary"),
        ({"rope_parameters": "long"}, "rope_parameters: input should be an object"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_parameters.rope_theta must be a finite number"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "scaled or partial rotary"),
        ({"partial_rotary_factor": 0.5}, "partial rotary"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "8192"}, "hidden_size: input should be a valid integer, got '8192'"),
        ({"num_hidden_layers": True}, "num_hidden_layers: input should be a valid integer"),
        ({"num_hidden_layers": 10**9}, "n_layers must be an integer from 1 to 4,096"),
        ({"n_layer": 61}, "n_layer and num_hidden_layers contradict"),
        ({"num_kv_heads": 7}, "must be a multiple of n_kv_heads"),
        ({"num_kv_heads": 0}, "n_kv_heads must be an integer from 1"),
        ({"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn: input should be 1 or 2"),
        ({"alibi": "false"}, "alibi: input should be a valid boolean, got 'false'"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon: input should be a valid number, got '1e-5'"),
        ({"layer_norm_epsilon": -1e-5}, "norm_eps must be a number at least 1e-12"),
        ({"rope_theta": 0}, "rope_theta must be a number at least 1"),
        ({"max_position_embeddings": 10**12}, "max_positions must be an integer from 1"),
        ({"parallel_attn": False}, "without parallel_attn"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual"),
        ({"eos_token_id": []}, "eos_token_id is an empty list"),
        ({"eos_token_id": [11, "12"]}, "eos_token_id"),
        ({"eos_token_id": 65024}, "eos_token_id must lie in the vocabulary"),
    ],
)
def test_what_no_falcon_is_gets_refused(change, message):
    with pytest.raises(FalconError, match=message):
        config_from_hf({"activation": "relu"} | MINIMAL | change)


def test_of_several_ids_that_end_a_text_the_first_is_taken():
    assert config_from_hf(MINIMAL | {"eos_token_id": [7, 12]}, "relu").eos_token_id == 7


@st.composite
def configs(draw) -> FalconConfig:
    """Any config that transformers can express."""
    block = draw(st.sampled_from(["parallel", "parallel_two_norms", "sequential"]))
    kv_heads, group = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    if block == "sequential" and kv_heads > 1:
        group = 1
    n_heads = kv_heads * group
    return FalconConfig(
        d_model=n_heads * 8,
        n_layers=draw(st.integers(1, 3)),
        n_heads=n_heads,
        n_kv_heads=kv_heads,
        d_ff=draw(st.integers(1, 99)),
        activation=draw(st.sampled_from(["gelu", "relu", "relu2"])),
        vocab_size=draw(st.integers(20, 99)),
        max_positions=draw(st.integers(1, 99)),
        block=block,
        position=draw(st.sampled_from(["rotary", "alibi"])),
        rope_theta=draw(st.floats(1.0, 1e6)),
        norm_eps=draw(st.floats(1e-8, 1e-3)),
        use_bias=draw(st.booleans()),
        tied_embeddings=draw(st.booleans()),
        bos_token_id=draw(st.integers(0, 19)),
        eos_token_id=draw(st.integers(0, 19)),
    )


@given(configs())
def test_a_config_survives_the_way_out_and_back(config):
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config, "float32")))) == config


@pytest.mark.parametrize("name", FAMILY)
def test_every_member_survives_the_way_out_and_back(name):
    assert config_from_hf(config_to_hf(family(name), "bfloat16")) == family(name)


def test_grouped_sequential_blocks_are_not_of_transformers():
    with pytest.raises(FalconError, match="no sequential Falcon with 2"):
        config_to_hf(family("tiny-rw").replace(n_kv_heads=2), "float32")
