"""Checkpoints as others write them: what is sound is read as transformers reads it, what is not is refused by name."""

from __future__ import annotations

import json
import os
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from falcon_relu.checkpoints.convert import import_hf
from falcon_relu.checkpoints.hf_config import config_to_hf
from falcon_relu.checkpoints.hf_layout import EMBEDDING, HEAD
from falcon_relu.checkpoints.load import load_config
from falcon_relu.config import family
from falcon_relu.errors import FalconError
from tests.falcon_relu.checkpoints.folders import CONFIG, hf_arrays, numbers, write_hf

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize", "ignore:TypedStorage")

NORM = "transformer.h.1.ln_mlp.weight"


def write_bin(folder, arrays, config=CONFIG, **options):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_to_hf(config, "float32")))
    tensors = {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in arrays.items()}
    torch.save(tensors, folder / "pytorch_model.bin", **options)
    return folder


@pytest.fixture
def plain(tmp_path):
    """A checkpoint and what is in it."""
    folder = write_hf(tmp_path / "plain", hf_arrays())
    return folder, numbers(folder)


def test_a_bin_file_in_torchs_old_format_is_read(tmp_path, plain):
    for old in (True, False):
        folder = write_bin(tmp_path / f"{old}", hf_arrays(), _use_new_zipfile_serialization=not old)
        assert numbers(folder) == plain[1]


def test_a_tied_matrix_is_read_under_either_name(tmp_path, plain):
    arrays = hf_arrays()
    arrays[HEAD] = arrays.pop(EMBEDDING)
    assert numbers(write_hf(tmp_path / "head", arrays)) == plain[1]
    assert numbers(write_hf(tmp_path / "shards", arrays, max_shard_bytes=100_000)) == plain[1]
    untied = CONFIG.replace(tied_embeddings=False)
    with pytest.raises(FalconError, match=f"the checkpoint lacks {EMBEDDING}"):
        numbers(write_hf(tmp_path / "untied", arrays, untied))


def test_an_index_may_list_a_tied_head_that_no_shard_has(tmp_path, plain):
    folder = write_hf(tmp_path / "hf", hf_arrays(), max_shard_bytes=100_000)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][HEAD] = index["weight_map"][EMBEDDING]
    path.write_text(json.dumps(index))
    assert numbers(folder) == plain[1]
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False})
    )
    with pytest.raises(FalconError, match=f"lacks {HEAD}"):
        numbers(folder)


def test_a_tied_head_may_be_stored_in_another_dtype(tmp_path):
    arrays = hf_arrays(dtype=ml_dtypes.bfloat16)
    expected = numbers(write_hf(tmp_path / "alone", arrays))
    head = arrays[EMBEDDING].astype(np.float32)
    assert numbers(write_hf(tmp_path / "both", arrays | {HEAD: head})) == expected
    head[3, 4] = np.nextafter(head[3, 4], np.float32(9))
    with pytest.raises(FalconError, match=f"{HEAD} differs from {EMBEDDING}"):
        numbers(write_hf(tmp_path / "other", arrays | {HEAD: head}))


def test_one_file_beside_an_index_of_others_is_used_as_transformers_does_and_said(tmp_path, plain, capsys):
    folder = write_hf(tmp_path / "hf", hf_arrays(seed=1), max_shard_bytes=100_000)
    other = numbers(folder)
    shutil.copy(plain[0] / "model.safetensors", folder)
    capsys.readouterr()
    assert numbers(folder) == plain[1] != other
    assert "model.safetensors is used, as transformers does; the shards that" in capsys.readouterr().err
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NORM: "model.safetensors"}}))
    numbers(folder)
    assert "is used" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({3: torch.zeros(2)}, "an entry '3' where the name of a tensor is expected"),
        ({("a", "b"): torch.zeros(2)}, "where the name of a tensor is expected"),
        ({"a\nb": torch.zeros(2)}, "does not ask for: a b"),
        ({NORM: torch.empty(64, device="meta")}, f"'{NORM}' is a tensor without numbers"),
        ({NORM: torch.ones(64).to_sparse()}, f"'{NORM}' is a tensor without numbers, or not a dense one"),
        (lambda: {NORM: torch.quantize_per_tensor(torch.ones(64), 0.1, 0, torch.qint8)}, "not a dense one"),
        ({NORM: torch.ones(64, dtype=torch.int32)}, "is of dtype int32"),
        ({NORM: torch.ones(64, dtype=torch.float64)}, "is of dtype float64"),
        ({NORM: {"weight": torch.ones(64)}}, f"'{NORM}' is no tensor"),
        ({NORM: 3}, f"'{NORM}' is no tensor"),
        ({NORM: torch.full((64,), torch.nan)}, f"{NORM} holds NaN or infinity"),
        ({NORM: torch.ones(1).expand(10**9)}, f"{NORM} is .* instead of"),
    ],
)
def test_what_no_weights_file_should_hold_is_refused_by_name(tmp_path, change, message):
    folder = write_bin(tmp_path / "hf", hf_arrays() | (change() if callable(change) else change))
    with pytest.raises(FalconError, match=message) as error:
        numbers(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_number_that_is_not_finite_names_its_tensor(tmp_path, dtype):
    for name, value in ((NORM, np.nan), ("transformer.h.0.mlp.dense_4h_to_h.weight", -np.inf), (EMBEDDING, np.inf)):
        arrays = hf_arrays(dtype=dtype)
        arrays[name].flat[-1] = value
        folder = write_hf(tmp_path / name, arrays)
        with pytest.raises(FalconError, match=f"{name} holds NaN or infinity"):
            numbers(folder)
    with pytest.raises(FalconError, match="holds NaN or infinity"):
        import_hf(folder, tmp_path / "native")
    assert not (tmp_path / "native").exists()


def test_what_is_no_regular_file_is_refused_before_it_is_read(tmp_path):
    def zeros(path):
        path.symlink_to("/dev/zero")

    def loop(path):
        path.symlink_to(path.name)

    def pipe(path):
        os.mkfifo(path)

    kinds = (
        (zeros, "not a regular file"), (pipe, "not a regular file"), (loop, "cannot be read|is a link to nothing"),
        (lambda path: path.mkdir(), "is a folder, not a file"), (lambda path: path.symlink_to("no"), "link to nothing"),
    )  # fmt: skip
    for number, (make, message) in enumerate(kinds):
        for kind, pattern in (
            ("one", "config.json"), ("one", "model.safetensors"), ("bin", "pytorch_model.bin"),
            ("shards", "model-00001*"), ("shards", "model.safetensors.index.json"),
        ):  # fmt: skip
            folder = tmp_path / f"{number} {kind} {pattern}"
            if kind == "bin":
                write_bin(folder, hf_arrays())
            else:
                write_hf(folder, hf_arrays(), max_shard_bytes=10**9 if kind == "one" else 150_000)
            (path,) = folder.glob(pattern)
            path.unlink()
            make(path)
            with pytest.raises(FalconError, match=message):
                numbers(folder)


def test_a_file_in_place_of_a_folder_gets_its_own_advice(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(hf_arrays(), file)
    with pytest.raises(FalconError, match="is not a folder; give the folder that holds the checkpoint"):
        numbers(file)
    tmp_path.joinpath("empty").mkdir()
    with pytest.raises(FalconError, match="holds no model"):
        load_config(tmp_path / "empty")


def test_the_family_still_reads(tmp_path, tiny_name):
    config = family(tiny_name)
    assert len(numbers(write_hf(tmp_path / "hf", hf_arrays(config), config))) > 10
