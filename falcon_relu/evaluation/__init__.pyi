from .harness import HarnessModel as HarnessModel
from .journal import Journal as Journal
from .questions import build_eval_data as build_eval_data
from .scoring import FlaxEngine as FlaxEngine
from .sparsity import measure_sparsity as measure_sparsity
from .suite import SUITES as SUITES
from .suite import Benchmark as Benchmark
from .suite import evaluate as evaluate
