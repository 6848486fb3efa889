"""The ranks of other hosts, as the first host's launcher sees them.

Every other host runs a launcher too (`megatron.launch.node`), which does as it is told and decides nothing: it starts
ranks, passes on signals and output, and tells how they end. Invariant: a host whose connection breaks has no rank
running, because its launcher ends them, and counts as failed here.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable

from megatron.common.errors import LaunchError
from megatron.launch.commands import RankCommand
from megatron.launch.error_reports import ErrorReports
from megatron.launch.job import Job
from megatron.launch.spawn import Rank
from megatron.launch.wire import Channel, Message, listen, welcome

# How long the slowest host may take to start its launcher; and after which the user hears whom we wait for.
START_S, PATIENCE_S = 600.0, 20.0
# A launcher that is not dead but frozen: how long it has to answer.
UNANSWERED_S = 5.0


class RemoteProcess:
    """Of a rank on another host: how it ended, once that is known."""

    def __init__(self) -> None:
        self.returncode: int | None = None
        self._ended = threading.Event()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self) -> int:
        self._ended.wait()
        return self.returncode or 0

    def end(self, code: int) -> None:
        """The first word counts."""
        if not self._ended.is_set():
            self.returncode = code
            self._ended.set()


class RemoteRank(Rank):
    """A rank on another host."""

    def __init__(self, number: int, reports: ErrorReports, host: str, channel: Channel) -> None:
        super().__init__(number, reports, host)
        self.process = self.remote = RemoteProcess()
        self._channel = channel

    def send(self, number: int) -> None:
        self._channel.send({"do": "signal", "rank": self.number, "signal": number})
        if number == signal.SIGKILL and self.remote.poll() is None:
            # A launcher that does not tell how a killed rank ended does not answer at all; see `Team.disperse`.
            timer = threading.Timer(UNANSWERED_S, self.remote.end, (-signal.SIGKILL,))
            timer.daemon = True
            timer.start()


class Team:
    """The launchers of all hosts but this first one."""

    def __init__(self, job: Job, on_signal: Callable[[int], None]) -> None:
        """Listen for them. on_signal: what to do if someone asks this run to be sent a signal.

        Raises: LaunchError if none of the job's ports is free.
        """
        self._job = job
        self._on_signal = on_signal
        self._hosts: dict[int, tuple[str, Channel]] = {}
        self._pids: dict[int, int] = {}
        self._ranks: dict[int, dict[int, RemoteRank]] = {}
        self._arrived = threading.Condition()
        self._over = False
        try:
            self._listener = listen(job.ports)
        except OSError as error:
            raise LaunchError(
                f"on {socket.gethostname()} none of the ports {', '.join(map(str, job.ports))} can be listened on "
                f"({error}). Start again."
            ) from error
        threading.Thread(target=self._accept, daemon=True).start()

    def gather(self) -> None:
        """Wait until every host's launcher has come. Raises: LaunchError naming those that did not."""
        begun = time.monotonic()
        warned = begun
        with self._arrived:
            while missing := [n for n in range(1, len(self._job.hosts)) if n not in self._hosts]:
                self._arrived.wait(1.0)
                now = time.monotonic()
                names = ", ".join(self._job.hosts[n].name or f"node {n}" for n in missing)
                if now - begun > START_S:
                    raise LaunchError(
                        f"after {START_S:.0f} s the launchers of these hosts have not reached {socket.gethostname()}: "
                        f"{names}. They must be able to connect to {self._job.master_addr or 'it'} on ports "
                        "20000-32000 (firewall), and to see this folder."
                    )
                if now - warned > PATIENCE_S:
                    warned = now
                    print(f"note: waiting for {names} to start", flush=True)

    @property
    def local_address(self) -> str | None:
        """The address at which the others reach this host; None without others."""
        with self._arrived:
            return next((channel.local_address for _, channel in self._hosts.values()), None)

    def start(self, command: RankCommand, reports: ErrorReports) -> RemoteRank:
        """Start a rank on its host."""
        host, channel = self._hosts[command.node]
        rank = RemoteRank(command.rank, reports, host, channel)
        self._ranks.setdefault(command.node, {})[command.rank] = rank
        message = {"do": "start", "rank": command.rank, "arguments": command.arguments, "added": command.added}
        if not channel.send(message):
            rank.remote.end(-signal.SIGKILL)
        return rank

    def disperse(self, timeout_s: float = UNANSWERED_S) -> dict[str, int]:
        """Tell all hosts that the run is over, and wait until their launchers have let go.

        Returns: the process ids of those that have not, by the name of their host in the job.
        """
        self._over = True
        with self._arrived:
            channels = [channel for _, channel in self._hosts.values()]
        for channel in channels:
            channel.send({"do": "leave"})
            channel.finish()
        deadline = time.monotonic() + timeout_s
        with self._arrived:
            while self._hosts and time.monotonic() < deadline:
                self._arrived.wait(0.2)
            stuck = {self._job.hosts[node].name: self._pids[node] for node in self._hosts}
        with contextlib.suppress(OSError):
            self._listener.close()
        return stuck

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        found = welcome(connection, self._job.token)
        if found is None:
            return
        channel, hello = found
        if "signal" in hello:
            self._on_signal(int(hello["signal"]))
            channel.close()
            return
        node, host = int(hello["node"]), str(hello["host"])
        with self._arrived:
            if node in self._hosts:
                channel.send({"do": "leave"})
                channel.close()
                return
            self._hosts[node] = (host, channel)
            self._pids[node] = int(hello["pid"])
            self._arrived.notify_all()
        while (message := channel.receive()) is not None:
            self._take(node, message)
        with self._arrived:
            del self._hosts[node]
            self._arrived.notify_all()
        self._lose(node, host)
        channel.close()

    def _take(self, node: int, message: Message) -> None:
        rank = self._ranks.get(node, {}).get(int(message["rank"]))
        if rank is None:
            return
        if "line" in message:
            rank.take(str(message["line"]), bool(message["is_error"]))
        else:
            rank.remote.end(int(message["exit"]))

    def _lose(self, node: int, host: str) -> None:
        """A host's connection is over. In the midst of the run that is a failure of the host."""
        running = [rank for rank in self._ranks.get(node, {}).values() if rank.process.poll() is None]
        for rank in running:
            if not self._over:
                rank.last_words.append(f"the connection to {host} broke: the host or its launcher died\n")
            rank.remote.end(-signal.SIGKILL)
