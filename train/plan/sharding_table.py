"""How a run is sharded over its devices: the axes, partition and bytes a device of every array."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec

from falcon_relu.sharding import abstract_mesh, abstract_params, param_axes, param_shardings
from train.config import TrainConfig
from train.job import make_job
from train.plan.compile import read_config


def sharding_table(config: TrainConfig, mesh_shape: tuple[int, int, int]) -> list[dict[str, Any]]:
    """A row for each array that a run holds: state, the step's working copy of it, teacher, batch.

    Args:
      config: the run; its own mesh is ignored.
      mesh_shape: devices along (data, fsdp, tensor), which need not be there.

    Returns:
      Rows of array, shape, dtype, logical axes, PartitionSpec (all text) and bytes a device (int).
    """
    mesh = abstract_mesh(mesh_shape)
    job = make_job(config, mesh, read_config)
    student, state = job.student.config, job.abstract_state()
    axes = {_path(path): spec for path, spec in _leaves(param_axes(student))}
    rows = [_row("state/" + _path(path), leaf, leaf.sharding, axes) for path, leaf in _leaves(state)]
    copies = [("working copy", student, config.compute_dtype)]
    if job.teacher is not None:
        copies.append(("teacher", job.teacher.config, config.teacher_dtype))
    for kind, arch, dtype in copies:
        shardings = jax.tree.leaves(param_shardings(arch, mesh))
        for (path, leaf), sharding in zip(_leaves(abstract_params(arch)), shardings, strict=True):
            norm = kind == "working copy" and path[-1].key in ("scale", "bias")
            held = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if norm else jnp.dtype(dtype))
            rows.append(_row(f"{kind}/{_path(path)}", held, sharding, axes))
    for path, leaf in flatten_dict(job.abstract_batch(config.data.batch_size)).items():
        rows.append(_row("/".join(("batch", *path)), leaf, leaf.sharding, {}))
    return rows


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, PartitionSpec))


def _path(path: Any) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path)


def _row(name: str, leaf: Any, sharding: Any, axes: dict[str, PartitionSpec]) -> dict[str, Any]:
    logical = next((spec for path, spec in axes.items() if name.endswith("/" + path)), ())

    def listed(spec: Any) -> str:
        return "(" + ", ".join("+".join(a) if isinstance(a, tuple) else a or "-" for a in spec) + ")"

    return {
        "array": name,
        "shape": "x".join(str(n) for n in leaf.shape) or "scalar",
        "dtype": leaf.dtype.name,
        "logical axes": listed(logical),
        "PartitionSpec": listed(sharding.spec),
        "bytes a device": math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
    }
