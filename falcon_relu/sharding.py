"""From logical axes to mesh axes: the table of rules, the mesh, and the shardings of parameters and batches."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from falcon_relu.config import FalconConfig
from falcon_relu.errors import FalconError
from falcon_relu.model import Falcon

Leaf = tuple[str, ...]  # path of a parameter in the tree
Index = tuple[slice, ...]  # a part of an array: from start to stop along every axis

MESH_AXES = ("data", "fsdp", "tensor")


class MeshError(FalconError):
    """Something does not fit the devices of a mesh.

    Attributes:
      what: the fault, without what to do.
    """

    def __init__(self, what: str, remedy: str):
        super().__init__(f"{what}: {remedy}")
        self.what = what


# Parameters are sharded over `tensor` along heads, neurons or vocabulary, and over `fsdp` along neurons (whole rows,
# which all-gather without a transposition) or else along D. Between blocks the residual stream is sharded over `tensor`
# along the sequence. Where two axes of one array map to the same mesh axis, the rule that comes first here wins.
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", ("data", "fsdp")),
    ("sequence", None),
    ("residual_sequence", "tensor"),
    ("mlp", ("tensor", "fsdp")),
    ("neurons", "tensor"),
    ("embed", "fsdp"),
    ("kv_heads", "tensor"),
    ("vocab", "tensor"),
    ("q_per_kv", None),
    ("head", None),
    ("norm", None),
    ("layers", None),
    ("layers_at_rest", "data"),
)


def mesh_sizes(shape: tuple[int, int, int], devices: int) -> tuple[int, int, int]:
    """The sizes of a (data, fsdp, tensor) mesh; a size of -1 takes the devices that are left.

    Raises:
      MeshError: the shape does not fit the number of devices.
    """
    named = math.prod(size for size in shape if size != -1)
    data, fsdp, tensor = (devices // named if size == -1 else size for size in shape)
    if data * fsdp * tensor != devices:
        raise MeshError(
            f"mesh {shape} over {MESH_AXES} does not fit {devices} devices",
            f"choose one whose product is {devices}, or give a single -1, which takes the devices that are left",
        )
    return data, fsdp, tensor


def make_mesh(shape: tuple[int, int, int] = (1, -1, 1), devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh, see `mesh_sizes`.

    Raises:
      MeshError: the shape does not fit the number of devices, or not the torus that they form.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(shape, len(devices))
    try:
        return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    except NotImplementedError as error:  # TPUs alone
        edges = [max(places) + 1 for places in zip(*(device.coords for device in devices), strict=True)]
        raise MeshError(
            f"mesh {sizes} over {MESH_AXES} cannot be laid on a torus of {' x '.join(map(str, edges))} chips",
            "every size must be the product of some of its edges",
        ) from error


def abstract_mesh(sizes: tuple[int, int, int]) -> Any:
    """A mesh without devices, for shapes and shardings; typed Any, since it serves where a Mesh is asked for."""
    return AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


@contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """A context in which `mesh` is JAX's current mesh and the model's logical axes map to it by `RULES`."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


@functools.cache
def _boxed_params(config: FalconConfig) -> Any:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    key = jax.eval_shape(jax.random.key, 0)
    with nn.logical_axis_rules(()):  # shapes only: no constraint to the current mesh
        return jax.eval_shape(Falcon(config).init, key, tokens)["params"]


def abstract_params(config: FalconConfig, dtype: Any = jnp.float32) -> Any:
    """Shape and dtype of every parameter, as a tree of jax.ShapeDtypeStruct; computes nothing."""
    with nn.logical_axis_rules(()):
        shapes = meta.unbox(_boxed_params(config))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)


def param_shapes(config: FalconConfig) -> dict[Leaf, tuple[int, ...]]:
    """Shape of every parameter by its path in the tree."""
    return {leaf: x.shape for leaf, x in flatten_dict(abstract_params(config)).items()}


def param_axes(config: FalconConfig) -> Any:
    """The logical axes of every parameter, as a tree of PartitionSpec."""
    return nn.get_partition_spec(_boxed_params(config))


