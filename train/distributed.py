"""Several processes as one run: how they find each other, decide together, and divide the rows of a batch."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from falcon_relu.errors import FalconError, check_number
from falcon_relu.progress import console
from falcon_relu.sharding import batch_sharding, check_shared
from train.data.batches import Batch

_MOST_SECONDS = 7 * 24 * 3600


class Stopped(KeyboardInterrupt):
    """SIGTERM or Ctrl-C came to one of the processes, and all have stopped after the same step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """How this process finds the others of its run; alone by default.

    Attributes:
      auto: JAX finds the processes by environment variables: SLURM, GKE, Cloud TPU, Open MPI.
      coordinator: host:port of process 0, where the environment does not give it.
      num_processes: number of processes, with `coordinator`.
      process_id: number of this process, from 0, with `coordinator`.
      heartbeat_seconds: time without a heartbeat from a process after which the others end.
      start_seconds: time that the processes wait for each other at the start; machines may start one after the other.

    The coordinator's port accepts any connection, without authentication: it must not be reachable from outside. It
    listens on the address of `coordinator` only.

    Raises:
      FalconError: a field is out of range or the fields contradict each other; the message names them.
    """

    auto: bool = False
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    heartbeat_seconds: int = 100
    start_seconds: int = 1800

    def __post_init__(self) -> None:
        explicit = (self.coordinator, self.num_processes, self.process_id)
        if any(value is not None for value in explicit) and (self.auto or None in explicit):
            raise FalconError(
                "distributed: give either auto alone, or coordinator, num_processes and process_id together"
            )
        for name in ("heartbeat_seconds", "start_seconds"):
            check_number(f"distributed.{name}", getattr(self, name), low=1, high=_MOST_SECONDS)
        if self.coordinator is not None:
            host, _, port = self.coordinator.rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
                raise FalconError(f"distributed.coordinator must be host:port, got {self.coordinator!r}")
            check_number("distributed.num_processes", self.num_processes, low=1)
            check_number("distributed.process_id", self.process_id, low=0, high=(self.num_processes or 1) - 1)


@contextlib.contextmanager
def joined(config: DistributedConfig) -> Iterator[None]:
    """A context in which this process belongs to the run; only process 0 prints to the console.

    Must be entered before JAX uses a device. When its block fails in one of several processes, that process prints the
    error and exits with status 1 at once: an orderly shutdown would wait for the others, which wait for this one.

    Raises:
      FalconError: the others could not be found or reached.
    """
    if not config.auto and config.coordinator is None:
        _check_alone()
        yield
        return
    _initialize(config)
    console.quiet = jax.process_index() != 0
    try:
        yield
        jax.distributed.shutdown()
    except Stopped:
        jax.distributed.shutdown()
        raise
    except BaseException as error:
        _say(error)
        os._exit(1)


def _initialize(config: DistributedConfig) -> None:
    # Otherwise JAX handles SIGTERM; here StopVote does.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            cluster_detection_method=None if config.auto else "deactivate",
            initialization_timeout=config.start_seconds,
            heartbeat_timeout_seconds=config.heartbeat_seconds,
            coordinator_bind_address=_bind_address(config),
        )
    except (ValueError, RuntimeError) as error:
        if config.auto:
            raise FalconError(
                f"--distributed.auto: no cluster that JAX knows was found or reached ({error}); start one process a "
                "task (srun, a GKE job), or give --distributed.coordinator, --distributed.num-processes and "
                "--distributed.process-id"
            ) from None
        raise FalconError(
            f"process {config.process_id} could not join {config.num_processes} at {config.coordinator} ({error}); "
            "make sure that all were started and that the coordinator's port is free and can be reached"
        ) from None


def _bind_address(config: DistributedConfig) -> str | None:
    """The address on which process 0 listens: that of `coordinator`; JAX's default is all addresses of the machine.

    None, which means JAX's default, where `coordinator` is not an address of this machine (but that of a load balancer
    or service, say), and with `auto`.
    """
    if config.coordinator is None or config.process_id != 0 or "JAX_COORDINATOR_BIND_ADDRESS" in os.environ:
        return None
    host, _, port = config.coordinator.rpartition(":")
    try:
        address = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)[0][4][0]
        family = socket.AF_INET6 if ":" in str(address) else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return None
    return f"[{address}]:{port}" if family == socket.AF_INET6 else f"{address}:{port}"


