"""Our model and transformers' FalconForCausalLM on the same checkpoints."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from falcon_relu.checkpoints.convert import export_hf, import_hf
from falcon_relu.checkpoints.hf_files import TensorReader, read_headers
from falcon_relu.checkpoints.load import load_model
from falcon_relu.config import family
from falcon_relu.generation import Sampling, generate
from falcon_relu.model import Falcon
from tests.conftest import TINY
from tests.falcon_relu.checkpoints.folders import hf_arrays, write_hf

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)  # its threads and ours would fight for the cores

# As the published checkpoints describe themselves, and not through our own `config_to_hf`.
HF_CONFIGS = {
    "tiny-40b": {"new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": True},
    "tiny-7b": {"hidden_size": 48, "num_attention_heads": 3, "num_kv_heads": 3, "multi_query": True},
    "tiny-11b": {
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 1,
        "rope_theta": 500_042.0,
        "tie_word_embeddings": False,
    },
    "tiny-rw": {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
}
LENGTHS = (5, 17, 11)


def hf_model(name: str, activation: str):
    """A FalconForCausalLM with every parameter random, LayerNorms and biases included."""
    fields = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4} | HF_CONFIGS[name]
    config = transformers.FalconConfig(
        vocab_size=512, max_position_embeddings=256, activation=activation, pad_token_id=0, **fields
    )
    model = transformers.FalconForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            std = 0.3 if parameter.ndim == 1 else 1.5 / fields["hidden_size"] ** 0.5
            parameter.normal_(0.0, std, generator=generator)
            if parameter.ndim == 1 and path.endswith("weight"):
                parameter += 1.0
    return model


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("name", TINY)
def test_logits_and_greedy_continuations_equal_those_of_transformers(name, activation, tmp_path):
    theirs = hf_model(name, activation)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    config, params = load_model(tmp_path / "hf")
    assert config == family(name).with_activation(activation)
    ours = Falcon(config)

    rng = np.random.default_rng(0)
    prompts = [rng.integers(12, 512, n).tolist() for n in LENGTHS]
    width = max(LENGTHS)
    for side in ("left", "right"):
        pads = [([0] * (width - len(p)), p) for p in prompts]
        tokens = np.array([a + b if side == "left" else b + a for a, b in pads], np.int32)
        mask = np.array(
            [[0] * len(a) + [1] * len(b) if side == "left" else [1] * len(b) + [0] * len(a) for a, b in pads]
        )
        positions = np.maximum(np.cumsum(mask, 1) - 1, 0).astype(np.int32)
        with torch.no_grad():
            want = theirs(
                input_ids=torch.tensor(tokens).long(),
                attention_mask=torch.tensor(mask),
                position_ids=torch.tensor(positions).long(),
            ).logits.numpy()
        got = np.asarray(jax.jit(ours.apply)({"params": params}, tokens, positions, jnp.asarray(mask, jnp.int32)))
        assert 1 < np.abs(want[mask == 1]).max() < 30
        np.testing.assert_allclose(got[mask == 1], want[mask == 1], atol=1e-4, rtol=0)

    with torch.no_grad():
        tokens = np.array([[0] * (width - len(p)) + p for p in prompts])
        mask = np.array([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        theirs.generation_config.eos_token_id = None
        continued = theirs.generate(
            torch.tensor(tokens), attention_mask=torch.tensor(mask), do_sample=False, max_new_tokens=64
        )[:, width:]
    greedy = generate(ours, params, prompts, Sampling(max_new_tokens=64, temperature=0.0, stop_tokens=()))
    assert greedy == continued.tolist()


@pytest.mark.parametrize("name", TINY)
def test_what_is_exported_is_what_was_imported_and_loads_in_transformers(name, tmp_path):
    theirs = hf_model(name, "relu")
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    import_hf(tmp_path / "hf", tmp_path / "native")
    export_hf(tmp_path / "native", tmp_path / "again", max_shard_bytes=100_000)
    import_hf(tmp_path / "again", tmp_path / "native again")

    loaded, report = transformers.FalconForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.config.activation == "relu"
    assert loaded.dtype == torch.float32
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
    want = theirs.state_dict()
    assert all(torch.equal(x, want[key]) for key, x in loaded.state_dict().items())
    first, second = load_model(tmp_path / "native"), load_model(tmp_path / "native again")
    assert first[0] == second[0]
    jax.tree.map(np.testing.assert_array_equal, first[1], second[1])
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, theirs(tokens).logits)


def test_transformers_too_takes_one_file_before_the_shards_beside_it(tmp_path):
    shards = write_hf(tmp_path / "both", hf_arrays(seed=1), max_shard_bytes=100_000)
    arrays = hf_arrays()
    write_hf(shards, arrays)
    theirs = transformers.FalconForCausalLM.from_pretrained(shards).state_dict()
    ours = TensorReader(read_headers(shards))
    for name, array in arrays.items():
        np.testing.assert_array_equal(ours.read(name), array)
        np.testing.assert_array_equal(theirs[name].numpy(), array)