def param_shardings(config: FalconConfig, mesh: Mesh, *, at_rest: bool = False) -> Any:
    """The sharding of every parameter on a mesh, as a tree of NamedSharding.

    An axis whose size its mesh axes do not divide is not sharded (7B's single KV head, odd vocabularies).

    Args:
      config: the model.
      mesh: the devices.
      at_rest: the sharding between steps, of float32 parameters and optimizer moments: also over `data`, along the
        layer axis. A step computes with a copy that is not sharded over `data` (`working_copy`).
    """

    def divides(axis: str | tuple[str, ...], size: int) -> bool:
        return size % math.prod(mesh.shape[name] for name in ((axis,) if isinstance(axis, str) else axis)) == 0

    def fit(spec: PartitionSpec, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        axes = (*spec, *(None,) * (len(leaf.shape) - len(spec)))
        kept = [a if a is not None and divides(a, n) else None for a, n in zip(axes, leaf.shape, strict=True)]
        return NamedSharding(mesh, PartitionSpec(*kept))

    axes = param_axes(config)
    if at_rest:
        axes = jax.tree.map(_axes_at_rest, axes, is_leaf=lambda x: isinstance(x, PartitionSpec))
    specs = nn.logical_to_mesh(axes, RULES)
    return jax.tree.map(fit, specs, abstract_params(config), is_leaf=lambda x: isinstance(x, PartitionSpec))


def working_copy(config: FalconConfig, params: Any, dtype: Any) -> Any:
    """A step's copy of the parameters: cast to `dtype` except for norms, with all layers on every `data` replica.

    Made once a step, so that the collectives of each layer then move the narrower dtype.
    """

    def copy(path: Any, w: jax.Array, axes: PartitionSpec) -> jax.Array:
        if path[-1].key not in ("scale", "bias"):
            w = nn.with_logical_constraint(w.astype(dtype), _axes_at_rest(axes))  # cast before it is gathered
        return nn.with_logical_constraint(w, axes)

    return jax.tree_util.tree_map_with_path(copy, params, param_axes(config))


def _axes_at_rest(axes: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*("layers_at_rest" if axis == "layers" else axis for axis in axes))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a [B, T] batch: rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array on the devices of a mesh; a process transfers only the shards that its own devices hold."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def place_parts(shape: Sequence[int], sharding: NamedSharding, read: Callable[[Index], np.ndarray]) -> jax.Array:
    """An array on the devices of a mesh, of which each process reads the parts that its own devices hold, each once."""
    parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        spans = tuple(one.indices(size)[:2] for one, size in zip(index, shape, strict=True))
        if spans not in parts:
            parts[spans] = read(tuple(slice(*span) for span in spans))
        return parts[spans]

    return jax.make_array_from_callback(tuple(shape), sharding, part)


def batch_shards() -> int:
    """Number of shards of the batch on the current mesh; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in ("data", "fsdp"))


def check_shared(mesh: Mesh, rows: int) -> int:
    """The number of parts into which the devices of a mesh divide the rows of a batch.

    Raises:
      FalconError: `rows` cannot be divided evenly.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % parts:
        raise FalconError(
            f"a batch of {rows} rows cannot be divided evenly among the {parts} devices along data and fsdp: change "
            f"the batch size to a multiple of {parts}, or --mesh"
        )
    return parts


def on_host(arrays: Any) -> Any:
    """Arrays as numpy in every process, gathered where they are sharded over processes; every process must call it."""
    return multihost_utils.process_allgather(arrays, tiled=True)


def init_params(config: FalconConfig, seed: int, mesh: Mesh | None = None) -> Any:
    """Randomly initialised float32 parameters, created sharded over `mesh` if one is given."""
    return init_program(config, mesh)(jax.random.key(seed))


def init_program(config: FalconConfig, mesh: Mesh | None = None) -> Any:
    """The jitted (key) -> randomly initialised float32 parameters, sharded over `mesh` if one is given."""
    tokens = jnp.zeros((1, 1), jnp.int32)

    def init(key: jax.Array) -> Any:
        with nn.logical_axis_rules(()):
            return meta.unbox(Falcon(config).init(key, tokens)["params"])

    return jax.jit(init, out_shardings=None if mesh is None else param_shardings(config, mesh))
