"""Memory of a device while Falcon-40B is recorded, measured and compared on eight devices, from compiled programs.

    python -m tests.benchmarks.measuring_40b

As `falcon-relu plan`, it compiles what `predictor record`, `sparsity` and `held-out` execute for devices that are not
there, and allocates nothing of the model's size. See docs/limits.md for what it printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from falcon_relu.config import FalconConfig, family
from falcon_relu.evaluation.sparsity import sparsity_sums
from falcon_relu.model import BATCH_KEYS, Falcon, KVCache
from falcon_relu.progress import console
from falcon_relu.sharding import abstract_params, batch_sharding, make_mesh, param_shardings
from infer.predictor.predictor import LayerPredictor
from infer.predictor.quality import Selector, comparison_sums
from infer.predictor.recording import observe_piece, piece_length
from train.loss import LossConfig
from train.plan.compile import Program, compile_planned, virtual_devices
from train.plan.programs import Planned, Programs
from train.step import make_validation_step

DEVICES, MEMORY_GB = 8, 80.0
RANK = 1024  # of every layer's predictor


def planned(
    config: FalconConfig, mesh: Any, dtype: Any, *, batch: int = 8, unions: int = 32, T: int = 2048
) -> Programs:
    """The programs of the commands at their default batch sizes, weights in `dtype`, products in it too.

    Args:
      config: the model, with a ReLU.
      mesh: the devices.
      dtype: of weights and products.
      batch: rows of `record` and `held-out`.
      unions: rows of `sparsity`.
      T: tokens in a row.
    """

    def shapes(tree: Any, shardings: Any) -> Any:
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

    def numbers(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    params = shapes(abstract_params(config, dtype), param_shardings(config, mesh))
    L, D, F = config.n_layers, config.d_model, config.d_ff

    yield Planned("sparsity", "", sparsity_sums, (config, dtype, params, *[numbers(unions, T)] * 3))

    rows = {name: jax.ShapeDtypeStruct((batch, T), jnp.int32, sharding=batch_sharding(mesh)) for name in BATCH_KEYS}
    teacher = Falcon(config.with_activation("gelu"), dtype)
    step = make_validation_step(LossConfig(), Falcon(config, dtype), teacher)
    yield Planned("held-out, with a teacher", "", step, (params, rows, params))

    maps = LayerPredictor(numbers(L, RANK, D, dtype=dtype), numbers(L, F, RANK, dtype=dtype))
    chosen = Selector(maps, numbers(L, dtype=jnp.float32), numbers(L))
    arguments = (config, "mlp_input", dtype, params, chosen, *[numbers(batch, T)] * 3)
    yield Planned("held-out, with a predictor", "", comparison_sums, arguments)

    C = piece_length(config, batch, T, mesh.size)
    heads = NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp"), None, "tensor", None))
    cache = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=heads if x.ndim == 5 else None),
        jax.eval_shape(lambda: KVCache.empty(config, batch, -(-T // C) * C, dtype)),
    )
    model, lengths = Falcon(config, dtype), numbers(L, F, dtype=jnp.float32)
    yield Planned("record", "", observe_piece, (model, "mlp_input", params, lengths, cache, *[numbers(batch, C)] * 3))


def compiled(name: str, dtype: Any, shape: tuple[int, int, int] = (1, DEVICES, 1)) -> Iterator[Program]:
    """The programs, compiled for eight virtual devices; float16 stands in for bfloat16, see `train.plan.compile`."""
    mesh = make_mesh(shape, virtual_devices(DEVICES))
    narrow = jnp.float16 if dtype == jnp.bfloat16 else dtype
    return compile_planned(planned(family(name).with_activation("relu"), mesh, narrow), mesh)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="falcon-40b")
    parser.add_argument("--mesh", type=int, nargs=3, default=(1, DEVICES, 1))
    parser.add_argument("--dtype", nargs="*", default=("bfloat16", "float32"))
    given = parser.parse_args()
    for dtype in given.dtype:
        for program in compiled(given.model, jnp.dtype(dtype), tuple(given.mesh)):
            parts = ", ".join(f"{what} {size / 1e9:.1f}" for what, size in program.memory.items())
            console.print(
                f"{dtype} {program.planned.phase}: {program.bytes / 1e9:.1f} GB a device ({parts})", soft_wrap=True
            )


if __name__ == "__main__":
    main()
