"""What a check says.

Invariant: a finding that is not `ok` says what it costs and what to do.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Status = Literal["ok", "note", "warning", "failure"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    status: ok; note: optional, and not there; warning: works, at a price; failure: a run would not start or not last.
    found: what is there. cost: what its lack means. mend: a command, or what to change.
    """

    name: str
    status: Status
    found: str
    cost: str = ""
    mend: str = ""

    def __post_init__(self) -> None:
        assert self.status == "ok" or self.cost


@dataclass(frozen=True)
class Subject:
    """What the run in question asks of the machine; without a configuration, what any run asks.

    folders: key -> folder that is written to. reads: key -> path that must be there. hosts: slots of each host.
    checkpoint_bytes: what `num_checkpoints` of them together take.
    """

    device: str = "auto"
    num_processes: int = 1
    torch_compile: bool = False
    folders: Mapping[str, Path] = field(default_factory=dict)
    reads: Mapping[str, Path] = field(default_factory=dict)
    checkpoint_bytes: int = 0
    num_checkpoints: int = 1
    hosts: Mapping[str, int] = field(default_factory=dict)
    starter: str = ""
    ssh_port: int | None = None
    master_port: int | None = None
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    @property
    def other_hosts(self) -> list[str]:
        """Hosts of the hostfile but this one."""
        own = {"localhost", "127.0.0.1", socket.gethostname(), socket.gethostname().split(".")[0], socket.getfqdn()}
        return [host for host in self.hosts if host not in own]


def size(num_bytes: float) -> str:
    """`1.5 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
