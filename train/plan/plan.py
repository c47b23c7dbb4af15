"""What a run would take, before it is paid for: its own training step, compiled for devices that are not there.

Nothing of the model's size is allocated: the step is lowered from shapes. For TPUs the compiler is libtpu's and the
devices are a named topology's. For other devices XLA:CPU partitions the step over as many virtual devices; it has no
products in bfloat16 and would widen them, so that it is given float16 instead, which takes the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from falcon_relu.checkpoints.hf_config import config_from_hf
from falcon_relu.checkpoints.native import is_native, read_config
from falcon_relu.config import FalconConfig, family
from falcon_relu.errors import FalconError
from falcon_relu.files import read_json
from falcon_relu.model import Falcon
from falcon_relu.sharding import RULES, abstract_params, batch_sharding, make_mesh, param_shardings
from train.config import TrainConfig
from train.flops import model_flops
from train.plan import hlo
from train.state import abstract_state, make_optimizer, state_shardings
from train.step import make_train_step

Figures = dict[str, Any]

GB = 1e9
# Hub ids whose architecture is known without a download.
_HUB = {
    "tiiuae/falcon-40b": "falcon-40b",
    "tiiuae/falcon-180b": "falcon-180b",
    "tiiuae/falcon-7b": "falcon-7b",
    "tiiuae/falcon-11b": "falcon2-11b",
    "tiiuae/falcon-rw-1b": "falcon-rw-1b",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """What is assumed of one device.

    Attributes:
      name: what it is called in the report.
      memory_gb: 1e9 bytes.
      tflops: 1e12 dense bf16 FLOPs a second, at most.
      link_gb_s: 1e9 bytes a second that it receives from its neighbours, over all links together.
      node: devices that share those links; None where all do.
      network_gb_s: 1e9 bytes a second that it receives from other nodes.
    """

    name: str
    memory_gb: float
    tflops: float
    link_gb_s: float
    node: int | None = None
    network_gb_s: float = 0.0


# By the prefix of a topology's name; from Google's system architecture pages.
TPUS = {
    "v4": Chip(name="TPU v4", memory_gb=32, tflops=275, link_gb_s=300),
    "v5e": Chip(name="TPU v5e", memory_gb=16, tflops=197, link_gb_s=200),
    "v5p": Chip(name="TPU v5p", memory_gb=95, tflops=459, link_gb_s=600),
    "v6e": Chip(name="TPU v6e", memory_gb=32, tflops=918, link_gb_s=448),
}
A100 = Chip(name="A100-80G", memory_gb=80, tflops=312, link_gb_s=300, node=8, network_gb_s=25)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What the prediction of time rests on.

    Attributes:
      efficiency: share of a chip's peak that matrix products reach.
      tokens: of the whole run.
    """

    efficiency: float = 0.6
    tokens: float = 5e9


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled training step.

    Attributes:
      config: the run.
      chip: what each device is assumed to be.
      devices: how many.
      text: the compiled module.
      memory: bytes on a device by what they are for.
      seconds: that compiling took.
    """

    config: TrainConfig
    chip: Chip
    devices: int
    text: str
    memory: dict[str, float]
    seconds: float

    @property
    def bytes(self) -> float:
        """Bytes on one device."""
        return sum(self.memory.values())


class TooLargeError(Exception):
    """The compiler found that the step does not fit; the message is its own first line."""


def topology_devices(topology: str) -> tuple[list[jax.Device], Chip]:
    """The devices of a TPU topology such as "v5p:4x4x4", none of which need be there, and what they are.

    Raises:
      FalconError: libtpu is not installed, or knows no such topology.
    """
    kind = topology.split(":")[0]
    if kind not in TPUS:
        raise FalconError(f"no figures of the chip in topology {topology!r}; known: {', '.join(TPUS)}, as in v5p:4x4x4")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # asks no metadata server what machine this is
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # beside another plan, or a run on a TPU that is here
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # from the plugin's loader or from libtpu itself, of no common type
        if "libtpu" in str(error) or isinstance(error, ImportError):
            raise FalconError(
                f"compiling for {topology} needs libtpu: pip install 'falcon-relu[tpu]' (it needs no TPU)"
            ) from error
        raise FalconError(f"topology {topology!r}: {_first_line(error)}") from error
    return list(described.devices), TPUS[kind]


def virtual_devices(number: int) -> list[jax.Device]:
    """So many CPU devices to partition over; must be called before JAX has looked for devices.

    Raises:
      FalconError: JAX has others already.
    """
    jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", number)
    devices = jax.devices("cpu")
    if len(devices) != number:
        raise FalconError(f"this process has {len(devices)} CPU devices, not {number}; plan in a process of its own")
    return devices


def compile_step(config: TrainConfig, devices: Sequence[jax.Device], chip: Chip) -> Program:
    """Compiles the training step of a run for devices.

    Raises:
      FalconError: the mesh or the batch does not fit the devices.
      TooLargeError: the compiler knows the device's memory, and the step does not fit in.
    """
    student_config, teacher_config = architectures(config)
    mesh = make_mesh(config.mesh, devices)
    check_rows(config, mesh)
    dtype, teacher_dtype = (_dtype(name, devices[0].platform) for name in (config.compute_dtype, config.teacher_dtype))
    student = Falcon(
        student_config,
        dtype,
        config.remat,
        config.query_chunk,
        start_activation=config.start_activation,
        attention=config.attention,
    )
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = abstract_state(student_config, optimizer, state_shardings(student_config, optimizer, mesh))
    rows = jax.ShapeDtypeStruct((config.data.batch_size, config.data.seq_len), jnp.int32, sharding=batch_sharding(mesh))
    batch: Any = dict.fromkeys(("tokens_BxT", "segment_ids_BxT", "positions_BxT"), rows)
    teacher, teacher_params = None, None
    if teacher_config is not None:
        teacher = Falcon(teacher_config, teacher_dtype, query_chunk=config.query_chunk, attention=config.attention)
        teacher_params = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, teacher_dtype, sharding=sharding),
            abstract_params(teacher_config),
            param_shardings(teacher_config, mesh),
        )
    start = time.perf_counter()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(RULES):
        step = make_train_step(
            config.loss, student, teacher, optimizer, mesh, config.microbatches, config.activation_ramp
        )
        lowered: Any = step.lower(state, batch, teacher_params)  # type: ignore[attr-defined]
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise TooLargeError(_first_line(error)) from error
            raise
    stats = compiled.memory_analysis()
    moments, params = _bytes_per_device(state.opt_state), _bytes_per_device(state.params)
    memory = {
        "parameters, float32": params,
        "Adam moments, float32": moments,
        "teacher": _bytes_per_device(teacher_params),
        "batch and counters": stats.argument_size_in_bytes - params - moments - _bytes_per_device(teacher_params),
        "gradients, activations, gathered weights": stats.temp_size_in_bytes,
        "results beside the donated state": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    return Program(config, chip, len(devices), compiled.as_text(), memory, time.perf_counter() - start)


def architectures(config: TrainConfig) -> tuple[FalconConfig, FalconConfig | None]:
    """Student and online teacher of a run, as far as can be told without reading weights.

    Raises:
      FalconError: a model is neither a folder here nor one of the known hub ids.
    """
    if config.model is not None:
        student = family(config.model)
    else:
        assert config.init_from is not None
        student = _architecture(config.init_from, config.init_activation)
    if config.activation is not None:
        student = student.with_activation(config.activation, config.activation_shift)
    teacher = None if config.teacher is None else _architecture(config.teacher, config.teacher_activation)
    return student, teacher


def _architecture(source: str, activation: Any) -> FalconConfig:
    folder = Path(source)
    if is_native(folder):
        return read_config(folder)
    if (folder / "config.json").is_file():
        return config_from_hf(read_json(folder / "config.json"), activation)
    if source.lower() in _HUB:
        return family(_HUB[source.lower()])
    raise FalconError(f"{source} is no folder here, and a plan downloads nothing; known hub ids: {', '.join(_HUB)}")


def check_rows(config: TrainConfig, mesh: Mesh) -> None:
    """Makes sure that each microbatch has as many rows on every device.

    Raises:
      FalconError: it has not; the message says what would do.
    """
    rows, parts = config.data.batch_size // config.microbatches, mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % parts:
        raise FalconError(
            f"a microbatch of {rows} rows (batch_size {config.data.batch_size} / microbatches {config.microbatches}) "
            f"cannot be split over {parts} devices (data x fsdp); change --microbatches, --data.batch-size or --mesh"
        )


def summarise(program: Program, assumptions: Assumptions) -> Figures:
    """Memory, FLOPs, collectives and time of a compiled step, per device where not said otherwise."""
    config, chip, n = program.config, program.chip, program.devices
    student, teacher = architectures(config)
    work = hlo.count(program.text)
    needed = model_flops(student, teacher, config.data.batch_size, config.data.seq_len) / n
    products = work.flops / (chip.tflops * 1e12 * assumptions.efficiency)
    crossing = sum(c.bytes * c.times / (_bandwidth(chip, c.group) * GB) for c in work.collectives)
    hidden, exposed = max(products, crossing), products + crossing
    steps = assumptions.tokens / (config.data.batch_size * config.data.seq_len)

    def run(seconds: float) -> Figures:
        hours = steps * seconds / 3600
        return {
            "step, s": seconds,
            "run, hours": hours,
            "chip-hours": hours * n,
            "model-FLOPs utilisation": needed / (seconds * chip.tflops * 1e12),
        }

    kinds = work.bytes_by_kind()
    return {
        "devices": f"{n} x {chip.name}",
        "mesh (data, fsdp, tensor)": " x ".join(str(size) for size in config.mesh),
        "batch": f"{config.data.batch_size} x {config.data.seq_len} in {config.microbatches} microbatches",
        "remat, attention, chunks": f"{config.remat}, {config.attention}, queries {config.query_chunk}, "
        f"loss {config.loss.chunk}",
        "fits": program.bytes <= chip.memory_gb * GB,
        "GB of": chip.memory_gb,
        "GB a device": program.bytes / GB,
        "hardware TFLOPs a step": work.flops / 1e12,
        "model TFLOPs a step": needed / 1e12,
        "hardware / model FLOPs": work.flops / needed,
        "assumed efficiency of products": assumptions.efficiency,
        "assumed TFLOP/s": chip.tflops,
        "assumed GB/s": f"{chip.link_gb_s:g}"
        + (f" within {chip.node} devices, {chip.network_gb_s:g} beyond" if chip.node else ""),
        "seconds to compile": program.seconds,
        "memory": [{"of a device": name, "GB": size / GB} for name, size in program.memory.items()],
        "collectives": [{"kind": kind, "GB a step": kinds.get(kind, 0.0) / GB} for kind in hlo.COLLECTIVES],
        f"{assumptions.tokens:.3g} tokens, {steps:,.0f} steps": [
            {"collectives": "hidden behind products", **run(hidden)},
            {"collectives": "not hidden at all", **run(exposed)},
        ],
    }


def lighter(config: TrainConfig) -> list[tuple[str, TrainConfig]]:
    """Changes that save memory, each on top of those before, in the order of what they cost in time.

    The config's mesh must name every size.
    """
    data, fsdp, tensor = config.mesh
    ladder, now = [], config

    def add(change: str, **fields: Any) -> None:
        nonlocal now
        now = dataclasses.replace(now, **fields)
        ladder.append((change, now))

    while (rows := now.data.batch_size // now.microbatches // (data * fsdp)) > 1:
        factor = next(n for n in range(2, rows + 1) if rows % n == 0)
        add(f"--microbatches {now.microbatches * factor}", microbatches=now.microbatches * factor)
    order = ("none", "dots", "mlp", "full")
    for remat in order[order.index(config.remat) + 1 :]:
        add(f"--remat {remat}", remat=remat)
    if now.loss.chunk > 128:
        add("--loss.chunk 128", loss=dataclasses.replace(now.loss, chunk=128))
    if now.query_chunk is None or now.query_chunk > 128:
        add("--query-chunk 128", query_chunk=128)
    while fsdp % 2 == 0 and tensor < 8:
        fsdp, tensor = fsdp // 2, tensor * 2
        add(f"--mesh {data} {fsdp} {tensor}", mesh=(data, fsdp, tensor))
    return ladder


def plan_run(
    config: TrainConfig,
    devices: Sequence[jax.Device],
    chip: Chip,
    assumptions: Assumptions,
    note: Callable[[str], None] = lambda _: None,
) -> tuple[Figures, Program | None]:
    """Compiles a run's step and sums up what it takes; where it does not fit, tries what would make it.

    Args:
      config: the run.
      devices: from `topology_devices` or `virtual_devices`.
      chip: what each of them is.
      assumptions: what the time rests on.
      note: told of every attempt.

    Returns:
      The figures of the first attempt that fits, or of the last one, with "tried" listing all; and its program, None if
      the compiler gave none.
    """
    config = dataclasses.replace(config, mesh=tuple(make_mesh(config.mesh, devices).shape.values()))
    tried: list[Figures] = []
    figures: Figures = {"fits": False}
    program = None
    changes = ""
    for change, attempt in [("", config), *lighter(config)]:
        changes = f"{changes} {change}".strip()
        note(f"compiling {changes or 'as configured'}")
        try:
            program = compile_step(attempt, devices, chip)
        except TooLargeError as error:
            tried.append({"change": changes or "as configured", "GB a device": _used_gb(error), "fits": False})
            continue
        figures = summarise(program, assumptions)
        tried.append({"change": changes or "as configured", **{k: figures[k] for k in ("GB a device", "fits")}})
        if figures["fits"]:
            break
    return figures | {"tried": tried}, program


def _dtype(name: str, platform: str) -> Any:
    return jnp.dtype("float16" if name == "bfloat16" and platform == "cpu" else name)


def _bytes_per_device(tree: Any) -> float:
    leaves = jax.tree.leaves(tree)
    return float(sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves))


def _bandwidth(chip: Chip, group: tuple[int, ...]) -> float:
    if chip.node is None or len({device // chip.node for device in group}) == 1:
        return chip.link_gb_s
    return chip.network_gb_s


def _used_gb(error: Exception) -> float | None:
    """What a TPU's compiler says that it would take, in 1e9 bytes."""
    found = re.search(r"Used ([\d.]+)([GM]) of", str(error))
    return None if found is None else float(found[1]) * (2**30 if found[2] == "G" else 2**20) / GB


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
