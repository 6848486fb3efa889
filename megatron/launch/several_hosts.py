"""Start a run on several hosts, pass signals on to it, and end with its exit code.

Invariant: when `run_job` returns or this process dies, by whatever signal, no launcher of the job is left on any host,
and neither is its folder, unless this process was killed.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from megatron.common.errors import LaunchError
from megatron.common.rank import first_host
from megatron.config import Config
from megatron.launch.environment import exported, read_env_file, shown
from megatron.launch.job import (
    CONFIG_FILE,
    FOLDER,
    JOB_FILE,
    OUTCOME_FILE,
    STUCK_FILE,
    Job,
    make_folder,
    plan_job,
    remove_folder,
    require_resolvable,
)
from megatron.launch.spawn import FORWARDED, die_with_parent
from megatron.launch.starters import Starter, starter
from megatron.launch.wire import connect

PROBE_S, MAX_PROBES = 15, 64
# How long the starting program may take to end once a signal could not be passed on, or a host failed to start.
END_S = 5.0
# How long the run may take to end by itself once a host failed.
OWN_END_S = 8.0
# What srun says about --cpu-bind=none on clusters that bind nothing anyway.
_NOISE = "srun: cluster configuration lacks support for cpu binding"
# Exit codes of the probe, chosen to be nobody else's.
_NO_FOLDER, _NO_FILE, _NO_PYTHON = 81, 82, 83


def job_environment(config: Config, environment: Mapping[str, str]) -> dict[str, str]:
    """What each host's launcher sets. srun carries the environment itself, and .deepspeed_env is read there."""
    if config.launcher.launcher == "slurm":
        return {}
    return {**exported(environment), **read_env_file(environment)}


def run_job(config: Config, script: str) -> int:
    """Start the script on all hosts and wait for its end. Returns its exit code.

    Raises: LaunchError if a host cannot be reached or does not see the files, before anything starts.
    """
    folder = make_folder()
    try:
        job = plan_job(config, script, folder, os.environ)
        job = dataclasses.replace(job, environment=job_environment(config, os.environ))
        address = job.master_addr or first_host(os.environ.get("SLURM_JOB_NODELIST", ""))
        require_resolvable(address, _origin_of_address(config))
        line = starter(config, job)
        config.write(folder / CONFIG_FILE)
        file = job.write()
        if job.launcher != "slurm" and not config.launcher.no_ssh_check:
            check_hosts(job, file, config.launcher.ssh_port)
        return _Front(job, line, address).run()
    finally:
        remove_folder(folder)


def _origin_of_address(config: Config) -> str:
    if config.launcher.master_addr:
        return config.origin("master_addr")
    if os.environ.get("MASTER_ADDR"):
        return "the environment variable MASTER_ADDR"
    return "SLURM_JOB_NODELIST" if config.launcher.launcher == "slurm" else config.origin("hostfile")


def describe_job(config: Config, script: str) -> str:
    """What `run_job` would start where, with which environment, for --dry-run. Contacts no host, writes nothing."""
    folder = Path.cwd() / FOLDER / "JOB"
    job = plan_job(config, script, folder, os.environ)
    line = starter(config, job)
    environment = job_environment(config, os.environ)
    lines = [f"# starts one launcher on each of {len(job.hosts)} hosts", line.shell_line(), ""]
    lines.append(f"# {folder} holds {JOB_FILE} (readable by you only), {CONFIG_FILE}; from there the launchers set")
    lines += [f"{name}={shlex.quote(shown(name, value))}" for name, value in sorted(environment.items())]
    if job.launcher == "slurm":
        lines.append("# and srun gives them the environment of this shell")
    for command in job.commands(job.master_port or "FREE_PORT", job.master_addr or "FIRST_HOST"):
        if command.added["LOCAL_RANK"] == "0":
            lines += ["", f"# {job.hosts[command.node].name or f'node {command.node}'}"]
        lines.append(command.shell_line())
    if job.master_port is None:
        lines += ["", "# FREE_PORT: a port that is free on the first host when the run starts"]
    return "\n".join(lines)


def job_values(config: Config, script: str) -> dict[str, Any]:
    """`describe_job` as plain values."""
    job = plan_job(config, script, Path.cwd() / FOLDER / "JOB", os.environ)
    environment = job_environment(config, os.environ)
    ranks = job.commands(job.master_port or "FREE_PORT", job.master_addr or "FIRST_HOST")
    return {
        "start": starter(config, job).values(),
        "environment": {name: shown(name, value) for name, value in sorted(environment.items())},
        "ranks": [{**rank.values(), "host": job.hosts[rank.node].name} for rank in ranks],
    }


