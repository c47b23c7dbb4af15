"""Damaged and hostile files of every format, seeded: each is refused in one line, or read as if it were whole.

Formats with checksums of their own may give nothing but the undamaged result. Those of others have none, so that a
changed number may give another one; still nothing but a FalconError may be raised, and nothing may hang or eat memory.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import resource
import shutil
import signal
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from falcon_relu.checkpoints.convert import import_hf
from falcon_relu.checkpoints.digests import digest
from falcon_relu.checkpoints.native import save_params
from falcon_relu.checkpoints.schema import seal
from falcon_relu.config import FalconConfig
from falcon_relu.errors import FalconError
from falcon_relu.files import remove
from infer.predictor.predictor import (
    LayerPredictor,
    import_powerinfer,
    load_predictor,
    save_predictor,
    uncalibrated,
)
from infer.predictor.recording import open_recording
from infer.weights.layout import Formats, weights_from_params
from infer.weights.storage import load_weights, save_weights
from tests.conftest import random_params
from tests.falcon_relu.checkpoints.folders import hf_arrays, numbers, write_hf
from tests.infer.predictor.planted import write_recording

CONFIG = FalconConfig(d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=24, vocab_size=40, activation="relu")
EACH = 40  # damages by chance of one file
SECONDS = 10
SPECIAL = (
    None, True, False, 0, 1, -1, 3, 10**9, 2**31, 2**40, 2**63, 10**30, 1.5, -0.0, 1e300, float("nan"), float("inf"),
    "x", "1e-5", "false", "<i4", "F", "\n\x1b[2J", "../../etc/passwd", "/dev/zero", [], [0], [2**40] * 3, {}, {"": 1},
)  # fmt: skip
METADATA_KEY = "falcon_relu_predictor"


@dataclasses.dataclass
class Case:
    """A folder, how it is read, the file in it that is damaged, and whether its format has checksums."""

    folder: Path
    read: Callable[[Path], Any]
    file: str
    summed: bool


def predictor():
    rng = np.random.default_rng(0)
    D, F = CONFIG.d_model, CONFIG.d_ff
    maps = [(jnp.asarray(rng.normal(size=(4, D))), jnp.asarray(rng.normal(size=(F, 4)))) for _ in range(2)]
    return uncalibrated([LayerPredictor(*pair) for pair in maps], "block_input", [{"recall": 0.5}, {"recall": 0.75}])


def of_predictor(predictor) -> list[Any]:
    arrays = [np.asarray(x).tobytes() for x in jax.tree.leaves(predictor.layers)]
    return [*arrays, predictor.input, predictor.thresholds, predictor.budgets, predictor.measured]


def of_weights(path: Path) -> list[Any]:
    weights = load_weights(path)
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(weights)] + [repr(weights), repr(weights.config)]


def of_recording(path: Path) -> list[Any]:
    recording = open_recording(path)
    recording.check(CONFIG)
    return [x.tobytes() for i in range(recording.n_layers) for x in recording.layer(i)] + [recording.input]


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Case]:
    root = tmp_path_factory.mktemp("whole")
    arrays = hf_arrays(CONFIG)
    hf, shards = write_hf(root / "hf", arrays, CONFIG), write_hf(root / "shards", arrays, CONFIG, 4_000)
    import_hf(hf, root / "converted")
    params = random_params(CONFIG)
    save_params(root / "saved", CONFIG, params)
    save_weights(weights_from_params(params, CONFIG, Formats(mlp="int8"), predictor()), root / "packed")
    (root / "predictor").mkdir()
    save_predictor(predictor(), root / "predictor" / "p.safetensors")
    rng = np.random.default_rng(0)
    write_recording(root / "recording", [(rng.normal(size=(30, 16)), rng.normal(size=(30, 24)) ** 2) for _ in range(2)])
    files = {p.name: digest(p) for p in (root / "recording").iterdir()}
    fields = {"input": "mlp_input", "tokens": 30, "n_layers": 2, "d_model": 16, "d_ff": 24, "heads": 16}
    fields["files"] = files
    (root / "recording" / "recording.json").write_text(json.dumps(seal({"version": 3, **fields})))
    read_predictor = lambda path: of_predictor(load_predictor(path / "p.safetensors", CONFIG))  # noqa: E731
    found = {
        "hf config": Case(hf, numbers, "config.json", False),
        "safetensors": Case(hf, numbers, "model.safetensors", False),
        "index": Case(shards, numbers, "model.safetensors.index.json", False),
        "shard": Case(shards, numbers, sorted(p.name for p in shards.glob("model-*"))[1], False),
        "native manifest": Case(root / "saved", numbers, "falcon.json", True),
        "native metadata": Case(root / "saved", numbers, "params/layers.mlp.up/.zarray", True),
        "native chunk": Case(root / "saved", numbers, "params/layers.mlp.up/1.0.0", True),
        "converted metadata": Case(root / "converted", numbers, "params/layers.attention.qkv/.zarray", True),
        "converted chunk": Case(root / "converted", numbers, "params/embed.embedding/0.0", True),
        "packed manifest": Case(root / "packed", of_weights, "decode.json", True),
        "packed layer": Case(root / "packed", of_weights, "layer_001.safetensors", True),
        "packed ends": Case(root / "packed", of_weights, "ends.safetensors", True),
        "predictor": Case(root / "predictor", read_predictor, "p.safetensors", True),
        "recording manifest": Case(root / "recording", of_recording, "recording.json", True),
        "recorded inputs": Case(root / "recording", of_recording, "001.inputs", True),
    }
    try:
        import torch
    except ImportError:
        return found
    for old in (False, True):
        folder = root / f"bin {old}"
        folder.mkdir()
        shutil.copy(hf / "config.json", folder)
        tensors = {name: torch.from_numpy(x) for name, x in arrays.items()}
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
        found[f"bin {'old' if old else 'new'}"] = Case(folder, numbers, "pytorch_model.bin", False)
    (root / "pt").mkdir()
    for i, layer in enumerate(predictor().layers):
        maps = {"fc1.weight": np.asarray(layer.fc1_RxD), "fc2.weight": np.asarray(layer.fc2_FxR)}
        torch.save({name: torch.from_numpy(x.copy()) for name, x in maps.items()}, root / "pt" / f"model_{i}.pt")
    read_pt = lambda path: of_predictor(import_powerinfer(path, CONFIG))  # noqa: E731
    found["predictor of torch"] = Case(root / "pt", read_pt, "model_1.pt", False)
    return found


# ---- damages: each yields what the file then holds, and whether a checksum made anew hides that it was changed


def bytes_damages(whole: bytes, rng: np.random.Generator) -> Iterator[tuple[bytes, bool]]:
    """Bits flipped, cut short, grown, emptied, overwritten; the first bytes, where sizes are, more often."""
    yield b"", False
    yield whole + b"\0", False
    yield b"\xff" * len(whole), False
    for _ in range(EACH):
        damaged = bytearray(whole)
        at = int(rng.integers(min(len(whole), int(rng.choice([16, 400, 10**9])))))
        match int(rng.integers(5)):
            case 0:
                del damaged[at:]
            case 1:
                damaged[at : at + 8] = bytes(rng.integers(0, 256, 8, np.uint8))[: len(damaged) - at]
            case 2:
                damaged[at : at + 8] = struct.pack("<Q", 2 ** int(rng.integers(64)))[: len(damaged) - at]
            case _:
                damaged[at] ^= 1 << int(rng.integers(8))
        yield bytes(damaged), False


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Where in parsed JSON there is something, the whole included."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inside:
        yield from places(part, (*path, key))


def nearly(value: Any, beside: Any, rng: np.random.Generator) -> Any:
    """Something as valid as `value`, as far as its type goes."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1 if rng.integers(2) else value * 2
    values = list(beside.values() if isinstance(beside, dict) else beside)
    return values[int(rng.integers(len(values)))]


