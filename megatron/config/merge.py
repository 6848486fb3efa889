"""Files and command line into one mapping of keys, with the place where each was set.

Knows which keys have another name or another home, and nothing of their values. Invariant: no key is set in two places
without a problem that names both; the command line alone wins over files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron.config.former_keys import RENAMED
from megatron.config.schema import FIELDS, field_extra
from megatron.config.source import Source

COMMAND_LINE = "command line"
_EXTRA = "deepspeed_extra_args"
_OWN_KEYS = {str(field_extra(name, "deepspeed")): name for name in FIELDS if field_extra(name, "deepspeed")}


# No key of DeepSpeed's configuration, but its launcher's; files of upstream's users have it there.
_OWN_KEYS["ssh_port"] = "ssh_port"


@dataclass(frozen=True)
class Setting:
    """A value from the command line, and how it was written there: `--set seed=7`."""

    value: Any
    where: str


@dataclass
class Merged:
    """Top-level keys with their values; places of keys, nested ones dotted; what is wrong, and what to know."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add_source(self, source: Source) -> None:
        """Take a file's keys; one that stands in another file already is a problem."""
        for spelt, value in source.values.items():
            # A key that comes from a `<<` merge has no line of its own.
            line = source.lines.get(spelt)
            place = f"{source.name}:{line}" if line else source.name
            name = self._present_name(spelt, place)
            if name in self.values:
                self.problems.append(f"{place}: {spelt} is also set in {self.origins[name]}. Keep one of the two.")
                continue
            self.values[name] = value
            self.origins[name] = place
            prefix = f"{spelt}."
            for key, number in source.lines.items():
                if key.startswith(prefix):
                    self.origins[f"{name}.{key[len(prefix) :]}"] = f"{source.name}:{number}"

    def override(self, overrides: Mapping[str, Any], where: str = COMMAND_LINE) -> None:
        """Set keys over what the files say; dots reach into blocks."""
        for dotted, given in overrides.items():
            value, place = (given.value, given.where) if isinstance(given, Setting) else (given, f"{where} ({dotted})")
            spelt, *rest = dotted.split(".")
            if spelt != "comet_others":
                rest = [part.replace("-", "_") for part in rest]
            name = self._present_name(spelt.replace("-", "_"), place)
            if not all(rest):
                self.problems.append(f"{place}: an empty name stands between the dots. Write BLOCK.KEY=VALUE.")
            elif not rest:
                self.values[name] = value
                for key in [key for key in self.origins if key.startswith(f"{name}.")]:
                    del self.origins[key]
                self.origins[name] = place
            else:
                self._override_in_block(name, rest, value, place)

    def _override_in_block(self, name: str, rest: list[str], value: Any, place: str) -> None:
        holder: dict[str, Any] = self.values
        path = name
        for part, following in zip([name, *rest[:-1]], rest, strict=True):
            inner = holder.get(part)
            if inner is not None and not isinstance(inner, dict):
                self.problems.append(
                    f"{place}: {path} = {inner} ({self.origins.get(path, 'default')}) is no block that could hold "
                    f"{following}. Set {path} itself."
                )
                return
            # Copied: what the caller or a file's source holds stays as it is.
            holder[part] = dict(inner or {})
            holder, path = holder[part], f"{path}.{following}"
        holder[rest[-1]] = value
        self.origins[path] = place
        self.origins.setdefault(name, place)

    def move_out_of_extra_args(self) -> None:
        """What upstream's files put into deepspeed_extra_args though it has a key of its own, as if it stood there."""
        extra = self.values.get(_EXTRA)
        if not isinstance(extra, dict):
            return
        for spelt, value in extra.items():
            name = _OWN_KEYS.get(spelt)
            if name is None:
                continue
            place = self.origins.get(f"{_EXTRA}.{spelt}", self.origins[_EXTRA])
            if self.values.get(name) is not None:
                self.problems.append(
                    f"{place}: {_EXTRA}.{spelt} is also set by the key {name} ({self.origins[name]}). Keep one of the "
                    "two."
                )
                continue
            self.values[name] = value
            prefix = f"{_EXTRA}.{spelt}"
            inside = {key: at for key, at in self.origins.items() if key.startswith(f"{prefix}.")}
            self.origins.update({name: place, **{name + key[len(prefix) :]: at for key, at in inside.items()}})
        self.values[_EXTRA] = {spelt: value for spelt, value in extra.items() if spelt not in _OWN_KEYS} or None

    def _present_name(self, spelt: str, place: str) -> str:
        """A key's name today; an old one is noted."""
        name = RENAMED.get(spelt)
        if name is None:
            return spelt
        self.warnings.append(f"{place}: {spelt} is the old name of {name}, and is read as it")
        return name
