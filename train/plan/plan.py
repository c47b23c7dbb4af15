"""What a run would take, before it is paid for: memory, FLOPs, traffic and time of its own programs."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax

from falcon_relu.errors import check_number
from falcon_relu.model import largest_divisor
from falcon_relu.sharding import MeshError, mesh_sizes
from train.config import TrainConfig
from train.flops import Chip
from train.job import Job
from train.plan import hlo
from train.plan.compile import Program, TooLargeError, bytes_per_device, compile_programs, planned_job

Report = dict[str, Any]

GB = 1e9
_STEPS_TO_STOP = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What the prediction of time rests on.

    Attributes:
      efficiency: share of a chip's peak that matrix products reach.
      tokens: of the whole run.
      disk_gb_s: 1e9 bytes a second that all hosts together write to the shared disk.
    """

    efficiency: float = 0.6
    tokens: float = 5e9
    disk_gb_s: float = 5.0

    def __post_init__(self) -> None:
        check_number("efficiency", self.efficiency, above=0, high=1)
        check_number("tokens", self.tokens, above=0)
        check_number("disk_gb_s", self.disk_gb_s, above=0)


def summarise(job: Job, programs: Sequence[Program], chip: Chip, assumptions: Assumptions) -> Report:
    """Memory, FLOPs, collectives and time of the training step, and the memory of all programs; per device.

    Args:
      job: the run.
      programs: as compiled for it, the training step first.
      chip: what each device is.
      assumptions: what the time rests on.
    """
    config, n, step = job.config, job.mesh.size, programs[0]
    work = hlo.count(step.text)
    needed = job.flops / n
    peaks = _peaks(programs, -(-n // _host(job, chip)))
    largest = max(peak["GB a device"] for peak in peaks)
    products = work.flops / (chip.tflops * 1e12 * assumptions.efficiency)
    crossing = sum(c.bytes * c.times / (_bandwidth(chip, c.group) * GB) for c in work.collectives)
    hidden, exposed = max(products, crossing), products + crossing
    steps = assumptions.tokens / (config.data.batch_size * config.data.seq_len)

    def run(seconds: float) -> Report:
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
        "fits": largest <= chip.memory_gb,
        "GB of": chip.memory_gb,
        "GB a device": largest,
        "hardware TFLOPs a step": work.flops / 1e12,
        "model TFLOPs a step": needed / 1e12,
        "hardware / model FLOPs": work.flops / needed,
        "assumed efficiency of products": assumptions.efficiency,
        "assumed TFLOP/s": chip.tflops,
        "assumed GB/s": f"{chip.link_gb_s:g}"
        + (f" within {chip.node} devices, {chip.network_gb_s:g} beyond" if chip.node else ""),
        "assumed GB/s to disk": assumptions.disk_gb_s,
        "seconds from a stop signal to the end": seconds_to_stop(job, exposed, assumptions.disk_gb_s),
        "seconds to compile": sum(program.seconds for program in programs),
        "programs": peaks,
        "memory of a training step": [
            {"of a device": name, "GB": size / GB} for name, size in _parts_of_step(job, step).items()
        ],
        "collectives": [{"kind": kind, "GB a step": kinds.get(kind, 0.0) / GB} for kind in hlo.COLLECTIVES],
        f"{assumptions.tokens:.3g} tokens, {steps:,.0f} steps": [
            {"collectives": "hidden behind products", **run(hidden)},
            {"collectives": "not hidden at all", **run(exposed)},
        ],
    }


def seconds_to_stop(job: Job, step: float, disk_gb_s: float) -> float:
    """How long a run takes at most to save and end after a stop signal.

    The step in which the signal comes and the two after it are finished, see `StopVote`; then a checkpoint is written,
    once the one before it has been. Validation and loading stop sooner; sample texts are finished first.

    Args:
      job: the run.
      step: seconds a step.
      disk_gb_s: 1e9 bytes a second that reach the disk.
    """
    checkpoint = _bytes(job.abstract_state()) / (disk_gb_s * GB)
    return max(_STEPS_TO_STOP * step, checkpoint) + checkpoint


def _peaks(programs: Sequence[Program], hosts: int) -> list[Report]:
    """A line for each phase of a run: its largest program, and what is copied to a host in it."""
    rows: dict[str, Report] = {}
    for program in programs:
        planned = program.planned
        size = max(program.bytes / GB, rows.get(planned.phase, {}).get("GB a device", 0.0))
        rows[planned.phase] = {
            "program": planned.phase,
            "when": planned.when,
            "GB a device": size,
            "GB copied to each host": _bytes(planned.to_host) / hosts / GB,
        }
    return list(rows.values())


def _parts_of_step(job: Job, step: Program) -> dict[str, float]:
    """The memory of a training step, its arguments divided by what they are."""
    state = job.abstract_state()
    known = {
        "parameters, float32": bytes_per_device(state.params),
        "Adam moments, float32": bytes_per_device(state.opt_state),
        "teacher": bytes_per_device(job.abstract_teacher()),
    }
    others = {name: size for name, size in step.memory.items() if name not in ("arguments", "beside")}
    return known | {"batch and counters": step.memory["arguments"] - sum(known.values())} | others


def _bytes(tree: Any) -> float:
    return float(sum(leaf.dtype.itemsize * leaf.size for leaf in jax.tree.leaves(tree)))


def _host(job: Job, chip: Chip) -> int:
    """Devices of a host."""
    devices: Any = job.mesh.devices.flat
    return chip.node or sum(device.process_index == devices[0].process_index for device in devices)


def lighter(config: TrainConfig) -> list[tuple[str, TrainConfig]]:
    """Changes that save memory, each on top of those before, the cheapest in time first.

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
    T = now.data.seq_len
    if 1 < (chunk := largest_divisor(T, 128)) < (now.query_chunk or T):
        add(f"--query-chunk {chunk}", query_chunk=chunk)
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
) -> tuple[Report, Program | None]:
    """Compiles a run's programs and reports memory, FLOPs and time; where they do not fit, tries `lighter` configs.

    Args:
      config: the run.
      devices: from `topology_devices` or `virtual_devices`.
      chip: memory and speeds of each device.
      assumptions: for the estimated times.
      note: called with a line before every attempt.

    Returns:
      The report of the first attempt that fits, or of the last one, with "tried" listing all; and its training step,
      None if the compiler gave none.
    """
    config = dataclasses.replace(config, mesh=mesh_sizes(config.mesh, len(devices)))
    tried: list[Report] = []
    report: Report = {"fits": False}
    step = None
    changes = ""
    for change, attempt in [("", config), *lighter(config)]:
        changes = f"{changes} {change}".strip()
        try:
            job = planned_job(attempt, devices)
        except MeshError:
            if attempt is config:
                raise
            continue  # a torus does not take every mesh
        note(f"compiling {changes or 'as configured'}")
        programs: list[Program] = []
        try:
            for program in compile_programs(job):
                programs.append(program)
                if program.bytes > chip.memory_gb * GB:
                    break  # it does not fit, whatever the other programs need
        except TooLargeError as error:
            tried.append({"change": changes or "as configured", "GB a device": _used_gb(error), "fits": False})
            continue
        step, report = programs[0], summarise(job, programs, chip, assumptions)
        tried.append({"change": changes or "as configured", **{k: report[k] for k in ("GB a device", "fits")}})
        if report["fits"]:
            break
    return report | {"tried": tried}, step


def _bandwidth(chip: Chip, group: tuple[int, ...]) -> float:
    if chip.node is None:
        return chip.link_gb_s
    nodes = Counter(device // chip.node for device in group)
    if len(nodes) == 1:
        return chip.link_gb_s
    return min(chip.link_gb_s, chip.network_gb_s * max(nodes.values()))  # each device of a node uses its own adapter


def _used_gb(error: Exception) -> float | None:
    """The memory that a TPU compiler's error states as needed, in 1e9 bytes."""
    found = re.search(r"Used ([\d.]+)([GM]) of", str(error))
    return None if found is None else float(found[1]) * (2**30 if found[2] == "G" else 2**20) / GB
