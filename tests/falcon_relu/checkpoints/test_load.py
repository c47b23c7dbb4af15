"""Checkpoints in and out without transformers: what is written is what is read, and what is damaged is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import orbax.checkpoint.experimental.v1 as ocp_v1
import pytest
from huggingface_hub import constants as hub_constants
from safetensors.numpy import load_file, save_file

from falcon_relu.checkpoints import native
from falcon_relu.checkpoints.convert import export_hf, import_hf
from falcon_relu.checkpoints.digests import digest
from falcon_relu.checkpoints.hf_config import config_to_hf
from falcon_relu.checkpoints.hf_files import write_shards
from falcon_relu.checkpoints.hf_layout import HEAD, hf_tensors
from falcon_relu.checkpoints.load import load_model
from falcon_relu.checkpoints.native import save_params
from falcon_relu.checkpoints.schema import write_sealed
from falcon_relu.cli import main
from falcon_relu.config import FalconConfig, family
from falcon_relu.errors import FalconError
from falcon_relu.files import aside_path
from falcon_relu.sharding import make_mesh, param_shardings
from tests.conftest import random_params

INDEX = "model.safetensors.index.json"


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def hf_folder(path: Path, name: str = "tiny-40b", dtype: str | None = None, max_shard_bytes: int = 10**9):
    """A checkpoint in the Hugging Face layout, and the config and parameters in it."""
    config = family(name).with_activation("relu")
    params = random_params(config)
    save_params(path.with_name("source"), config, params)
    export_hf(path.with_name("source"), path, dtype=dtype, max_shard_bytes=max_shard_bytes)
    return config, params


def edit_json(path: Path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("name", ["tiny-11b", "tiny-rw"])
def test_saved_parameters_come_back_on_any_mesh(name, tmp_path):
    config = family(name)
    params = random_params(config)
    mesh = make_mesh((1, 4, 2))
    shardings = param_shardings(config, mesh)
    save_params(tmp_path / "sharded", config, jax.device_put(params, shardings))
    save_params(tmp_path / "plain", config, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))

    for target in (None, mesh):
        loaded_config, loaded = load_model(tmp_path / "sharded", mesh=target)
        assert loaded_config == config
        assert_equal(loaded, params)
    assert jax.tree.map(lambda x: x.sharding, loaded) == shardings
    _, rounded = load_model(tmp_path / "plain", dtype=None)
    assert_equal(rounded, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    assert_equal(load_model(tmp_path / "plain")[1], jax.tree.map(lambda x: x.astype(jnp.float32), rounded))

    with pytest.raises(FalconError, match="exists already"):
        save_params(tmp_path / "plain", config, params)
    with pytest.raises(ValueError, match="config wants"):
        save_params(tmp_path / "other", config.replace(d_ff=128), params)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["plain", "sharded"]


def test_a_checkpoint_streams_onto_a_mesh_and_to_disk_alike(tiny_name, tmp_path, monkeypatch):
    config, params = hf_folder(tmp_path / "hf", tiny_name, max_shard_bytes=100_000)
    mesh = make_mesh((1, 4, 2))
    loaded_config, loaded = load_model(tmp_path / "hf", mesh=mesh)
    assert loaded_config == config
    assert_equal(loaded, params)
    assert jax.tree.map(lambda x: x.sharding, loaded) == param_shardings(config, mesh)

    monkeypatch.setattr(native, "_CHUNK_BYTES", 5000)  # several files a layer
    import_hf(tmp_path / "hf", tmp_path / "native")
    assert len(list((tmp_path / "native" / "params" / "layers.mlp.up").glob("0.*"))) > 1
    for target in (None, mesh):
        assert_equal(load_model(tmp_path / "native", mesh=target)[1], params)
    with ocp.StandardCheckpointer() as plain_orbax:
        assert_equal(plain_orbax.restore(tmp_path / "native" / "params"), params)
    assert_equal(ocp_v1.load(tmp_path / "native" / "params"), params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_bin_shards_equal_safetensors_in_every_dtype(dtype, tmp_path):
    torch = pytest.importorskip("torch")
    _, params = hf_folder(tmp_path / "hf", "tiny-rw", dtype, max_shard_bytes=100_000)
    index = json.loads((tmp_path / "hf" / INDEX).read_text())
    (tmp_path / "bin").mkdir()
    shutil.copy(tmp_path / "hf" / "config.json", tmp_path / "bin")
    for file in set(index["weight_map"].values()):
        tensors = {name: torch.tensor(x.astype(np.float32)) for name, x in load_file(tmp_path / "hf" / file).items()}
        tensors = {name: x.to(getattr(torch, dtype)) for name, x in tensors.items()}
        torch.save(tensors, tmp_path / "bin" / file.replace(".safetensors", ".bin"))
    index["weight_map"] = {name: file.replace(".safetensors", ".bin") for name, file in index["weight_map"].items()}
    (tmp_path / "bin" / "pytorch_model.bin.index.json").write_text(json.dumps(index))

    import_hf(tmp_path / "bin", tmp_path / "native")
    rounded = jax.tree.map(lambda x: x.astype(dtype), params)
    for source in ("hf", "bin", "native"):
        _, stored = load_model(tmp_path / source, dtype=None)
        assert {x.dtype for x in jax.tree.leaves(stored)} == {jnp.dtype(dtype)}
        assert_equal(stored, rounded)
    assert_equal(load_model(tmp_path / "bin")[1], jax.tree.map(lambda x: x.astype(jnp.float32), rounded))


def test_a_bin_file_runs_no_code(tmp_path):
    torch = pytest.importorskip("torch")
    hf_folder(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()

    class Malice:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "code ran"),)

    torch.save({"transformer.ln_f.bias": Malice()}, tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(FalconError, match=r"pytorch_model\.bin is not a plain torch weights file"):
        load_model(tmp_path / "hf")
    assert not (tmp_path / "code ran").exists()


QKV = "transformer.h.1.self_attention.query_key_value.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(QKV), f"lacks {QKV}"),
        (lambda t: t.update(extra=np.zeros(3, np.float32)), "does not ask for: extra"),
        (lambda t: t.update({QKV: t[QKV][:-1]}), r"query_key_value.weight is \[127, 64\] instead of \[128, 64\]"),
        (lambda t: t.update({QKV: t[QKV].astype(np.float64)}), "dtype F64"),
        (lambda t: t.update({HEAD: t["transformer.word_embeddings.weight"] + 1}), "lm_head.weight differs"),
    ],
)
def test_wrong_tensors_are_named(change, message, tmp_path):
    hf_folder(tmp_path / "hf")
    edit_tensors(tmp_path / "hf" / "model.safetensors", change)
    with pytest.raises(FalconError, match=message):
        load_model(tmp_path / "hf")
    with pytest.raises(FalconError, match=message):
        import_hf(tmp_path / "hf", tmp_path / "native")
    assert not list(tmp_path.glob("native*"))


def test_the_head_of_a_tied_checkpoint_and_old_buffers_are_accepted(tmp_path):
    _, params = hf_folder(tmp_path / "hf")

    def change(tensors):
        tensors[HEAD] = tensors["transformer.word_embeddings.weight"].copy()
        tensors["transformer.h.0.self_attention.maybe_rotary.inv_freq"] = np.ones(8, np.float32)
        tensors["transformer.h.1.self_attention.rotary_emb.inv_freq"] = np.ones(8, np.float32)

    edit_tensors(tmp_path / "hf" / "model.safetensors", change)
    assert_equal(load_model(tmp_path / "hf")[1], params)


def test_an_index_cannot_lead_astray(tmp_path):
    hf_folder(tmp_path / "hf", max_shard_bytes=100_000)
    path = tmp_path / "hf" / INDEX
    good = json.loads(path.read_text())["weight_map"]
    name, file = next((n, f) for n, f in good.items() if list(good.values()).count(f) > 1)
    other = next(x for x in good.values() if x != file)
    shutil.copy(tmp_path / "hf" / file, tmp_path / "outside.safetensors")
    for wrong in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "config.json", ".."):
        edit_json(path, weight_map=good | {name: wrong})
        with pytest.raises(FalconError, match=r"which is not a \.safetensors file beside it"):
            load_model(tmp_path / "hf")
    edit_json(path, weight_map=good | {name: other})
    with pytest.raises(FalconError, match=f"the index has {name} in {other}, but it is in {file}"):
        load_model(tmp_path / "hf")
    edit_json(path, weight_map=good | {name: "model-99999.safetensors"})
    with pytest.raises(FalconError, match="does not exist"):
        load_model(tmp_path / "hf")
    edit_json(path, weight_map=good)
    tensor = load_file(tmp_path / "hf" / file)[name]
    edit_tensors(tmp_path / "hf" / other, lambda tensors: tensors.update({name: tensor}))
    with pytest.raises(FalconError, match=f"{name} is stored twice"):
        load_model(tmp_path / "hf")


@pytest.mark.parametrize("damage", [lambda b: b[:-7], lambda b: b[:20], lambda b: b"", lambda b: b"\xff" * len(b)])
def test_damaged_safetensors_are_refused(damage, tmp_path):
    hf_folder(tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FalconError, match="damaged or cut short"):
        load_model(tmp_path / "hf")


def test_a_header_that_repeats_a_tensor_is_refused(tmp_path):
    hf_folder(tmp_path / "hf")
    part = '"a":{"dtype":"F16","shape":[1],"data_offsets":[%d,%d]}'
    header = ("{" + part % (0, 2) + "," + part % (2, 4) + "}").encode()
    (tmp_path / "hf" / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(FalconError, match="damaged"):
        load_model(tmp_path / "hf")


def test_native_weights_with_a_part_gone_are_refused(tmp_path):
    config = family("tiny-7b")
    save_params(tmp_path / "native", config, random_params(config))
    chunk = tmp_path / "native" / "params" / "layers.mlp.up" / "1.0.0"
    whole = chunk.read_bytes()
    chunk.unlink()
    with pytest.raises(FalconError, match=r"layers\.mlp\.up/1\.0\.0 does not exist"):
        load_model(tmp_path / "native")
    for damage in (whole[:-20], whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:]):
        chunk.write_bytes(damage)
        for read in (load_model, lambda path: export_hf(path, tmp_path / "hf")):
            with pytest.raises(FalconError, match=r"layers\.mlp\.up/1\.0\.0 is damaged"):
                read(tmp_path / "native")
    manifest = json.loads((tmp_path / "native" / "falcon.json").read_text())
    for old in (1, 3):
        edit_json(tmp_path / "native" / "falcon.json", format=old)
        with pytest.raises(FalconError, match=f"of format {old}, and this program reads 2; convert or save"):
            load_model(tmp_path / "native")
    (tmp_path / "native" / "falcon.json").write_text(json.dumps(manifest))
    shutil.rmtree(tmp_path / "native" / "params" / "embed.embedding")
    with pytest.raises(FalconError, match="does not exist"):
        load_model(tmp_path / "native")
    assert not list(tmp_path.glob("hf*"))


def test_native_metadata_are_held_against_the_config_before_any_array_is_read(tmp_path):
    """Even where the checksums agree, as in a folder made to harm: TensorStore ends the process at chunks of 2^40."""
    config = family("tiny-7b")
    path = tmp_path / "native"
    save_params(path, config, random_params(config))
    metadata, manifest = path / "params" / "layers.mlp.up" / ".zarray", path / "falcon.json"
    good, stored = json.loads(metadata.read_text()), json.loads(manifest.read_text())
    stored.pop("checksum")
    for change, message in (
        ({"dtype": "<i4"}, "dtype: input should be '<f4', '<f2' or 'bfloat16', got '<i4'"),
        ({"order": "F"}, "order: input should be 'C'"),
        ({"chunks": [1, 2**40, 2**40]}, "do not fit an array"),
        ({"chunks": [1, 0, 48]}, "do not fit an array"),
        ({"chunks": [2, 192, 48]}, "checksums are not those of the array's 1 files"),
        ({"chunks": [1, 192]}, "do not fit an array"),
        ({"shape": [2, 192, 47]}, "but the config wants"),
        ({"filters": [{"id": "delta"}]}, "filters"),
        ({"compressor": None}, "which cannot hold a chunk of"),
        ({"zarr_format": 3}, "zarr_format"),
    ):
        metadata.write_text(json.dumps(good | change))
        with pytest.raises(FalconError, match=r"\.zarray is damaged"):
            load_model(path)
        arrays = stored["arrays"] | {"layers.mlp.up": stored["arrays"]["layers.mlp.up"] | {".zarray": digest(metadata)}}
        write_sealed(manifest, stored | {"arrays": arrays})
        with pytest.raises(FalconError, match=message):
            load_model(path)
        write_sealed(manifest, stored)


def test_the_activation_is_stated_or_asked_for(tmp_path):
    config, _ = hf_folder(tmp_path / "hf")
    with pytest.raises(FalconError, match=r"has activation 'relu' and 'gelu' was given"):
        load_model(tmp_path / "hf", activation="gelu")
    edit_json(tmp_path / "hf" / "config.json", activation=None)
    with pytest.raises(FalconError, match="--activation gelu or --activation relu"):
        load_model(tmp_path / "hf")
    assert load_model(tmp_path / "hf", activation="relu")[0] == config
    shifted = family("tiny-7b").with_activation("shifted_relu", 0.5)
    save_params(tmp_path / "shifted", shifted, random_params(shifted))
    with pytest.raises(FalconError, match="no shifted ReLU"):
        export_hf(tmp_path / "shifted", tmp_path / "out")


def test_values_beyond_float16_are_refused(tmp_path):
    config = family("tiny-7b")
    params = random_params(config)
    params["final_norm"]["scale"] = params["final_norm"]["scale"].at[3].set(1e5)
    save_params(tmp_path / "native", config, params)
    with pytest.raises(FalconError, match=r"transformer\.ln_f\.weight has values beyond the range of float16"):
        export_hf(tmp_path / "native", tmp_path / "hf", dtype="float16")
    assert not list(tmp_path.glob("hf*"))
    export_hf(tmp_path / "native", tmp_path / "hf", dtype="bfloat16")


def test_a_hub_id_comes_from_the_cache_or_fails_clearly_when_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(FalconError, match="nobody/nothing is not a folder, and cannot be downloaded from the hub"):
        load_model("nobody/nothing")
    with pytest.raises(FalconError, match="neither a folder nor the id"):
        load_model(tmp_path / "missing" / "folder")
    commit = "0" * 40
    snapshot = tmp_path / "cache" / "models--some--falcon" / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    config, params = hf_folder(snapshot, max_shard_bytes=100_000)
    for source in ("some/falcon", f"some/falcon@{commit}"):
        loaded_config, loaded = load_model(source)
        assert loaded_config == config
        assert_equal(loaded, params)


def test_the_commands_convert_and_export(tmp_path, capsys):
    config, params = hf_folder(tmp_path / "hf")
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    native, out, figures = (str(tmp_path / name) for name in ("native", "out", "figures.json"))
    assert main(["convert", str(tmp_path / "hf"), native, "--dtype", "bfloat16", "--json", figures]) == 0
    assert json.loads(Path(figures).read_text())["parameters"] == config.n_params
    assert main(["export", native, out, "--tokenizer", str(tokenizer.parent), "--max-shard-gb", "0.0002"]) == 0
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert_equal(load_model(out)[1], jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params))
    assert main(["export", native, out]) == 1
    assert "exists already" in " ".join(capsys.readouterr().err.split())
    assert main(["convert", native]) == 2


def big_checkpoint(path: Path, layers: int, max_shard_bytes: int) -> int:
    """A checkpoint of 10 MB a layer; returns the bytes of its largest file."""
    config = FalconConfig(d_model=512, n_layers=layers, n_heads=8, n_kv_heads=2, d_ff=2048, vocab_size=512)
    tensors = hf_tensors(config)
    sizes = {name: 4 * int(np.prod(tensor.shape)) for name, tensor in tensors.items()}
    path.mkdir()
    write_shards(path, sizes, lambda name: np.full(tensors[name].shape, 0.5, np.float32), max_shard_bytes)
    (path / "config.json").write_text(json.dumps(config_to_hf(config, "float32")))
    return max(file.stat().st_size for file in path.glob("*.safetensors"))


MEASURE = r"""
import re, sys
from pathlib import Path
from falcon_relu.checkpoints.convert import export_hf, import_hf
def peak():
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
peaks = []
for source, native, out in (sys.argv[1:4], sys.argv[4:7]):
    import_hf(source, Path(native))
    peaks.append(peak())
    export_hf(Path(native), Path(out), max_shard_bytes=int(sys.argv[7]))
    peaks.append(peak())
