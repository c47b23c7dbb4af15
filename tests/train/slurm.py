"""A SLURM cluster of this machine alone, on loopback: munge, controller and one node, all in a folder of their own.

The node is called localhost, which every machine resolves: JAX looks for its coordinator by the name of the first node.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"

# A job that is past its limit is signalled but not killed: on a busy machine saving may take longer than it should.
# A job that was put back into the queue waits until its old credential has expired.
CONF = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SwitchType=switch/none
SlurmdParameters=config_overrides
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
OverTimeLimit=UNLIMITED
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why no cluster can be started here; None if one can."""
    path = f"{os.environ['PATH']}:{SBIN}"
    lacking = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if lacking:
        return f"{', '.join(lacking)} not installed: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "a SLURM node can be started by root only"


class Cluster:
    """A running cluster; its commands find it by `env`."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:{SBIN}"}

    def command(self, *words: str, **env: str) -> str:
        """Output of a command such as sbatch."""
        done = subprocess.run(words, env=self.env | env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr + self.logs()
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        return dict(re.findall(r"(\w+)=(\S*)", self.command("scontrol", "show", "job", number)))

    def logs(self) -> str:
        """The ends of the logs of controller and node."""
        logs = [self._folder / f"{name}.log" for name in ("slurmctld", "slurmd")]
        return "".join(f"\n{log.name}:\n{log.read_text()[-3000:]}" for log in logs if log.exists())


@contextlib.contextmanager
def cluster(folder: Path, cpus: int) -> Iterator[Cluster]:
    """Starts the cluster below an empty folder whose path is short, and ends it with all its jobs."""
    folder.chmod(0o755)
    for name in ("state", "spool", "munge"):
        (folder / name).mkdir()
    host = socket.gethostname()
    ports = _free_ports(2)
    conf = CONF.format(folder=folder, host=host, cpus=cpus, controller=ports[0], node=ports[1])
    (folder / "slurm.conf").write_text(conf)
    here = Cluster(folder)
    with contextlib.ExitStack() as stack:

        def daemon(*words: str, ready: Callable[[], bool]) -> None:
            log = stack.enter_context((folder / f"{words[0]}.out").open("w"))
            process = subprocess.Popen(words, env=here.env, stdout=log, stderr=subprocess.STDOUT)
            stack.callback(process.wait, 60)
            stack.callback(process.terminate)
            end = time.monotonic() + 60
            while not ready():
                said = (folder / f"{words[0]}.out").read_text() + here.logs()
                assert process.poll() is None, said
                assert time.monotonic() < end, said
                time.sleep(0.2)

        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"]
        munge += [f"--{name}-file={folder}/munge/{name}" for name in ("pid", "log", "seed")]
        key.chmod(0o600)
        assert pwd.getpwuid(key.stat().st_uid).pw_name == "root"
        daemon(*munge, ready=(folder / "munge.socket").exists)
        daemon("slurmctld", "-D", ready=lambda: _answers(here, "scontrol", "ping"))
        daemon(
            "slurmd",
            "-D",
            "-N",
            "localhost",
            ready=lambda: _answers(here, "sinfo", "--noheader", "-o", "%t", says="idle"),
        )
        stack.callback(_cancel_all, here)
        yield here


def _answers(here: Cluster, *words: str, says: str = "UP") -> bool:
    done = subprocess.run(words, env=here.env, capture_output=True, text=True, timeout=30, check=False)
    return done.returncode == 0 and says in done.stdout


def _cancel_all(here: Cluster) -> None:
    """Ends what still runs, so that nothing is left of a test that failed."""
    subprocess.run(["scancel", "--user=root", "--full", "--signal=KILL"], env=here.env, timeout=30, check=False)
    subprocess.run(["scancel", "--user=root"], env=here.env, timeout=30, check=False)
    end = time.monotonic() + 30
    while time.monotonic() < end and not _answers(here, "sinfo", "--noheader", "-o", "%t", says="idle"):
        time.sleep(0.5)


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
