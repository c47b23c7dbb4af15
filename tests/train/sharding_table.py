"""How the 40B run lies on its devices, as a table to read and to hold the code to.

`python -m tests.train.sharding_table` writes `falcon_40b_sharding.txt` beside this file anew.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from configs import falcon_40b, falcon_40b_v5e_256, falcon_40b_v5p_64
from falcon_relu.sharding import MESH_AXES, abstract_params, batch_sharding, param_axes, param_shardings
from train.config import TrainConfig
from train.plan import architectures
from train.state import abstract_state, make_optimizer, state_shardings

TABLE = Path(__file__).with_name("falcon_40b_sharding.txt")
RUNS = (
    ("40 devices", falcon_40b.CONFIG, (5, 8, 1)),
    ("v5p:4x4x4", falcon_40b_v5p_64.CONFIG, falcon_40b_v5p_64.CONFIG.mesh),
    ("v5e:16x16", falcon_40b_v5e_256.CONFIG, falcon_40b_v5e_256.CONFIG.mesh),
)
COLUMNS = ("array", "shape", "dtype", "logical axes", "PartitionSpec", "bytes a device")


def table() -> str:
    """All runs' tables."""
    return "\n".join(_run_table(name, config, mesh) for name, config, mesh in RUNS)


def _run_table(name: str, config: TrainConfig, shape: tuple[int, int, int]) -> str:
    mesh: Any = AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    student, teacher = architectures(config)
    assert teacher is not None
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = abstract_state(student, optimizer, state_shardings(student, optimizer, mesh))
    axes = {_path(path): spec for path, spec in _leaves(param_axes(student))}
    rows = [_row("state/" + _path(path), leaf, leaf.sharding, axes) for path, leaf in _leaves(state)]
    for kind, arch, dtype in (
        ("working copy", student, config.compute_dtype),
        ("teacher", teacher, config.teacher_dtype),
    ):
        shardings = jax.tree.leaves(param_shardings(arch, mesh))
        for (path, leaf), sharding in zip(_leaves(abstract_params(arch)), shardings, strict=True):
            norm = kind == "working copy" and path[-1].key in ("scale", "bias")
            held = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if norm else jnp.dtype(dtype))
            rows.append(_row(f"{kind}/{_path(path)}", held, sharding, axes))
    batch = jax.ShapeDtypeStruct((config.data.batch_size, config.data.seq_len), jnp.int32)
    for array in ("tokens_BxT", "segment_ids_BxT", "positions_BxT"):
        rows.append(_row(f"batch/{array}", batch, batch_sharding(mesh), {}))
    cells = [COLUMNS, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    total = sum(int(row[-1].replace(",", "")) for row in rows)
    sizes = ", ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, shape, strict=True))
    return "\n".join([f"{name}: {sizes}", *lines, f"in all {total:,} bytes a device", ""])


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, PartitionSpec))


def _path(path: Any) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path)


def _row(name: str, leaf: Any, sharding: Any, axes: dict[str, PartitionSpec]) -> tuple[str, ...]:
    logical = next((spec for path, spec in axes.items() if name.endswith("/" + path)), ())
    size = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    def listed(spec: Any) -> str:
        return "(" + ", ".join("+".join(a) if isinstance(a, tuple) else a or "-" for a in spec) + ")"

    shape = "x".join(str(n) for n in leaf.shape) or "scalar"
    return name, shape, leaf.dtype.name, listed(logical), listed(sharding.spec), f"{size:,}"


if __name__ == "__main__":
    TABLE.write_text(table())
