"""ReLU-Falcon's public names: `import falcon_relu as fr`.

They are listed once, in `__init__.pyi`, where type checkers read them; Python imports a name's module when the name is
first used. `fr.train` and `fr.infer` are the packages `train` and `infer`, which build on this one.
"""

import importlib
from typing import Any

import lazy_loader

_PACKAGES = ("infer", "train")  # not inside this package, so lazy-loader does not look them up
_lazy, _, _names = lazy_loader.attach_stub(__name__, __file__)
__all__ = sorted((*_names, *_PACKAGES))


def __getattr__(name: str) -> Any:
    return importlib.import_module(name) if name in _PACKAGES else _lazy(name)


def __dir__() -> list[str]:
    return __all__
