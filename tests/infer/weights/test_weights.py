from __future__ import annotations

import json
import resource
from pathlib import Path

import jax
import numpy as np
import pytest

from falcon_relu.checkpoints import native
from falcon_relu.checkpoints.schema import write_sealed
from falcon_relu.errors import FalconError
from infer.weights import memory, storage
from infer.weights.layout import Formats, weights_from_checkpoint, weights_from_params
from infer.weights.memory import huge_empty
from infer.weights.rounding import quantise
from tests.infer.test_step import covering_predictor, relu_model


def same(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.fixture
def saved(tmp_path):
    config, params = relu_model("tiny-40b")
    weights = weights_from_params(params, config, Formats(mlp="int8", attention="bf16"), covering_predictor(config))
    storage.save_weights(weights, tmp_path / "w")
    return weights, tmp_path / "w"


def test_weights_come_back_bit_for_bit(saved, tiny_name, tmp_path):
    weights, path = saved
    assert same(storage.load_weights(path), weights)
    config, params = relu_model(tiny_name)
    plain = weights_from_params(params, config, Formats.all("f16"))
    storage.save_weights(plain, tmp_path / "plain")
    assert same(storage.load_weights(tmp_path / "plain"), plain)


def test_a_checkpoint_gives_the_same_weights_as_its_parameters(tiny_name, tmp_path):
    config, params = relu_model(tiny_name)
    native.save_params(tmp_path / "m", config, params)
    assert same(
        weights_from_checkpoint(tmp_path / "m", Formats.all("int8")),
        weights_from_params(params, config, Formats.all("int8")),
    )


@pytest.mark.parametrize("position", [40, 600, -5])
def test_a_damaged_file_is_refused(saved, position):
    file = saved[1] / "layer_001.safetensors"
    content = bytearray(file.read_bytes())
    content[position] ^= 0x55
    file.write_bytes(content)
    with pytest.raises(FalconError, match="layer_001"):
        storage.load_weights(saved[1])


def test_what_is_missing_or_of_another_version_is_refused(saved, tmp_path):
    path = saved[1]
    with pytest.raises(FalconError, match="does not exist"):
        storage.load_weights(tmp_path / "nothing")
    file = path / "layer_000.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(FalconError, match="cut short"):
        storage.load_weights(path)
    file.unlink()
    with pytest.raises(FalconError, match="missing"):
        storage.load_weights(path)
    file.write_bytes(whole)
    (path / "layer_002.safetensors").write_bytes(whole)
    with pytest.raises(FalconError, match=r"layer_002\.safetensors is not of the model"):
        storage.load_weights(path)
    manifest = json.loads((path / "decode.json").read_text())
    (path / "decode.json").write_text(json.dumps(manifest | {"version": 99}))
    with pytest.raises(FalconError, match="version 99"):
        storage.load_weights(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["config"].update(rope_theta=0.0), "rope_theta must be a number at least 1"),
        (lambda m: m["config"].update(norm_eps=float("nan")), "norm_eps must be a finite number"),
        (lambda m: m["config"].update(max_positions=10**12), "max_positions must be an integer"),
        (lambda m: m["config"].update(n_layers=1), "ranks must be none or 1"),
        (lambda m: m["config"].update(activation="swish"), "activation"),
        (lambda m: m["config"].update(activation="gelu"), None),
        (lambda m: m["config"].update(position="alibi"), None),
        (lambda m: m.update(predictor_input="foo"), "predictor_input"),
        (lambda m: m.update(predictor_input=None), "contradicts"),
        (lambda m: m.update(ranks=[8]), "ranks must be none or 2"),
        (lambda m: m.update(ranks=[8, 10**9]), "ranks must be none or 2"),
        (lambda m: m["formats"].update(mlp="f64"), "formats.mlp"),
        (lambda m: m["crc32"].popitem(), "checksums and the config contradict each other"),
        (lambda m: m.update(more=1), "more is not known here"),
    ],
)
def test_a_manifest_that_was_changed_is_refused(saved, change, message):
    """By its checksum; and where that was made anew, by its types, ranges and what the files hold."""
    file = saved[1] / "decode.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(FalconError, match="was changed since it was written: its checksum does not match; pack"):
        storage.load_weights(saved[1])
    manifest.pop("checksum")
    write_sealed(file, manifest)
    if message:
        with pytest.raises(FalconError, match=message):
            storage.load_weights(saved[1])


def test_numbers_that_are_not_finite_name_their_tensor():
    config, params = relu_model("tiny-40b")
    params["layers"]["mlp_norm"]["scale"] = params["layers"]["mlp_norm"]["scale"].at[1, 3].set(np.nan)
    with pytest.raises(FalconError, match=r"^layers\.1\.mlp_norm\.scale holds NaN or infinity"):
        weights_from_params(params, config)
    config, params = relu_model("tiny-40b")
    params["layers"]["mlp"]["up"] = params["layers"]["mlp"]["up"].at[0, 3, 5].set(np.inf)
    with pytest.raises(FalconError, match=r"^layers\.0\.mlp\.up: "):
        weights_from_params(params, config)


LIMITS = {
    "the system's": {"meminfo": "MemTotal: 99 kB\nMemAvailable: 10 kB\n"},
    "a container's": {"groups": "0::/\n", "memory.max": "2000000\n", "memory.stat": "anon 1990000\nfile 500000\n"},
    "an outer group's": {
        "groups": "1:cpu:/\n0::/a/b\n",
        "a/memory.max": "2000000\n",
        "a/memory.stat": "anon 1990000\n",
        "a/b/memory.max": "max\n",
        "a/b/memory.stat": "anon 5\n",
    },
    "version 1": {
        "groups": "4:cpu,memory:/of/the/host\n0::/\n",
        "memory/memory.limit_in_bytes": "2000000\n",
        "memory/memory.stat": "rss 5\ntotal_rss 1990000\n",
    },
    "ulimit -v": {},
}


@pytest.mark.parametrize("limit", LIMITS)
def test_too_little_memory_is_said_before_reading(limit, monkeypatch, tmp_path):
    for name, text in LIMITS[limit].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "_CGROUP_ROOT", tmp_path)
    if limit == "ulimit -v":
        pages = int(Path("/proc/self/statm").read_text().split()[0]) + 3
        monkeypatch.setattr(resource, "getrlimit", lambda what: (4096 * pages, 4096 * pages))
    with pytest.raises(FalconError, match="smaller number format"):
        memory.need_memory(20_000, "the weights")
    if limit != "ulimit -v":  # the address space of this process changes meanwhile
        memory.need_memory(9_000, "the weights")


def test_a_kernel_without_huge_pages_gives_ordinary_ones(monkeypatch):
    monkeypatch.setattr(memory.mmap, "MADV_HUGEPAGE", 9999)  # no such advice
    assert huge_empty((3 << 20,), np.uint8).sum() == 0


def test_huge_memory_is_taken_over_by_the_device_without_a_copy():
    for shape in ((3, 5), (1 << 20, 3)):
        array = huge_empty(shape, np.float32)
        assert not array.any()
        array[-1, -1] = 7
        assert jax.device_put(array).unsafe_buffer_pointer() == array.ctypes.data
    rows = quantise(np.ones((4, 8), np.float32), "bf16")
    assert rows.data.ctypes.data % 64 == 0