print(peaks[2] - peaks[1], peaks[3] - peaks[1])
"""
CONSTANT = 100 * 10**6


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_host_memory_is_bounded_by_the_largest_shard(tmp_path):
    big_checkpoint(tmp_path / "warm", 1, 10**9)
    growth = {}
    for layers, shards in ((12, 1), (12, 6), (36, 18)):
        shard_bytes = layers * 11 * 10**6 // shards
        path = tmp_path / f"{layers}x{shards}"
        largest = big_checkpoint(path, layers, shard_bytes)
        ways = [str(path.with_name(path.name + suffix)) for suffix in ("", " native", " out")]
        warm = [str(tmp_path / name) for name in ("warm", path.name + " warm native", path.name + " warm out")]
        command = [sys.executable, "-c", MEASURE, *warm, *ways, str(shard_bytes)]
        importing, exporting = map(int, subprocess.run(command, check=True, capture_output=True).stdout.split())
        assert importing < largest + CONSTANT
        assert exporting < largest + CONSTANT
        growth[layers, shards] = importing
        shutil.rmtree(ways[0])
        shutil.rmtree(ways[1])
        shutil.rmtree(ways[2])
    assert growth[12, 6] < growth[12, 1] - 50 * 10**6
    assert growth[36, 18] < growth[12, 6] + 50 * 10**6  # three times the model, shards as large


CONVERT = (
    "import sys; from pathlib import Path; from falcon_relu.checkpoints.convert import import_hf; "
    "import_hf(sys.argv[1], Path(sys.argv[2]))"
)


def test_a_killed_conversion_leaves_nothing_that_looks_finished(tmp_path):
    big_checkpoint(tmp_path / "hf", 12, 20 * 10**6)
    out = tmp_path / "native"
    process = subprocess.Popen(
        [sys.executable, "-c", CONVERT, str(tmp_path / "hf"), str(out)], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (aside_path(out) / "params" / "layers.mlp.up" / "2.0.0").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    with pytest.raises(FalconError):
        load_model(aside_path(out))
    import_hf(tmp_path / "hf", out)
    assert all((leaf == 0.5).all() for leaf in jax.tree.leaves(load_model(out)[1]))
    assert [path for path in tmp_path.iterdir() if path.name != "hf"] == [out]


PROCESS = """
import sys
from pathlib import Path
import jax
import numpy as np
jax.config.update("jax_num_cpu_devices", 2)
rank, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", 2, rank)
from falcon_relu.checkpoints.digests import digest
from falcon_relu.checkpoints.load import load_model
from falcon_relu.checkpoints.native import save_params
from falcon_relu.sharding import make_mesh
from falcon_relu.checkpoints import hf_files, native
mesh = make_mesh((1, 2, 2))
nbytes, files = [], []
read_part, read_file = hf_files.TensorReader.read, native.read_checked
def noted_part(self, name, part=None):
    nbytes.append(read_part(self, name, part).nbytes)
    return read_part(self, name, part)
