"""Compiling the programs of a run for devices that are not there.

Nothing of the model's size is allocated: programs are lowered from shapes. For TPUs the compiler is libtpu's, for a
named topology. For other devices XLA:CPU compiles for as many virtual devices; it has no bfloat16 products and would
widen them to float32, so float16 is used instead, which takes the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from falcon_relu.checkpoints.load import load_config
from falcon_relu.checkpoints.native import is_native
from falcon_relu.config import Activation, FalconConfig, family
from falcon_relu.errors import FalconError
from falcon_relu.sharding import RULES, abstract_mesh, make_mesh, mesh_sizes
from train.config import TrainConfig
from train.data.batches import read_manifests
from train.flops import TPUS, Chip
from train.job import Job, make_job
from train.plan.programs import Planned, Programs, programs
from train.watch import Samples

# Hub ids whose architecture is known without a download.
_HUB = {
    "tiiuae/falcon-40b": "falcon-40b",
    "tiiuae/falcon-180b": "falcon-180b",
    "tiiuae/falcon-7b": "falcon-7b",
    "tiiuae/falcon-11b": "falcon2-11b",
    "tiiuae/falcon-rw-1b": "falcon-rw-1b",
}


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program of a run.

    Attributes:
      planned: what it is.
      compiled: None where arrays are only copied to the hosts.
      memory: bytes on a device while it runs, by what they are used for.
      seconds: duration of the compilation.
    """

    planned: Planned
    compiled: jax.stages.Compiled | None
    memory: dict[str, float]
    seconds: float

    @property
    def bytes(self) -> float:
        """Bytes on one device."""
        return sum(self.memory.values())

    @property
    def text(self) -> str:
        """The compiled module."""
        return "" if self.compiled is None else self.compiled.as_text() or ""


class TooLargeError(Exception):
    """The compiler found that a program does not fit the device; the message is the first line of its error."""


def topology_devices(topology: str) -> tuple[list[jax.Device], Chip]:
    """The devices of a TPU topology such as "v5p:4x4x4", which need not be there, and their chip.

    Raises:
      FalconError: libtpu is not installed, or knows no such topology.
    """
    kind = topology.split(":")[0]
    if kind not in TPUS:
        raise FalconError(f"unknown chip in topology {topology!r}; known: {', '.join(TPUS)}, as in v5p:4x4x4")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # do not ask Google Cloud's metadata server
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # another plan, or a run on this machine's TPU, may be on
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # from the plugin's loader or from libtpu itself, of no common type
        if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
            raise FalconError(
                f"compiling for {topology} needs libtpu: pip install 'falcon-relu[tpu]' (it needs no TPU)"
            ) from error
        raise FalconError(f"topology {topology!r}: {first_line(error)}") from error
    return list(described.devices), TPUS[kind]


def virtual_devices(number: int) -> list[jax.Device]:
    """`number` virtual CPU devices; must be called before JAX has looked for devices.

    Raises:
      FalconError: JAX has been initialised with other devices.
    """
    jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", number)
    devices = jax.devices("cpu")
    if len(devices) != number:
        raise FalconError(f"this process has {len(devices)} CPU devices, not {number}; plan in a process of its own")
    return devices


def read_config(source: str, activation: Activation | None) -> FalconConfig:
    """The config of a checkpoint, without a download.

    Raises:
      FalconError: it is neither a folder here nor one of the known hub ids.
    """
    folder = Path(source)
    if is_native(folder) or (folder / "config.json").is_file():
        return load_config(source, activation=activation)
    if source.lower() in _HUB:
        return family(_HUB[source.lower()])
    raise FalconError(f"{source} is not a folder, and a plan downloads nothing; known hub ids: {', '.join(_HUB)}")


def planned_job(config: TrainConfig, devices: Sequence[jax.Device]) -> Job:
    """The job that `train` would make of `config` on these devices; data and tokenizer are checked if they are here.

    Raises:
      FalconError: `train` would refuse to start; the same errors as there.
    """
    narrow = jnp.float16 if devices[0].platform == "cpu" else jnp.bfloat16
    here = all(Path(source.path).is_dir() for source in config.data.sources)
    manifests = read_manifests(config.data) if here else None
    sizes = mesh_sizes(config.mesh, len(devices))
    job = functools.partial(make_job, config, read_config=read_config, manifests=manifests, narrow=narrow)
    job(mesh=abstract_mesh(sizes))  # says more of what does not fit than laying the devices out
    made = job(mesh=make_mesh(sizes, devices))
    if config.samples.every and config.samples.tokenizer is not None and config.samples.tokenizer.exists():
        Samples(config.samples, made.student, made.mesh)
    return made


def compile_programs(job: Job) -> Iterator[Program]:
    """Compiles the programs of a run one by one, the training step first; errors as `compile_planned`."""
    return compile_planned(programs(job), job.mesh)


def compile_planned(generator: Programs, mesh: Any) -> Iterator[Program]:
    """Compiles programs for a mesh one by one.

    Raises:
      TooLargeError: the compiler knows the device's memory, and a program does not fit in.
    """
    compiled: dict[Any, jax.stages.Compiled] = {}  # by function and arguments
    made = None
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(RULES):
        while True:
            try:
                planned = generator.send(made)
            except StopIteration:
                return
            start = time.perf_counter()
            memory = {"beside": bytes_per_device(planned.beside)}
            if planned.function is None:
                yield Program(planned, None, memory, 0.0)
                continue
            key = (planned.function, *map(id, jax.tree.leaves(planned.arguments)))
            lowered: Any = planned.function.lower(*planned.arguments)
            if key not in compiled:
                compiled[key] = _compile(planned.phase, lowered)
            made = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                lowered.out_info,
                compiled[key].output_shardings,
            )
            stats: Any = compiled[key].memory_analysis()
            memory |= {
                "arguments": stats.argument_size_in_bytes,
                "gradients, activations, gathered weights": stats.temp_size_in_bytes,
                "results beside donated arguments": stats.output_size_in_bytes - stats.alias_size_in_bytes,
                "code": stats.generated_code_size_in_bytes,
            }
            yield Program(planned, compiled[key], memory, time.perf_counter() - start)


def _compile(name: str, lowered: Any) -> jax.stages.Compiled:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise TooLargeError(f"{name}: {first_line(error)}") from error
        raise


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def bytes_per_device(tree: Any) -> float:
    """Bytes that a device holds of arrays with shardings."""
    leaves = jax.tree.leaves(tree)
    return float(sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves))
