"""Finding a named run: a Python module whose `CONFIG` is a typed value."""

from __future__ import annotations

import importlib
import pkgutil
import runpy
from pathlib import Path
from typing import Any

import configs
from falcon_relu.errors import FalconError


def config_names(kind: type) -> list[str]:
    """The named configs that come with the project and are of a class: training runs, or recipes of the demo."""
    names = sorted(module.name for module in pkgutil.iter_modules(configs.__path__))
    return [name for name in names if isinstance(_named(name), kind)]


def _named(name: str) -> Any:
    return importlib.import_module(f"configs.{name}").CONFIG


def load_config(name: str, kind: type) -> Any:
    """The `CONFIG` of a run: a name of `config_names(kind)`, or the path of a Python file, which is executed.

    Args:
      name: which run.
      kind: the class that `CONFIG` must be an instance of.

    Raises:
      FalconError: there is no such run, or it has no `CONFIG` of that kind.
    """
    names = config_names(kind)
    if Path(name).suffix != ".py":
        if name not in names:
            raise FalconError(f"no config {name!r}; there are {', '.join(names)}, or give the path of a .py file")
        return _named(name)
    if not Path(name).is_file():
        raise FalconError(f"{name} does not exist; the configs that come with the project: {', '.join(names)}")
    found = runpy.run_path(name).get("CONFIG")
    if not isinstance(found, kind):
        raise FalconError(f"{name} has no CONFIG of the type {kind.__name__}")
    return found
