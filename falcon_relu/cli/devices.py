"""The options of all commands that run the Flax model, on which devices and in which processes, and their context."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from falcon_relu.cli.outputs import Output, locked
from falcon_relu.sharding import make_mesh, use_mesh
from train.distributed import DistributedConfig, joined

Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes(Output):
    """The arguments of a command that several processes can run together, each on its own devices."""

    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)

    @property
    def several_processes(self) -> bool:
        """Whether this process is told of others; the first of them locks and reports."""
        return self.distributed.auto or self.distributed.coordinator is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices(Processes):
    """The arguments of a command that runs a model on devices, sharded as in training."""

    mesh: tuple[int, int, int] = (1, -1, 1)
    """Devices along (data, fsdp, tensor); one of them may be -1: all remaining devices."""


@contextlib.contextmanager
def together(args: Processes) -> Iterator[None]:
    """A context in which all processes have joined, and the first one holds the locks of the outputs.

    Must be entered before JAX uses a device. Raises FalconError as `joined` and `locked` do.
    """
    with joined(args.distributed), contextlib.ExitStack() as locks:
        if args.several_processes and jax.process_index() == 0:
            locks.enter_context(locked(args))
        yield


@contextlib.contextmanager
def on_devices(args: Devices) -> Iterator[Mesh]:
    """As `together`, with the mesh of the arguments, which is JAX's current one inside.

    Raises:
      FalconError: also where the mesh does not fit the devices.
    """
    with together(args), use_mesh(mesh := make_mesh(args.mesh)):
        yield mesh


def stored_as(dtype: Dtype) -> Any:
    """The dtype in which weights are kept for products in `dtype`: None, as they are stored, for float32."""
    return None if dtype == "float32" else jnp.dtype(dtype)
