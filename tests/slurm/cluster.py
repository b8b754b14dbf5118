"""A real SLURM cluster of a few simulated nodes on this machine: loopback only, no systemd, no cgroups, no database.

Each slurmd runs in its own UTS namespace, so that nodes have their own host names. All files are in one folder with a
short path (unix sockets need short paths). `stop` ends all jobs and daemons.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "unshare")
_PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
_MARK = "# recycle-ds-tests"

_CONF = """
ClusterName=tests
SlurmctldHost=localhost(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={port}
AuthType=auth/munge
CredType=cred/munge
# cred_expire is how long a requeued job waits before it may start again
AuthInfo=socket={root}/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={root}/ctld
SlurmdSpoolDir={root}/%n
TmpFS={root}/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
EnforcePartLimits=ALL
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
InactiveLimit=0
KillWait=15
MinJobAge=900
JobRequeue=1
GresTypes=gpu
NodeName=DEFAULT CPUs=8 RealMemory=8000 Gres=gpu:4 State=UNKNOWN
NodeName=node[1-{nodes}] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{last}]
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# The GPUs are links to /dev/null, which nothing opens. A job gets CUDA_VISIBLE_DEVICES as on a node with GPUs.
_GRES = "AutoDetect=off\nNodeName=node[1-{nodes}] Name=gpu File={root}/gpu[0-3]\n"


def unavailable_reason() -> str | None:
    """Why no cluster can be started here, or None."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge"
    if os.geteuid() != 0:
        return "simulated nodes need root (UTS namespaces, /etc/hosts)"
    return None


class Cluster:
    """The constructor starts the cluster. `environment` has the variables that clients (sbatch, scontrol, ...) need."""

    def __init__(self, root: Path, nodes: int = 2) -> None:
        self.root, self.nodes = root, [f"node{number}" for number in range(1, nodes + 1)]
        root.chmod(0o755)  # munged requires that its socket's folder is accessible to all users
        ports = _free_ports(nodes + 1)
        for name in ("ctld", *self.nodes):
            (root / name).mkdir(parents=True)
        for number in range(4):
            (root / f"gpu{number}").symlink_to("/dev/null")
        values = {"root": root, "nodes": nodes, "user": getpass.getuser()}
        conf = _CONF.format(**values, port=ports, first=ports + 1, last=ports + nodes)
        (root / "slurm.conf").write_text(conf)
        (root / "gres.conf").write_text(_GRES.format(**values))
        self.environment = os.environ | {"PATH": _PATH, "SLURM_CONF": str(root / "slurm.conf")}
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def run(self, *command: str, check: bool = True, **environment: str) -> str:
        """Runs a client and returns its output. Raises AssertionError with its error message."""
        done = subprocess.run(
            command, capture_output=True, text=True, env=self.environment | environment, timeout=60, check=False
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr or done.stdout}"
        return done.stdout

    def start_slurmd(self, node: str) -> None:
        """Starts a node's daemon, under the node's host name."""
        self.run("unshare", "--uts", "sh", "-c", 'hostname "$1" && exec slurmd -N "$1"', "sh", node)

    def kill_slurmd(self, node: str) -> None:
        """Kills a node's daemon, like a crash. The processes it started keep running."""
        os.kill(int((self.root / f"slurmd.{node}.pid").read_text()), signal.SIGKILL)

    def stop(self) -> None:
        """Ends jobs and daemons, by their pid files, and removes the node names from /etc/hosts."""
        running = (self.root / "slurmctld.pid").exists()
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired, OSError):
            if not running:
                raise OSError("slurmctld is not running")
            self.run("scancel", f"--user={getpass.getuser()}", check=False)
            deadline = time.monotonic() + 20
            while self.run("squeue", "-h", check=False).strip() and time.monotonic() < deadline:
                time.sleep(0.2)
        for name in ("slurmctld.pid", *(f"slurmd.{node}.pid" for node in self.nodes), "munged.pid"):
            _end(self.root / name)
        hosts = Path("/etc/hosts").read_text().splitlines(keepends=True)
        kept = [line for line in hosts if _MARK not in line]
        if kept != hosts:
            Path("/etc/hosts").write_text("".join(kept))

    def _start(self) -> None:
        for name in (*self.nodes, socket.gethostname()):
            if subprocess.run(["getent", "hosts", name], capture_output=True, check=False).returncode:
                with Path("/etc/hosts").open("a") as hosts:
                    hosts.write(f"127.0.0.1 {name} {_MARK}\n")
        key = self.root / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        options = {"key-file": key, "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log"}
        flags = [f"--{name}={self.root / value}" for name, value in options.items()]
        self.run("munged", *flags, f"--seed-file={self.root / 'munge.seed'}", "--num-threads=2")
        self.run("slurmctld", "-c")
        for node in self.nodes:
            self.start_slurmd(node)
        deadline = time.monotonic() + 60
        while self.run("sinfo", "-h", "-N", "-o", "%T", check=False).split() != ["idle"] * len(self.nodes):
            assert time.monotonic() < deadline, f"the nodes do not come up; logs are in {self.root}"
            time.sleep(0.2)


def _free_ports(count: int) -> int:
    """The first of `count` adjacent unused TCP ports."""
    for first in range(17_000, 19_000, count):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise AssertionError("no free ports")


def _end(pid_file: Path) -> None:
    try:
        pid = int(pid_file.read_text())
        os.kill(pid, signal.SIGTERM)
    except (OSError, ValueError):
        return
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return
        if state == "Z":
            return
        time.sleep(0.05)
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)
