"""Finding a named run: a Python module whose `CONFIG` is a typed value."""

from __future__ import annotations

import importlib
import pkgutil
import runpy
from pathlib import Path
from typing import Any

import configs
from falcon_relu.errors import FalconError


def config_names() -> list[str]:
    """The runs that come with the project."""
    return sorted(module.name for module in pkgutil.iter_modules(configs.__path__))


def load_config(name: str, kind: type) -> Any:
    """The `CONFIG` of a run: a name of `config_names()`, or the path of a Python file, which is executed.

    Args:
      name: which run.
      kind: the class that `CONFIG` must be an instance of.

    Raises:
      FalconError: there is no such run, or it has no `CONFIG` of that kind.
    """
    if Path(name).suffix == ".py":
        if not Path(name).is_file():
            raise FalconError(f"{name} does not exist; the configs that come with the project: {_listing()}")
        found = runpy.run_path(name).get("CONFIG")
    elif name in config_names():
        found = getattr(importlib.import_module(f"configs.{name}"), "CONFIG", None)
    else:
        raise FalconError(f"no config {name!r}; there are {_listing()}, or give the path of a .py file")
    if not isinstance(found, kind):
        raise FalconError(f"{name} has no CONFIG of the type {kind.__name__}")
    return found


def _listing() -> str:
    return ", ".join(config_names())