def check_hosts(job: Job, file: Path, ssh_port: int | None) -> None:
    """Raises: LaunchError naming every host that ssh does not reach or that does not see the run's files."""
    probe = (
        f"cd {shlex.quote(job.directory)} || exit {_NO_FOLDER}; test -r {shlex.quote(str(file))} || exit {_NO_FILE}; "
        f"test -x {shlex.quote(sys.executable)} || exit {_NO_PYTHON}"
    )
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={PROBE_S}"] + (["-p", str(ssh_port)] if ssh_port else [])

    def problem(host: str) -> str | None:
        try:
            done = subprocess.run(
                ["ssh", *options, host, probe],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=2 * PROBE_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{host}: ssh: {error}"
        reason = {
            _NO_FOLDER: f"has no folder {job.directory}",
            _NO_FILE: f"cannot read {file}",
            _NO_PYTHON: f"has no {sys.executable}",
        }.get(done.returncode)
        if reason is not None:
            return f"{host} {reason}; start from a file system that all hosts share, with Python on it as well"
        if done.returncode != 0:
            words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            return f"{host}: ssh says: {words[-1]}"
        return None

    hosts = [host.name for host in job.hosts]
    with concurrent.futures.ThreadPoolExecutor(min(MAX_PROBES, len(hosts))) as pool:
        problems = [text for text in pool.map(problem, hosts) if text is not None]
    if problems:
        raise LaunchError(
            "\n  ".join(["not every host can take part:", *problems])
            + "\nTry `ssh HOST true` by hand: it must work without a password. no_ssh_check: true skips this check."
        )


class _Front:
    """The program that starts the launchers, and the user's signals."""

    def __init__(self, job: Job, line: Starter, address: str) -> None:
        self._job, self._line, self._address = job, line, address
        self._failed_to_start = False
        self._asked = 0

    def run(self) -> int:
        previous = {number: signal.signal(number, self._forward) for number in FORWARDED}
        # In a session of its own: Ctrl-C is ours to pass on, once, to the ranks.
        process = subprocess.Popen(
            self._line.arguments,
            env={**os.environ, **self._line.added},
            stdin=subprocess.DEVNULL if self._job.launcher == "slurm" else subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=lambda: die_with_parent(signal.SIGTERM),
        )
        self._process = process
        reader = threading.Thread(target=self._pass_on, daemon=True)
        reader.start()
        try:
            code = self._wait()
        finally:
            if process.poll() is None:
                self._end()
            for number, handler in previous.items():
                signal.signal(number, handler)
        reader.join(timeout=1.0)
        outcome = Path(self._job.folder) / OUTCOME_FILE
        if outcome.exists():
            return int(outcome.read_text(encoding="utf-8"))
        if self._asked:
            return 128 + self._asked
        raise LaunchError(
            f"the launcher of a host ended before the run was over ({self._line.arguments[0]}: exit code {code}); what "
            "it said stands above. The line was:\n  " + self._line.shell_line()
        )

    def _wait(self) -> int:
        """The exit code of the starting program, which is ended if a launcher keeps it after the run is over."""
        outcome, over_at = Path(self._job.folder) / OUTCOME_FILE, 0.0
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._process.wait(timeout=1.0)
            over_at = over_at or (time.monotonic() if outcome.exists() else 0.0)
            if over_at and time.monotonic() - over_at > END_S:
                self._clean_up()

    def _clean_up(self) -> None:
        """End launchers that did not let go, by their process ids; the ranks that they started end with them."""
        stuck = Path(self._job.folder) / STUCK_FILE
        lines = stuck.read_text(encoding="utf-8").splitlines() if stuck.exists() else []
        for line in lines if self._job.launcher == "pdsh" else ():
            host, pid = line.split()
            print(f"{host}: the launcher (process {pid}) does not answer; killing it", file=sys.stderr, flush=True)
            # Not whatever has that number by now.
            kill = f"grep -q -e --node /proc/{pid}/cmdline && kill -KILL {pid}"
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run(
                    [self._line.arguments[0], "-w", host, kill],
                    env={**os.environ, **self._line.added},
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    timeout=PROBE_S,
                    check=False,
                )
        self._end()

    def _pass_on(self) -> None:
        assert self._process.stderr is not None
        for raw in self._process.stderr:
            text = raw.decode("utf-8", "replace")
            if text.startswith(_NOISE):
                continue
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(text)
                sys.stderr.flush()
            # pdsh waits for all hosts, and those that did start wait for this one.
            if text.startswith("pdsh@") and "exited with exit code" in text and not self._failed_to_start:
                self._failed_to_start = True
                threading.Thread(target=self._end_unless_over, daemon=True).start()

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._asked = number
        threading.Thread(target=self._tell, args=(number,), daemon=True).start()

    def _tell(self, number: int) -> None:
        """Give the first host's launcher the signal; if it does not answer, end the program that started it."""
        hello = {"signal": number, "host": socket.gethostname()}
        channel = connect(self._address, self._job.ports, self._job.token, hello, timeout_s=10.0)
        if channel is not None:
            channel.close()
        elif number in (signal.SIGINT, signal.SIGTERM):
            self._end()

    def _end_unless_over(self) -> None:
        """A host's launcher failed. If the first host's has met it, it ends the run in good order, with the reason."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=OWN_END_S)
        self._end()

    def _end(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            deadline = time.monotonic() + END_S
            while self._process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
