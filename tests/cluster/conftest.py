"""A real cluster of two nodes on this machine: Slurm, ssh with pdsh, Open MPI and MPICH; see cluster.sh.

Missing packages are installed only where CLUSTER_INSTALL=1 says that this machine may be changed, as .ci/run does;
elsewhere the tests are skipped and the missing programs named.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("cluster.sh")
# Program -> Debian package.
PROGRAMS = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "srun": "slurm-client",
    "munged": "munge",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
    "mpirun.openmpi": "openmpi-bin",
    "mpiexec.hydra": "mpich",
    "ip": "iproute2",
    "nsenter": "util-linux",
}
PATHS = f"{os.environ['PATH']}:/usr/sbin:/sbin"


class Cluster:
    """node1 and node2, each with its own address, host name, process table and shared memory; and a login host."""

    def __init__(self, folder: Path) -> None:
        self.environment = {
            **os.environ,
            "PATH": PATHS,
            "CLUSTER_DIR": str(folder),
            "CLUSTER_GPUS": "0",
            # Also how long a requeued job waits.
            "CLUSTER_CRED_EXPIRE": "8",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        }
        for name in [name for name in self.environment if name.startswith(("SLURM_", "PMI", "OMPI_COMM", "RANK"))]:
            del self.environment[name]

    def control(self, *arguments: str, timeout: float = 180) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(SCRIPT), *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def start(self, *command: str, cwd: Path, **environment: str) -> subprocess.Popen[str]:
        """A command on the login host."""
        return subprocess.Popen(
            ["bash", str(SCRIPT), "--exec", *command],
            env={**self.environment, **environment},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str, cwd: Path, timeout: float = 120, **environment: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a command on the login host."""
        process = self.start(*command, cwd=cwd, **environment)
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            if process.poll() is None:
                process.terminate()
                process.communicate(timeout=30)
        return process.returncode, out, err


def processes(mark: str) -> dict[int, str]:
    """Command lines of the running processes, of all nodes, that hold a text."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
        if mark in line and int(path.parent.name) != os.getpid():
            found[int(path.parent.name)] = line
    return found


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.05)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if sys.platform != "linux":
        pytest.skip("needs Linux: each node of the cluster is a set of namespaces")
    may_install = os.environ.get("CLUSTER_INSTALL") == "1"
    missing = [package for program, package in PROGRAMS.items() if not shutil.which(program, path=PATHS)]
    if missing and not may_install:
        pytest.skip(f"needs {', '.join(missing)}; CLUSTER_INSTALL=1 installs them with apt-get")
    if missing and not shutil.which("apt-get"):
        pytest.skip(f"needs {', '.join(missing)}, and there is no apt-get to install them")
    folder = Path(tempfile.mkdtemp(prefix="cluster-"))
    one = Cluster(folder)
    if missing:
        one.environment["CLUSTER_APT"] = " ".join(missing)
    with open(Path(tempfile.gettempdir()) / "cluster-tests.lock", "w") as lock:
        # Two workers of one test run would meet at apt's own lock, which does not wait.
        fcntl.flock(lock, fcntl.LOCK_EX)
        started = one.control("up", timeout=300)
    try:
        if started.returncode != 0:
            reason = started.stdout.strip().splitlines() or started.stderr.strip().splitlines() or ["no reason given"]
            pytest.skip(f"no cluster on this machine: {reason[-1]}")
        yield one
    finally:
        one.control("--down")
        shutil.rmtree(folder, ignore_errors=True)
