"""ReLU-Falcon's public names: `import falcon_relu as fr`.

What a Falcon is (config, model, checkpoints, tokenizer, generation) is imported at once. Training and CPU decoding live
in the packages `train` and `infer`, which build on this one; their public names are looked up when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from falcon_relu.checkpoints.convert import export_hf, import_hf
from falcon_relu.checkpoints.load import load_model
from falcon_relu.checkpoints.native import save_params
from falcon_relu.config import FAMILY, FalconConfig, family
from falcon_relu.corpora import documents
from falcon_relu.errors import FalconError
from falcon_relu.evaluation.sparsity import sparsity
from falcon_relu.files import write_texts
from falcon_relu.generation import Sampling, generate
from falcon_relu.model import Falcon, KVCache
from falcon_relu.sharding import init_params, make_mesh, use_mesh
from falcon_relu.tokenizer import Tokenizer, train_bpe

if TYPE_CHECKING:  # as _LATER has them; tests/falcon_relu/test_public.py compares the two
    from falcon_relu.evaluation.harness import HarnessModel, Journal
    from falcon_relu.evaluation.questions import build as build_eval_data
    from falcon_relu.evaluation.scoring import FlaxEngine
    from falcon_relu.evaluation.suite import SUITES, Benchmark, evaluate
    from infer.bench import measure_widths, memory_bandwidth
    from infer.generation import Figures as DecodeFigures
    from infer.generation import generate as decode
    from infer.generation import stream as decode_stream
    from infer.predictor.calibration import calibrate as calibrate_predictor
    from infer.predictor.fitting import FitConfig
    from infer.predictor.fitting import fit as fit_predictor
    from infer.predictor.predictor import Predictor
    from infer.predictor.predictor import load as load_predictor
    from infer.predictor.predictor import save as save_predictor
    from infer.predictor.quality import compare as compare_sparse
    from infer.predictor.recording import record
    from infer.quality import Way, decode_quality
    from infer.scoring import DecodeEngine
    from infer.weights.layout import DecodeWeights, Formats
    from infer.weights.layout import from_params as decode_weights
    from infer.weights.storage import load as load_decode_weights
    from infer.weights.storage import save as save_decode_weights
    from train.config import OptimizerConfig, TrainConfig
    from train.data.batches import DataConfig, Source, train_batches, validation_batches
    from train.data.prepare import PrepareConfig, prepare
    from train.loop import train
    from train.loss import LossConfig
    from train.plan.plan import Assumptions, Chip, topology_devices, virtual_devices
    from train.plan.plan import plan as plan_run
    from train.plan.sharding_table import sharding_table
    from train.state import init_state, make_optimizer
    from train.step import make_train_step
    from train.validation import validate

_LATER = {
    "Assumptions": "train.plan.plan:Assumptions",
    "Benchmark": "falcon_relu.evaluation.suite:Benchmark",
    "Chip": "train.plan.plan:Chip",
    "DataConfig": "train.data.batches:DataConfig",
    "DecodeEngine": "infer.scoring:DecodeEngine",
    "DecodeFigures": "infer.generation:Figures",
    "DecodeWeights": "infer.weights.layout:DecodeWeights",
    "FitConfig": "infer.predictor.fitting:FitConfig",
    "FlaxEngine": "falcon_relu.evaluation.scoring:FlaxEngine",
    "Formats": "infer.weights.layout:Formats",
    "HarnessModel": "falcon_relu.evaluation.harness:HarnessModel",
    "Journal": "falcon_relu.evaluation.harness:Journal",
    "LossConfig": "train.loss:LossConfig",
    "OptimizerConfig": "train.config:OptimizerConfig",
    "Predictor": "infer.predictor.predictor:Predictor",
    "PrepareConfig": "train.data.prepare:PrepareConfig",
    "SUITES": "falcon_relu.evaluation.suite:SUITES",
    "Source": "train.data.batches:Source",
    "TrainConfig": "train.config:TrainConfig",
    "Way": "infer.quality:Way",
    "build_eval_data": "falcon_relu.evaluation.questions:build",
    "calibrate_predictor": "infer.predictor.calibration:calibrate",
    "compare_sparse": "infer.predictor.quality:compare",
    "decode": "infer.generation:generate",
    "decode_quality": "infer.quality:decode_quality",
    "decode_stream": "infer.generation:stream",
    "decode_weights": "infer.weights.layout:from_params",
    "evaluate": "falcon_relu.evaluation.suite:evaluate",
    "fit_predictor": "infer.predictor.fitting:fit",
    "init_state": "train.state:init_state",
    "load_decode_weights": "infer.weights.storage:load",
    "load_predictor": "infer.predictor.predictor:load",
    "make_optimizer": "train.state:make_optimizer",
    "make_train_step": "train.step:make_train_step",
    "measure_widths": "infer.bench:measure_widths",
    "memory_bandwidth": "infer.bench:memory_bandwidth",
    "plan_run": "train.plan.plan:plan",
    "prepare": "train.data.prepare:prepare",
    "record": "infer.predictor.recording:record",
    "save_decode_weights": "infer.weights.storage:save",
    "save_predictor": "infer.predictor.predictor:save",
    "sharding_table": "train.plan.sharding_table:sharding_table",
    "topology_devices": "train.plan.plan:topology_devices",
    "train": "train.loop:train",
    "train_batches": "train.data.batches:train_batches",
    "validate": "train.validation:validate",
    "validation_batches": "train.data.batches:validation_batches",
    "virtual_devices": "train.plan.plan:virtual_devices",
}

__all__ = [
    "FAMILY",
    "SUITES",
    "Assumptions",
    "Benchmark",
    "Chip",
    "DataConfig",
    "DecodeEngine",
    "DecodeFigures",
    "DecodeWeights",
    "Falcon",
    "FalconConfig",
    "FalconError",
    "FitConfig",
    "FlaxEngine",
    "Formats",
    "HarnessModel",
    "Journal",
    "KVCache",
    "LossConfig",
    "OptimizerConfig",
    "Predictor",
    "PrepareConfig",
    "Sampling",
    "Source",
    "Tokenizer",
    "TrainConfig",
    "Way",
    "build_eval_data",
    "calibrate_predictor",
    "compare_sparse",
    "decode",
    "decode_quality",
    "decode_stream",
    "decode_weights",
    "documents",
    "evaluate",
    "export_hf",
    "family",
    "fit_predictor",
    "generate",
    "import_hf",
    "init_params",
    "init_state",
    "load_decode_weights",
    "load_model",
    "load_predictor",
    "make_mesh",
    "make_optimizer",
    "make_train_step",
    "measure_widths",
    "memory_bandwidth",
    "plan_run",
    "prepare",
    "record",
    "save_decode_weights",
    "save_params",
    "save_predictor",
    "sharding_table",
    "sparsity",
    "topology_devices",
    "train",
    "train_batches",
    "train_bpe",
    "use_mesh",
    "validate",
    "validation_batches",
    "virtual_devices",
    "write_texts",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LATER[name].split(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise FalconError(f'falcon_relu.{name} needs lm-eval: pip install "falcon-relu[eval]"') from error
    return globals().setdefault(name, getattr(found, attribute))


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