def noted_file(path, *more):
    files.append(path)
    return read_file(path, *more)
hf_files.TensorReader.read, native.read_checked = noted_part, noted_file
config, params = load_model(folder / "hf", mesh=mesh)
whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
assert sum(nbytes) < 0.51 * whole, (sum(nbytes), whole)  # the half of each matrix, and the norms
save_params(folder / "native", config, params)
_, again = load_model(folder / "native", mesh=mesh)
chunks = [path for path in files if path.name[0] != "."]
stored = [path for path in (folder / "native" / "params").glob("*.*/[0-9]*")]
size = lambda paths: sum(path.stat().st_size for path in paths)
assert len(chunks) == len(set(chunks)) < len(stored), (len(chunks), len(stored))  # each once
assert size(chunks) < 0.53 * size(stored), (size(chunks), size(stored))
for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
    assert one.sharding == other.sharding
    for mine, same in zip(one.addressable_shards, other.addressable_shards, strict=True):
        np.testing.assert_array_equal(mine.data, same.data)
"""


def test_two_processes_load_and_save_together(tmp_path):
    _, params = hf_folder(tmp_path / "hf", max_shard_bytes=100_000)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", PROCESS]
    processes = [subprocess.Popen([*command, str(rank), port, str(tmp_path)]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert_equal(load_model(tmp_path / "native")[1], params)
    assert not list(tmp_path.glob("native?*"))
