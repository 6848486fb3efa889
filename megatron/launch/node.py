"""`deepy.py --node JOB_FILE`: the launcher of one host of a run. The first host's supervises the ranks of all.

Started on every host by pdsh, srun or mpirun; each finds its place from their variables. Invariant: it leaves no rank
running when it ends, or when the connection to the first host, or to whoever started it, breaks.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from megatron.common.errors import LaunchError
from megatron.common.rank import first_host
from megatron.config import Config
from megatron.launch.commands import RankCommand
from megatron.launch.environment import read_env_file
from megatron.launch.job import CONFIG_FILE, JOB_FILE, OUTCOME_FILE, STUCK_FILE, Job, gpus_here, require_resolvable
from megatron.launch.restarts import requeued, require_progress
from megatron.launch.spawn import FORWARDED, read_output, run_ranks, start_process
from megatron.launch.team import START_S, Team
from megatron.launch.wire import Channel, Message, connect, interface_of

# After the connection broke: how long ranks have to end on SIGTERM.
TERM_S = 5.0
# They would make libraries in the ranks believe that mpirun started these.
_MPI_VARIABLES = ("OMPI_COMM_WORLD_", "OMPI_UNIVERSE_", "PMI_", "PMIX_", "MPI_LOCAL", "MV2_COMM_WORLD_")


def main(argv: Sequence[str]) -> int:
    """Returns 0 once the run is over, however it ended: the first host's launcher writes the run's exit code to a file.

    Programs that start launchers report a code other than 0 in their own words and kill the others at once, which
    would bury the last words of the rank that failed.
    Raises: LaunchError if this launcher cannot take its place.
    """
    job = Job.read(argv[0])
    os.chdir(job.directory)
    os.environ.update(job.environment or read_env_file(os.environ))
    node = int(argv[1]) if len(argv) > 1 else node_index(os.environ, job.launcher)
    for name in [name for name in os.environ if name.startswith(_MPI_VARIABLES)]:
        del os.environ[name]
    if job.launcher == "pdsh":
        _end_with_connection()
    elif job.launcher == "openmpi":
        _leave_terminal()
    _check(job, node)
    address = job.master_addr or first_host(_node_list(os.environ))
    require_resolvable(address, "master_addr")
    if node == 0:
        code = _lead(job, address)
        # A batch script may have been submitted more than once.
        number = f"-{os.environ['SLURM_JOB_ID']}" if job.is_batch else ""
        outcome = Path(job.folder) / f"{OUTCOME_FILE}{number}"
        outcome.with_name(f".{outcome.name}").write_text(f"{code}\n", encoding="utf-8")
        outcome.with_name(f".{outcome.name}").rename(outcome)
        return 0
    _follow(job, node, address)
    return 0


def node_index(environment: Mapping[str, str], launcher: str) -> int:
    """Which host of the run this is, as srun or mpirun, which started one launcher per host, tell.

    Raises: LaunchError if neither does.
    """
    names = ("SLURM_PROCID",) if launcher == "slurm" else ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
    for name in names:
        if environment.get(name):
            return int(environment[name])
    raise LaunchError(
        f"none of {', '.join(names)} is set: deepy.py --node is started by pdsh, srun or mpirun, not by hand. Start "
        "./deepy.py train.py my.yml."
    )


def _node_list(environment: Mapping[str, str]) -> str:
    return environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""


def _check(job: Job, node: int) -> None:
    here = socket.gethostname()
    if node >= len(job.hosts):
        raise LaunchError(
            f"host {here} is number {node} of a run on {len(job.hosts)} hosts: one launcher per host is needed. "
            "Give srun --ntasks-per-node=1."
        )
    if not Path(job.script).is_file():
        raise LaunchError(
            f"host {here} sees no {Path(job.directory) / job.script}. All hosts must see the folder {job.directory}: "
            "start from a shared file system."
        )
    slots = job.hosts[node].slots
    needed = max(slots) + 1 if job.names_devices else len(slots)
    if job.device == "cuda" and gpus_here() < needed:
        raise LaunchError(f"host {here} is to run {len(slots)} processes on GPUs, and offers {gpus_here()} GPUs.")


def _lead(job: Job, address: str) -> int:
    """Supervise the whole run. Returns its exit code."""
    team = Team(job, on_signal=lambda number: os.kill(os.getpid(), number))
    try:
        team.gather()
        if job.environment:
            # Every launcher has read it, and it may hold secrets.
            (Path(job.folder) / JOB_FILE).unlink(missing_ok=True)
        _name_interface(team.local_address)
        port = job.master_port or _free_port()
        if job.master_port is not None:
            _require_free(port)
        commands = job.commands(port, address, _config_file(job))
        return run_ranks(commands, team.start, grace_mins=job.exit_grace_mins)
    finally:
        if stuck := team.disperse():
            lines = [f"{host} {pid}\n" for host, pid in stuck.items()]
            (Path(job.folder) / STUCK_FILE).write_text("".join(lines), encoding="utf-8")


def _name_interface(address: str | None) -> None:
    """Tell gloo the network on which the hosts reach each other, unless the user does.

    By itself it takes the address that this host's own name has, which in many an /etc/hosts is a loopback one.
    """
    name = interface_of(address) if address is not None else None
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _config_file(job: Job) -> str:
    """The configuration as it was submitted; when Slurm has started the job again, that which goes on."""
    if not job.is_batch or int(os.environ.get("SLURM_RESTART_COUNT") or 0) == 0:
        return CONFIG_FILE
    submitted = Path(job.folder) / CONFIG_FILE
    name = f"continued-{os.environ['SLURM_JOB_ID']}.json"
    config = requeued(Config.read(submitted), submitted.stat().st_mtime)
    require_progress(config, submitted.with_name(f"starts-{os.environ['SLURM_JOB_ID']}"))
    config.write(submitted.with_name(name))
    return name


def _free_port() -> int:
    with socket.create_server(("", 0)) as probe:
        return int(probe.getsockname()[1])


def _require_free(port: int) -> None:
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise LaunchError(
            f"master_port = {port} cannot be used on {socket.gethostname()} ({error.strerror}). Remove master_port or "
            "MASTER_PORT for a free one."
        ) from error


class _Hands:
    """Ranks of this host, for the first host's launcher."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, message: Message) -> None:
        rank = int(message["rank"])
        try:
            process = start_process(RankCommand(rank, message["arguments"], message["added"]), is_first=False)
        except OSError as error:
            self._channel.send({"rank": rank, "line": f"cannot start: {error}\n", "is_error": True})
            self._channel.send({"rank": rank, "exit": 3})
            return
        self._processes[rank] = process
        threading.Thread(target=self._watch, args=(rank, process), daemon=True).start()

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        def pass_on(line: str, is_error: bool) -> None:
            self._channel.send({"rank": rank, "line": line, "is_error": is_error})

        readers = read_output(process, pass_on)
        code = process.wait()
        # What it wrote last comes before its end, unless what it started holds its output open.
        for reader in readers:
            reader.join(timeout=1.0)
        self._channel.send({"rank": rank, "exit": code})

    def signal(self, number: int, rank: int | None = None) -> None:
        """To one rank and what it started, or to all."""
        for one, process in list(self._processes.items()):
            if rank is None or one == rank:
                _signal_group(process, number)

    def end(self) -> None:
        """Leave nothing behind: also what ended ranks have started."""
        running = [process for process in self._processes.values() if process.poll() is None]
        for process in running:
            _signal_group(process, signal.SIGTERM)
        deadline = time.monotonic() + TERM_S
        while any(process.poll() is None for process in running) and time.monotonic() < deadline:
            time.sleep(0.05)
        for process in self._processes.values():
            _signal_group(process, signal.SIGKILL)
            process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _follow(job: Job, node: int, address: str) -> None:
    """Do what the first host's launcher says until it is done or gone."""
    hello = {"node": node, "host": socket.gethostname(), "pid": os.getpid()}
    channel = connect(address, job.ports, job.token, hello, START_S)
    if channel is None:
        raise LaunchError(
            f"host {hello['host']} cannot reach the launcher on {address}: no answer on ports 20000-32000 within "
            f"{START_S:.0f} s. Set master_addr to an address of the first host that all hosts reach."
        )
    _name_interface(channel.local_address)
    hands = _Hands(channel)

    def forward(number: int, frame: FrameType | None) -> None:
        hands.signal(number)

    for number in FORWARDED:
        signal.signal(number, forward)
    while (message := channel.receive()) is not None and message["do"] != "leave":
        if message["do"] == "start":
            hands.start(message)
        else:
            hands.signal(int(message["signal"]), int(message["rank"]))
    if message is None:
        print(
            f"{hello['host']}: the connection to the launcher on {address} broke; ending", file=sys.stderr, flush=True
        )
    hands.end()
    channel.close()


def _leave_terminal() -> None:
    """Open MPI makes stdout a terminal, which it is not: a live progress line would fill the user's screen."""
    if os.isatty(1):
        copier = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=1, process_group=0)
        assert copier.stdin is not None
        os.dup2(copier.stdin.fileno(), 1)
        copier.stdin.close()


def _end_with_connection() -> None:
    """End when pdsh, which holds our stdin open and writes nothing, is gone; deepy.py has then ended, or was killed."""

    def watch() -> None:
        poll = select.poll()
        poll.register(0, select.POLLHUP | select.POLLERR | select.POLLIN)
        while True:
            poll.poll()
            if not os.read(0, 4096):
                break
        # Ranks see SIGTERM first; the kernel kills whatever is left when this process ends.
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(TERM_S)
        os._exit(143)

    threading.Thread(target=watch, daemon=True).start()
