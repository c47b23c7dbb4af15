"""What quality is: benchmarks, scoring, sparsity. The public names are listed in `__init__.pyi`."""

from typing import Any

import lazy_loader

from falcon_relu.errors import FalconError

_lazy, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    try:
        return _lazy(name)
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise FalconError(f'{__name__}.{name} needs lm-eval: pip install "falcon-relu[eval]"') from error