def _check_alone() -> None:
    """Makes sure that this is not one of several tasks of a cluster that would each run alone, in the same folder."""
    env = os.environ
    tasks = int(env.get("SLURM_NTASKS", "1")) if "SLURM_STEP_NODELIST" in env else 1
    workers = len(env.get("TPU_WORKER_HOSTNAMES", "").split(","))
    if max(tasks, workers) > 1:
        raise FalconError(
            f"this is one of {max(tasks, workers)} processes that the cluster started: add --distributed.auto to make "
            "them one run"
        )


def _say(error: BaseException) -> None:
    if isinstance(error, FalconError):
        text = str(error)
    elif isinstance(error, KeyboardInterrupt):
        text = "interrupted before the others had stopped; the run goes on from its last checkpoint"
    else:
        traceback.print_exception(error)
        text = (
            "failed as shown above. If another process failed first, that is the cause: see its output. Start all "
            "processes again, the run goes on from its last checkpoint"
        )
    print(f"process {jax.process_index()} of {jax.process_count()}: {text}", file=sys.stderr, flush=True)


# --- decisions of all processes ---


def all_agree(ok: bool) -> bool:
    """Whether `ok` is true in every process; every process must call it."""
    return bool(np.all(multihost_utils.process_allgather(np.array([ok]))))


def check_same(value: bytes, what: str) -> None:
    """Makes sure that the first 4 bytes of `value` are the same in every process; every process must call it.

    Raises:
      FalconError: they differ.
    """
    number = np.array([int.from_bytes(value[:4], "little")], np.uint32)
    if len(np.unique(multihost_utils.process_allgather(number))) > 1:
        raise FalconError(f"the processes of this run were not started with the same {what}")


def wait_for_all(where: str) -> None:
    """Waits until every process has called this with the same `where`."""
    multihost_utils.sync_global_devices(where)


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function: whether SIGTERM or Ctrl-C was received; a second Ctrl-C interrupts at once."""
    came: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


class StopVote:
    """Whether any process was asked to stop; all processes get the same answer after the same step.

    The answers of the processes are combined by a small reduction on the devices whose result is read one step later,
    so that no process waits for it. A single process stops after the current step.
    """

    def __init__(self, asked: Callable[[], bool], mesh: Mesh):
        self._asked = asked
        self._before: jax.Array | None = None
        self._shape = (mesh.size,)
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self) -> bool:
        """Whether to stop now; every process calls it once a step, after dispatching the step."""
        if jax.process_count() == 1:
            return self._asked()
        mine = np.array([self._asked()])
        votes = jax.make_array_from_callback(self._shape, self._sharding, lambda _: mine)
        before, self._before = self._before, self._any(votes)
        return before is not None and bool(jax.device_get(before))

    def at_once(self) -> bool:
        """Whether to stop now, as of this step; waits for all processes."""
        return not all_agree(not self._asked())


# --- rows ---


class Rows:
    """Which rows of every global batch the devices of this process hold, and how they become global arrays.

    Attributes:
      own: the rows, ascending; the same in processes whose devices hold different parts of the same model replica.
      parts: number of parts into which the devices divide a batch.
    """

    def __init__(self, mesh: Mesh, batch_size: int):
        """Determines the rows.

        Raises:
          FalconError: the batch cannot be divided evenly.
        """
        self.parts = check_shared(mesh, batch_size)
        self._sharding = batch_sharding(mesh)
        self._batch_size = batch_size
        held = self._sharding.addressable_devices_indices_map((batch_size,)).values()
        self.own = np.unique(np.concatenate([np.arange(batch_size)[index] for index in held]))

    def to_global(self, batch: Batch) -> Batch:
        """Global arrays [B, ...], sharded over the mesh, from this process's rows of each."""

        def place(rows: np.ndarray) -> jax.Array:
            def block(index: Any) -> np.ndarray:
                start, stop, _ = index[0].indices(self._batch_size)
                first = int(np.searchsorted(self.own, start))
                return rows[first : first + stop - start]

            return jax.make_array_from_callback((self._batch_size, *rows.shape[1:]), self._sharding, block)

        return jax.tree.map(place, batch)
