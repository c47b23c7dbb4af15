"""From logical axes to mesh axes: one table, the mesh, and the shardings that follow."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from falcon_relu.config import FalconConfig
from falcon_relu.errors import FalconError
from falcon_relu.model import Falcon

Leaf = tuple[str, ...]  # path of a parameter in the tree

MESH_AXES = ("data", "fsdp", "tensor")

# Parameters are split over fsdp along D and over tensor along heads, neurons or vocabulary; the residual stream's
# sequence is split over tensor between blocks.
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", ("data", "fsdp")),
    ("sequence", None),
    ("residual_sequence", "tensor"),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("kv_heads", "tensor"),
    ("vocab", "tensor"),
    ("q_per_kv", None),
    ("head", None),
    ("norm", None),
    ("layers", None),
)


def make_mesh(shape: tuple[int, int, int] = (1, -1, 1), devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh; one -1 takes the devices that are left.

    Raises:
      FalconError: the shape does not fit the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    named = math.prod(size for size in shape if size != -1)
    sizes = tuple(len(devices) // named if size == -1 else size for size in shape)
    if math.prod(sizes) != len(devices):
        raise FalconError(f"mesh {shape} over {MESH_AXES} does not fit {len(devices)} devices")
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


@contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Within, `mesh` is the current one and the model's logical constraints refer to it."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


@functools.cache
def _boxed_params(config: FalconConfig) -> Any:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    with nn.logical_axis_rules(()):  # a shape has no place on the mesh that may be current
        return jax.eval_shape(Falcon(config).init, jax.random.key(0), tokens)["params"]


def abstract_params(config: FalconConfig, dtype: Any = jnp.float32) -> Any:
    """Shape and dtype of every parameter, as a tree of jax.ShapeDtypeStruct; computes nothing."""
    with nn.logical_axis_rules(()):
        shapes = meta.unbox(_boxed_params(config))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)


def param_shapes(config: FalconConfig) -> dict[Leaf, tuple[int, ...]]:
    """Shape of every parameter by its path in the tree."""
    return {leaf: x.shape for leaf, x in flatten_dict(abstract_params(config)).items()}


def param_shardings(config: FalconConfig, mesh: Mesh) -> Any:
    """The sharding of every parameter on a mesh, as a tree of NamedSharding.

    An axis that its mesh axis does not divide stays whole (7B's single KV head, odd vocabularies).
    """

    def fit(spec: PartitionSpec, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        axes = (*spec, *(None,) * (len(leaf.shape) - len(spec)))
        kept = [a if a is None or n % mesh.shape[a] == 0 else None for a, n in zip(axes, leaf.shape, strict=True)]
        return NamedSharding(mesh, PartitionSpec(*kept))

    specs = nn.logical_to_mesh(nn.get_partition_spec(_boxed_params(config)), RULES)
    return jax.tree.map(fit, specs, abstract_params(config), is_leaf=lambda x: isinstance(x, PartitionSpec))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a [B, T] batch: rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def init_params(config: FalconConfig, seed: int, mesh: Mesh | None = None) -> Any:
    """Fresh float32 parameters, made in place on `mesh` if one is given."""
    tokens = jnp.zeros((1, 1), jnp.int32)

    def init(key: jax.Array) -> Any:
        return meta.unbox(Falcon(config).init(key, tokens)["params"])

    out = None if mesh is None else param_shardings(config, mesh)
    with nn.logical_axis_rules(()):
        return jax.jit(init, out_shardings=out)(jax.random.key(seed))