def changed(value: Any, rng: np.random.Generator) -> Any:
    """Parsed JSON with one part dropped, renamed, or of another value."""
    value = copy.deepcopy(value)
    every = list(places(value))[1:]
    shallow = [path for path in every if len(path) <= 2]
    some = shallow if rng.integers(2) else every
    path = some[int(rng.integers(len(some)))]
    inside = value
    for key in path[:-1]:
        inside = inside[key]
    match int(rng.integers(6)):
        case 0:
            del inside[path[-1]]
        case 1 if isinstance(inside, dict):
            inside[f"{path[-1]}x"] = inside.pop(path[-1])
        case 2 | 3:
            inside[path[-1]] = nearly(inside[path[-1]], inside, rng)
        case _:
            inside[path[-1]] = SPECIAL[int(rng.integers(len(SPECIAL)))]
    return value


def json_damages(whole: bytes, rng: np.random.Generator) -> Iterator[tuple[bytes, bool]]:
    value = json.loads(whole)
    for nonsense in (b"null", b"[]", b"3", b'"x"', b"[" * 5000, b"\xff\xfe", b'{"a":' * 2000):
        yield nonsense, False
    for _ in range(EACH):
        yield json.dumps(changed(value, rng)).encode(), False
    if "checksum" in value:
        del value["checksum"]
        for _ in range(2 * EACH):
            yield json.dumps(seal(changed(value, rng))).encode(), True


