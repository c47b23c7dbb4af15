"""How a ReLU Falcon is decoded on a CPU: decode weights, predictor, kernels, generation.

The public names are listed in `__init__.pyi`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
