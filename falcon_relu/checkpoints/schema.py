"""Validation of every JSON file read from outside: its types, ranges, and the checksum of the files we write.

A file format is a dataclass, or any other type that pydantic validates. A value that is not exactly of the declared
type is refused with its name. Checks of ranges and between fields belong in the dataclass's `__post_init__`, as in
FalconConfig.
"""

from __future__ import annotations

import functools
import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from falcon_relu.errors import FalconError
from falcon_relu.files import read_json, write_json

T = TypeVar("T")

_SEAL = "checksum"
_JSON_LIMIT = 256 << 20  # bytes; a manifest that lists a million files, as of a model on a thousand chips, has 50 MB


def parse(kind: type[T], value: Any, where: object, *, unknown_keys: bool = False) -> T:
    """Validates `value`, parsed JSON, and returns it as a `kind`; every field must have exactly the declared type.

    The only conversions are an integer to a float, a list to a tuple and a string to a path. Numbers must be finite.

    Args:
      kind: a dataclass, or any other type that pydantic validates.
      value: a parsed JSON file, or a part of one.
      where: the file, and the place in it, for the error.
      unknown_keys: whether keys that `kind` has no field for are ignored, as in files of other programs, rather than
        refused.

    Raises:
      FalconError: a field is missing, unknown, or of the wrong type or value; the message names the first.
    """
    try:
        if (path := _not_finite(value)) is not None:
            raise FalconError(f"{_dotted(path)} must be a finite number")
        # from JSON text, since only there may a list be a tuple, and an object a dataclass, while all else is strict
        text = json.dumps(value)
        return _adapter(kind).validate_json(text, strict=True, extra="ignore" if unknown_keys else "forbid")  # type: ignore[arg-type]
    except FalconError as error:  # of a dataclass's own check
        raise FalconError(f"{where}: {error}") from None
    except RecursionError:
        raise FalconError(f"{where}: nested too deeply") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = _dotted(first["loc"])
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            what = f"{place} is not known here"
        elif first["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
            what = f"{place} is missing"
        else:
            shown = repr(first["input"])
            message = first["msg"][:1].lower() + first["msg"][1:]
            what = f"{place}: {message}, got {shown[:60] + '...' if len(shown) > 60 else shown}"
        raise FalconError(f"{where}: {what}") from None


def read_as(kind: type[T], path: Path, *, unknown_keys: bool = False) -> T:
    """A JSON file as a `kind`; arguments and errors as `parse` and `falcon_relu.files.read_json`."""
    return parse(kind, read_json(path, limit=_JSON_LIMIT), path, unknown_keys=unknown_keys)


def seal(value: Mapping[str, Any]) -> dict[str, Any]:
    """`value` plus, under "checksum", the CRC-32 of its content; key order and spacing do not matter."""
    return {**value, _SEAL: _checksum(value)}


def unseal(value: Any, where: object, advice: str, *, version: tuple[str, int] | None = None) -> dict[str, Any]:
    """Verifies and removes the checksum that `seal` added.

    Args:
      value: the stored result of `seal`.
      where: the file, for the error.
      advice: what to do about a damaged file or one of another version, for the error.
      version: key and value of the format version that is supported; not checked if None.

    Raises:
      FalconError: the file has another version, or its content does not match the checksum.
    """
    if not isinstance(value, dict):
        raise FalconError(f"{where} is not a JSON object; {advice}")
    if version is not None and value.get(version[0]) != version[1]:
        found = str(value.get(version[0]))[:20]
        raise FalconError(f"{where} is of {version[0]} {found}, and this program reads {version[1]}; {advice}")
    rest = {key: entry for key, entry in value.items() if key != _SEAL}
    if value.get(_SEAL) != _checksum(rest):
        raise FalconError(f"{where} was changed since it was written: its checksum does not match; {advice}")
    return rest


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Writes `seal(value)` as JSON."""
    write_json(path, seal(value))


def read_sealed(path: Path, advice: str, *, version: tuple[str, int] | None = None) -> dict[str, Any]:
    """Reads what `write_sealed` wrote; arguments and errors as `unseal` and `falcon_relu.files.read_json`."""
    return unseal(read_json(path, limit=_JSON_LIMIT), path, advice, version=version)


def _checksum(value: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


@functools.cache
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind)


def _not_finite(value: Any, path: tuple[str | int, ...] = ()) -> tuple[str | int, ...] | None:
    """The path of the first number that is NaN or infinite."""
    if isinstance(value, float):
        return None if math.isfinite(value) else path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return next((found for key, part in inside if (found := _not_finite(part, (*path, key))) is not None), None)


def _dotted(path: tuple[str | int, ...]) -> str:
    return ".".join(map(str, path))[:200] or "the whole"