def header_damages(whole: bytes, rng: np.random.Generator) -> Iterator[tuple[bytes, bool]]:
    """A safetensors file with something in its header changed."""
    (size,) = struct.unpack("<Q", whole[:8])
    header, data = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    for _ in range(EACH):
        hidden = bool(rng.integers(2)) and METADATA_KEY in header.get("__metadata__", {})
        if hidden:
            stored = json.loads(header["__metadata__"][METADATA_KEY])
            del stored["checksum"]
            text = json.dumps(seal(changed(stored, rng)))
            made = json.dumps(header | {"__metadata__": {METADATA_KEY: text}}).encode()
        else:
            made = json.dumps(changed(header, rng)).encode()
        yield struct.pack("<Q", len(made)) + made + data, hidden


@pytest.fixture
def limited():
    """Ends what takes too long, rather than the whole run."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"over {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def outcome(case: Case, folder: Path, note: str) -> Any:
    """What reading gives; the refusal, if it is one."""
    signal.alarm(SECONDS)
    try:
        return case.read(folder)
    except FalconError as error:
        refusal = error
    finally:
        signal.alarm(0)
    assert str(refusal).isprintable(), f"{note}: {refusal!r}"
    return refusal


NAMES = (
    "hf config", "safetensors", "index", "shard", "native manifest", "native metadata", "native chunk",
    "converted metadata", "converted chunk", "packed manifest", "packed layer", "packed ends", "predictor",
    "recording manifest", "recorded inputs", "bin new", "bin old", "predictor of torch",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_is_refused_or_harmless(name, cases, limited, tmp_path):
    if name not in cases:
        pytest.skip("torch is not installed")
    case, rng = cases[name], np.random.default_rng(NAMES.index(name))
    folder = tmp_path / "f"
    shutil.copytree(case.folder, folder)
    path = folder / case.file
    whole, expected = path.read_bytes(), case.read(folder)
    damages = [*bytes_damages(whole, rng)]
    if path.suffix == ".json" or path.name == ".zarray":
        damages += json_damages(whole, rng)
    elif path.suffix == ".safetensors":
        damages += header_damages(whole, rng)
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, (damaged, hidden) in enumerate(damages):
            path.write_bytes(damaged)
            note = f"{name} {number}: {damaged[:200]!r}"
            found = outcome(case, folder, note)
            refused += isinstance(found, FalconError)
            assert isinstance(found, FalconError) or not case.summed or hidden or found == expected, note
        path.write_bytes(whole)
        assert case.read(folder) == expected
        for make in (os.mkfifo, Path.mkdir, lambda p: p.symlink_to("/dev/zero"), lambda p: p.symlink_to(p.name)):
            remove(path)
            assert isinstance(outcome(case, folder, name), FalconError)
            make(path)
            assert isinstance(outcome(case, folder, name), FalconError)
    assert refused > len(damages) / 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 << 20  # KiB, with JAX, torch and all earlier tests
