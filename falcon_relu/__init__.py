"""What a Falcon is: config and family, Flax model, sharding, tokenizer, checkpoint formats, generation."""

from falcon_relu.checkpoint import export_hf, import_hf, load_model
from falcon_relu.config import FAMILY, FalconConfig, family
from falcon_relu.errors import FalconError
from falcon_relu.generate import Sampling, generate
from falcon_relu.model import Falcon, KVCache
from falcon_relu.native import save_params
from falcon_relu.sharding import init_params, make_mesh, use_mesh
from falcon_relu.sparsity import sparsity
from falcon_relu.tokenizer import Tokenizer

__all__ = [
    "FAMILY",
    "Falcon",
    "FalconConfig",
    "FalconError",
    "KVCache",
    "Sampling",
    "Tokenizer",
    "export_hf",
    "family",
    "generate",
    "import_hf",
    "init_params",
    "load_model",
    "make_mesh",
    "save_params",
    "sparsity",
    "use_mesh",
]
