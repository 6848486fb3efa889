"""Ports, interfaces, and the other hosts of a hostfile, each asked through ssh.

A host is asked one question that is answered in a second: its Python, this project's folder, its clock, and whether it
reaches this host by TCP. Invariant: every connection has a time limit; no password is ever asked for.
"""

from __future__ import annotations

import json
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron.doctor.finding import Finding, Status, Subject

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "-o", "StrictHostKeyChecking=accept-new")
TIMEOUT_S = 15.0
SKEW_S = 5.0
# What starts processes on other hosts -> the program that it needs.
STARTERS = {"pdsh": "pdsh", "openmpi": "mpirun", "mpich": "mpirun", "mvapich": "mpirun", "slurm": "srun"}
# Run by the other host's own Python, so it is kept to what every Python 3 has.
_QUESTION = """
import json, os, socket, sys, time
answer = {"python": "%d.%d" % sys.version_info[:2], "time": time.time(), "folder": os.path.isdir(FOLDER)}
try:
    socket.create_connection((ADDRESS, PORT), 5).close()
    answer["reaches"] = True
except Exception as error:
    answer["reaches"] = False
    answer["why"] = str(error)
try:
    from importlib.metadata import version
    answer["torch"] = version("torch")
except Exception:
    answer["torch"] = None
print(json.dumps(answer))
"""


def check_port(subject: Subject) -> Finding:
    """The rendezvous port, where one is set; else that this host hands out ports."""
    port = subject.master_port or 0
    name = f"master_port = {port}" if port else "ports"
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
            probe.listen()
    except OSError as error:
        cost = "the ranks cannot meet there"
        return Finding(
            name,
            "failure",
            f"{error.strerror}",
            cost,
            "remove master_port: a free one is taken; or end what uses it (ss -ltnp)",
        )
    return Finding(name, "ok", "free" if port else "free ones are handed out")


def check_name(subject: Subject, hostname: str | None = None) -> Finding:
    """That this host's own name leads to an address, and with several hosts to one that others can use."""
    hostname = hostname or socket.gethostname()
    mend = f"add `ADDRESS {hostname}` to /etc/hosts, or set master_addr"
    try:
        address = socket.gethostbyname(hostname)
    except OSError as error:
        status: Status = "failure" if subject.other_hosts else "warning"
        cost = "torch cannot look up where to listen, and waits for its time limits"
        return Finding("host name", status, f"{hostname}: {error}", cost, mend)
    if address.startswith("127.") and subject.other_hosts:
        cost = "the other hosts would look for rank 0 on themselves"
        return Finding(
            "host name", "failure", f"{hostname} is {address}", cost, "set master_addr to an address that they reach"
        )
    return Finding("host name", "ok", f"{hostname} is {address}")


def check_interfaces(subject: Subject) -> list[Finding]:
    """That interfaces named in the environment exist."""
    there = [name for _, name in socket.if_nameindex()]
    findings = []
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        wanted = subject.environment.get(variable, "")
        names = [name.strip("^=") for name in wanted.split(",") if name]
        if wanted.startswith("^") or not names:
            continue
        # NCCL takes a name as a prefix, unless it begins with =.
        exact = variable.startswith("GLOO") or wanted.startswith("=")
        if not any(name == has or (not exact and has.startswith(name)) for name in names for has in there):
            cost = "no collective operation would start"
            findings.append(
                Finding(variable, "failure", f"{wanted}, and there are {', '.join(there)}", cost, f"unset {variable}")
            )
    return findings or [Finding("network interfaces", "ok", ", ".join(there))]


def check_hosts(subject: Subject, ssh: tuple[str, ...] = SSH) -> list[Finding]:
    """Every other host of the hostfile."""
    hosts = subject.other_hosts
    if not hosts:
        return []
    if subject.ssh_port is not None:
        ssh = (*ssh, "-p", str(subject.ssh_port))
    findings = []
    program = STARTERS.get(subject.starter)
    if program and shutil.which(program) is None:
        cost = f"launcher: {subject.starter} starts processes through it"
        findings.append(
            Finding(
                program,
                "failure",
                "not found",
                cost,
                f"apt-get install {program if program == 'pdsh' else subject.starter}, or another launcher",
            )
        )
    if shutil.which(ssh[0]) is None:
        cost = f"{', '.join(hosts)} cannot be asked"
        return [*findings, Finding("ssh", "warning", "not found", cost, "apt-get install openssh-client")]
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen(len(hosts))
        accepting = threading.Thread(target=_accept, args=(listener,), daemon=True)
        accepting.start()
        port = listener.getsockname()[1]
        with ThreadPoolExecutor(min(32, len(hosts))) as pool:
            answers = list(pool.map(lambda host: check_host(host, port, ssh), hosts))
        listener.shutdown(socket.SHUT_RDWR)
    return [*findings, *answers]


def check_host(host: str, port: int, ssh: tuple[str, ...] = SSH) -> Finding:
    """One other host. port: where this host listens meanwhile."""
    name = f"host {host}"
    try:
        socket.gethostbyname(host)
    except OSError as error:
        return Finding(
            name,
            "failure",
            f"{error}",
            "its processes cannot be started",
            f"add {host} to /etc/hosts, or correct the hostfile",
        )
    folder = Path.cwd()
    question = f"FOLDER={str(folder)!r}\nADDRESS={_own_address(host)!r}\nPORT={port}\n{_QUESTION}"
    before = time.time()
    try:
        done = subprocess.run(
            [*ssh, host, f"python3 -c {shlex.quote(question)}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Finding(
            name,
            "failure",
            f"no answer in {TIMEOUT_S:.0f} s",
            "its processes cannot be started",
            f"try: ssh {host} true",
        )
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Finding(
            name, "failure", said, "its processes cannot be started", f"ssh-copy-id {host}, then try: ssh {host} true"
        )
    return _judge(name, host, folder, answer, (before + time.time()) / 2)


def _judge(name: str, host: str, folder: Path, answer: dict[str, Any], asked_at: float) -> Finding:
    if not answer["reaches"]:
        cost = "its ranks cannot meet rank 0 here"
        return Finding(
            name,
            "failure",
            f"does not reach this host: {answer['why']}",
            cost,
            "open the firewall between the hosts, or set master_addr and NCCL_SOCKET_IFNAME",
        )
    if not answer["folder"]:
        cost = "the project and the data must lie at the same path on all hosts"
        return Finding(
            name, "failure", f"has no {folder}", cost, f"rsync -a {folder}/ {host}:{folder}/, or share the disk"
        )
    skew = answer["time"] - asked_at
    if abs(skew) > SKEW_S:
        cost = "times in logs do not compare, and time limits are judged wrongly"
        return Finding(name, "warning", f"its clock is {skew:+.0f} s off", cost, "timedatectl set-ntp true, on both")
    own = f"{sys.version_info[0]}.{sys.version_info[1]}"
    found = f"reachable both ways, python3 is {answer['python']}, torch {answer['torch'] or 'not in it'}"
    if answer["python"] != own and answer["torch"]:
        return Finding(name, "warning", found, f"Python here is {own}", "use the same environment on all hosts")
    return Finding(name, "ok", found)


def _own_address(host: str) -> str:
    """The address of this host on the way to another."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()


def _accept(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
            connection.close()
        except OSError:
            return
