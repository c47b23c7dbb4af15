"""Several processes as one run: how they find each other, wait for each other with a limit, and decide together."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
import socket
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from falcon_relu.errors import FalconError, check_number
from falcon_relu.progress import console
from train.processes import signals
from train.processes.lookout import Lookout
from train.processes.signals import Stopped

_MOST_SECONDS = 7 * 24 * 3600
_WAIT_SECONDS = 1800


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """How this process finds the others of its run; alone by default.

    Attributes:
      auto: JAX finds the processes by environment variables: SLURM, GKE, Cloud TPU, Open MPI.
      coordinator: host:port of process 0, where the environment does not give it.
      num_processes: number of processes, with `coordinator`.
      process_id: number of this process, from 0, with `coordinator`.
      heartbeat_seconds: time without a sign of life from a process after which the others end.
      start_seconds: time that the processes wait for each other at the start; machines may start one after the other.
      wait_seconds: time that the others wait for a process that lives but is late: at a step, a checkpoint, a decision.

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
    wait_seconds: int = _WAIT_SECONDS

    def __post_init__(self) -> None:
        explicit = (self.coordinator, self.num_processes, self.process_id)
        if any(value is not None for value in explicit) and (self.auto or None in explicit):
            raise FalconError(
                "distributed: give either auto alone, or coordinator, num_processes and process_id together"
            )
        for name in ("heartbeat_seconds", "start_seconds", "wait_seconds"):
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
    error and exits with status 1 at once, and the others do too: an orderly shutdown would wait for the others, which
    wait for this one. A stop signal before `signals.keep` ends all of them at once, with status 130.

    Raises:
      FalconError: the others could not be found or reached.
    """
    global _lookout, _wait_seconds
    if not config.auto and config.coordinator is None:
        _check_alone()
        signals.leave_with(signals.leave_now)
        yield
        return
    _initialize(config)
    console.quiet = jax.process_index() != 0
    _wait_seconds = config.wait_seconds
    lookout = Lookout(
        _client(), jax.process_index(), jax.process_count(), config.heartbeat_seconds, config.wait_seconds
    )
    lookout.start()
    signals.leave_with(lookout.leave)
    _lookout = lookout
    try:
        try:
            yield
        except Stopped:  # all processes raise it after the same step
            _part(lookout)
            raise
        _part(lookout)
    except Stopped:
        raise
    except BaseException as error:
        lookout.end(1, _explained(error))
    finally:
        _lookout = None


def _part(lookout: Lookout) -> None:
    """Shuts JAX down in all processes together."""
    wait_for_all("the end of the run")
    lookout.stop()
    jax.distributed.shutdown()


_lookout: Lookout | None = None
_wait_seconds: float = _WAIT_SECONDS


def _initialize(config: DistributedConfig) -> None:
    # Otherwise JAX handles SIGTERM; here `signals` does.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            cluster_detection_method=None if config.auto else "deactivate",
            initialization_timeout=config.start_seconds,
            heartbeat_timeout_seconds=2 * config.heartbeat_seconds + 10,  # the lookout is first, with a better message
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


def _explained(error: BaseException) -> str:
    if isinstance(error, FalconError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted before the others had stopped; the run goes on from its last checkpoint"
    traceback.print_exception(error)
    behind = _lookout.behind() if _lookout is not None else ""
    return (
        f"failed as shown above{behind and ': ' + behind}. Start all processes again, the run goes on from its last "
        "checkpoint"
    )


# --- waits and decisions of all processes ---


def reached(where: str, *, together: bool = True) -> None:
    """Tells the other processes where this one is; see `Lookout.reached`."""
    if _lookout is not None:
        _lookout.reached(where, together=together)


def gather(text: str, where: str) -> list[str]:
    """The text of every process, by their numbers; every process must call it with the same `where`.

    Raises:
      FalconError: a process did not come in time; the message names it.
    """
    if jax.process_count() == 1:
        return [text]
    reached(where, together=False)  # the barrier below has its own limit
    client, rank, number = _client(), jax.process_index(), next(_numbers)
    folder = f"relu-falcon/gather/{number}/"
    client.key_value_set(f"{folder}{rank}", text)
    try:
        client.wait_at_barrier(f"{folder}{where}", int(_wait_seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        came = {int(key.rpartition("/")[2]) for key, _ in client.key_value_dir_get(folder)}
        late = sorted(set(range(jax.process_count())) - came)
        raise FalconError(
            f"{where}: {_processes(late) if late else 'not all processes'} did not come within {_wait_seconds:g} s "
            f"(--distributed.wait-seconds; {str(error).splitlines()[0]}). Start all processes again: the run goes on "
            "from its last checkpoint"
        ) from None
    said = {int(key.rpartition("/")[2]): value for key, value in client.key_value_dir_get(folder)}
    if number:  # all have read what was said before
        client.key_value_delete(f"relu-falcon/gather/{number - 1}/{rank}")
    return [said[rank] for rank in sorted(said)]


_numbers = itertools.count()


def _client() -> Any:
    """JAX's client of the coordinator: barriers and stored values, both with limits; no public name leads to it."""
    from jax._src import distributed

    return distributed.global_state.client


def _processes(ranks: list[int]) -> str:
    return f"process{'es' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def late_processes(error: BaseException | None) -> str | None:
    """The processes that an error of JAX's barriers names as late, also where a library wrapped it; else None."""
    while error is not None:
        if found := re.search(r"task names:\s*([^#]*)", str(error)):
            return _processes([int(rank) for rank in re.findall(r"(\d+)\s*$", found[1].split("\n\n")[0], re.M)])
        error = error.__cause__ or error.__context__
    return None


def wait_seconds() -> float:
    """How long processes wait for one that is late."""
    return _wait_seconds


def all_agree(ok: bool, where: str) -> bool:
    """Whether `ok` is true in every process; as `gather`."""
    return all(json.loads(one) for one in gather(json.dumps(bool(ok)), where))


def check_same(value: str, what: str) -> None:
    """Makes sure that `value` is the same in every process; as `gather`.

    Raises:
      FalconError: they differ.
    """
    if len(set(gather(value, f"the comparison of their {what}"))) > 1:
        raise FalconError(f"the processes of this run were not started with the same {what}")


def of_first(value: Any, where: str) -> Any:
    """What process 0 gives, a value that JSON can hold; as `gather`."""
    return json.loads(gather(json.dumps(value), where)[0])


def wait_for_all(where: str) -> None:
    """Waits until every process has called this with the same `where`; as `gather`."""
    gather("", where)


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
        return not all_agree(not self._asked(), "the first step")
