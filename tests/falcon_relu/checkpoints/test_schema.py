"""What is not exactly of its declared type is refused by name; what was sealed and changed is too."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from falcon_relu.checkpoints.schema import parse, read_sealed, seal, unseal, write_sealed
from falcon_relu.config import FalconConfig, family
from falcon_relu.errors import FalconError


@dataclasses.dataclass(frozen=True)
class Manifest:
    config: FalconConfig
    numbers: tuple[float, ...]
    folder: Path | None = None


GOOD = {"config": dataclasses.asdict(family("tiny-40b")), "numbers": [1, 2.5]}


def config(**changes):
    return {"config": GOOD["config"] | changes}


def test_a_manifest_becomes_its_dataclass():
    assert parse(Manifest, GOOD, "f") == Manifest(family("tiny-40b"), (1.0, 2.5))
    assert parse(Manifest, GOOD | {"folder": "a/b", "more": 3}, "f", unknown_keys=True).folder == Path("a/b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (config(n_layers=10**9), "f: FalconConfig.n_layers must be an integer from 1 to 4,096, got 1000000000"),
        (config(n_layers="2"), "f: config.n_layers: input should be a valid integer, got '2'"),
        (config(n_layers=2.0), "f: config.n_layers: input should be a valid integer"),
        (config(use_bias=0), "f: config.use_bias: input should be a valid boolean, got 0"),
        (config(rope_theta=float("nan")), "f: config.rope_theta must be a finite number"),
        (config(rope_theta=-1), "f: FalconConfig.rope_theta must be a number at least 1"),
        (config(norm_eps="1e-5"), "f: config.norm_eps: input should be a valid number, got '1e-5'"),
        (config(position="foo"), "f: config.position: input should be 'rotary' or 'alibi'"),
        (config(wings=2), "f: config.wings is not known here"),
        ({"config": 3}, "f: config: input should be an object, got 3"),
        ({"numbers": [1, None]}, r"f: numbers.1: input should be a valid number"),
        ({"numbers": [1e999]}, r"f: numbers.0 must be a finite number"),
        ({"folder": ["x" * 100]}, r"f: folder: .*, got \['x{40,60}\.\.\."),
        ({"folder": "\ud800"}, "f: "),
    ],
)
def test_what_is_not_of_its_type_is_refused_by_name(change, message):
    with pytest.raises(FalconError, match=message) as error:
        parse(Manifest, GOOD | change, "f")
    assert "\n" not in str(error.value)


def test_the_first_missing_field_is_named():
    with pytest.raises(FalconError, match="f: numbers is missing"):
        parse(Manifest, {"config": GOOD["config"]}, "f")
    for value in ([], None, 3, "x", [[[]]]):
        with pytest.raises(FalconError, match="f: the whole: input should be an object"):
            parse(Manifest, value, "f")


def test_a_sealed_file_may_be_laid_out_anew_but_not_changed(tmp_path):
    path = tmp_path / "m.json"
    write_sealed(path, GOOD)
    assert read_sealed(path, "make it again") == GOOD
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(stored.items()))))
    assert read_sealed(path, "make it again") == GOOD
    for change in ({"numbers": [1, 2.6]}, {"more": 1}, {"checksum": None}, {"checksum": 0}):
        with pytest.raises(FalconError, match="its checksum does not match; make it again"):
            unseal(stored | change, path, "make it again")
    with pytest.raises(FalconError, match="not a JSON object"):
        unseal([seal(GOOD)], path, "make it again")
