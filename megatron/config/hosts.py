"""Hostfiles: which hosts with how many slots each, after include, exclude and num_nodes.

Contacts no host. Invariant: the order of the hosts is that of the file.
"""

from __future__ import annotations

import re
from pathlib import Path


class HostfileError(Exception):
    """The hostfile or a filter on it is wrong; the message says how."""


def read_hosts(
    path: str, include: str | None = None, exclude: str | None = None, num_nodes: int = -1
) -> dict[str, int]:
    """Slots per host. Raises: HostfileError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise HostfileError(f"hostfile = {path} cannot be read ({error.strerror}).") from error
    hosts: dict[str, list[int]] = {}
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.split("#", 1)[0].strip()
        if not line:
            continue
        match = re.fullmatch(r"(\S+)\s+slots\s*=\s*([1-9][0-9]*)", line)
        if match is None:
            raise HostfileError(f"{path}:{number}: `{line}` is not of the form `host slots=N`.")
        if match[1] in hosts:
            raise HostfileError(f"{path}:{number}: host {match[1]} is named twice.")
        hosts[match[1]] = list(range(int(match[2])))
    if not hosts:
        raise HostfileError(f"{path} names no host. Write one `host slots=N` per line.")
    if include and exclude:
        raise HostfileError("include and exclude cannot both be set.")
    if include:
        chosen = _parse_filter(include, hosts)
        hosts = {host: chosen[host] or hosts[host] for host in hosts if host in chosen}
    elif exclude:
        dropped = _parse_filter(exclude, hosts)
        hosts = {
            host: [slot for slot in slots if slot not in dropped[host]] if host in dropped else slots
            for host, slots in hosts.items()
            if host not in dropped or dropped[host]
        }
    counts = {host: len(slots) for host, slots in hosts.items() if slots}
    return dict(list(counts.items())[:num_nodes]) if num_nodes > 0 else counts


def _parse_filter(text: str, hosts: dict[str, list[int]]) -> dict[str, list[int]]:
    chosen: dict[str, list[int]] = {}
    for part in text.split("@"):
        host, _, slots = part.strip().partition(":")
        if host not in hosts:
            raise HostfileError(f"host {host} in `{text}` is not in the hostfile ({', '.join(hosts)}).")
        try:
            numbers = [int(slot) for slot in slots.split(",")] if slots else []
        except ValueError as error:
            raise HostfileError(f"`{part}` is not of the form NODE[:SLOT,...].") from error
        missing = [slot for slot in numbers if slot not in hosts[host]]
        if missing:
            raise HostfileError(f"host {host} has no slot {missing[0]}; its slots are 0 to {len(hosts[host]) - 1}.")
        chosen[host] = numbers
    return chosen
