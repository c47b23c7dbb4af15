"""How a Falcon is trained: data, loss, step, state, loop. The public names are listed in `__init__.pyi`."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
