"""Hostfiles: which hosts with how many slots each, after include, exclude and num_nodes.

Contacts no host. Invariant: the order of the hosts is that of the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

DEFAULT_HOSTFILE = "/job/hostfile"


class HostfileError(Exception):
    """The hostfile or a filter on it is wrong; the message says how."""


def read_hosts(
    path: str, include: str | None = None, exclude: str | None = None, num_nodes: int = -1
) -> dict[str, int]:
    """Slots per host. Raises: HostfileError."""
    return {host: len(slots) for host, slots in read_slots(path, include, exclude, num_nodes).items()}


def read_slots(
    path: str, include: str | None = None, exclude: str | None = None, num_nodes: int = -1
) -> dict[str, list[int]]:
    """The numbers of the slots to use on each host to use. Raises: HostfileError."""
    hosts = _parse_file(path)
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
        hosts = {host: slots for host, slots in hosts.items() if slots}
        if not hosts:
            raise HostfileError(f"exclude = {exclude} leaves no host of {path}.")
    if num_nodes > len(hosts):
        filters = " after include or exclude" if include or exclude else ""
        raise HostfileError(f"num_nodes = {num_nodes}, and {path} has {len(hosts)}{filters}: {', '.join(hosts)}.")
    return dict(list(hosts.items())[:num_nodes]) if num_nodes > 0 else hosts


def default_hostfile(environment: Mapping[str, str]) -> tuple[str, str] | None:
    """The hostfile where none is set, and why it is that one: a variable of upstream, or the path of DeepSpeed."""
    if environment.get("DLTS_HOSTFILE"):
        return environment["DLTS_HOSTFILE"], "DLTS_HOSTFILE"
    return (DEFAULT_HOSTFILE, f"{DEFAULT_HOSTFILE} being there") if Path(DEFAULT_HOSTFILE).is_file() else None


def _parse_file(path: str) -> dict[str, list[int]]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise HostfileError(
            f"hostfile = {path} cannot be read ({reason}). Write a line `host slots=8` for each host into it, or "
            "remove the key to run on this host alone."
        ) from error
    hosts: dict[str, list[int]] = {}
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.split("#", 1)[0].strip()
        if not line:
            continue
        match = re.fullmatch(r"(\S+)\s+slots\s*=\s*([1-9][0-9]*)", line)
        if match is None:
            raise HostfileError(f"{path}:{number}: `{line}` is not of the form `host slots=N`.")
        if match[1].startswith("-") or re.search(r"[^\w.:%-]", match[1]):
            raise HostfileError(f"{path}:{number}: `{match[1]}` is not a host name or an address.")
        if match[1] in hosts:
            raise HostfileError(f"{path}:{number}: host {match[1]} is named twice.")
        hosts[match[1]] = list(range(int(match[2])))
    if not hosts:
        raise HostfileError(f"{path} names no host. Write one `host slots=N` per line.")
    return hosts


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
