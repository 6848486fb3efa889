"""A configuration in the making: typed values, what was given, what could not be read, and all problems so far.

Invariant: a rule that needs a value which could not be read is skipped, so that one mistake gives one message.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from megatron.config.schema import FIELDS


class SkipRule(Exception):
    """A rule needs a value that could not be determined; the reason is already among the problems."""


@dataclass
class Draft:
    """Values by key.

    values: every key that could be read or has a default.
    given: keys that a file or the command line sets (to something other than null).
    failed: keys without a usable value.
    origins: key or dotted nested key -> "file:line", "command line", "derived from ...".
    files: names of the files, for problems that have no line.
    idle: keys without effect here that ask for something.
    meant: keys that an unknown one was probably meant to be; that they are missing needs no words.
    inference: whether this is for generation or evaluation, not for training.
    """

    values: dict[str, Any]
    given: set[str]
    origins: dict[str, str]
    files: list[str]
    inference: bool = False
    failed: set[str] = field(default_factory=set)
    idle: set[str] = field(default_factory=set)
    meant: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __getitem__(self, key: str) -> Any:
        if key in self.failed:
            raise SkipRule
        return self.values[key]

    def is_given(self, key: str) -> bool:
        """Whether the user set the key."""
        return key in self.given

    def derive(self, key: str, value: Any, source: str) -> None:
        """Set a key that the user did not set; a set one is never overwritten."""
        assert key in FIELDS
        if key not in self.given:
            self.values[key] = value
            self.origins[key] = f"derived from {source}"
            self.failed.discard(key)

    def problem(self, key: str, text: str) -> None:
        """Note a problem at the place where `key` (dotted for nested ones) is set."""
        self.problems.append(f"{self.place(key)}: {one_line(text)}")

    def fail(self, key: str, text: str) -> None:
        """Note a problem and leave the rule."""
        self.problem(key, text)
        raise SkipRule

    def warn(self, key: str, text: str) -> None:
        """Note something the user should know that is no reason to stop."""
        self.warnings.append(f"{self.place(key)}: {one_line(text)}")

    def place(self, key: str) -> str:
        """Where a key is set; for one that is not, the nearest enclosing block, else the files."""
        name = key
        while name:
            origin = self.origins.get(name, "")
            if origin and not origin.startswith("derived"):
                return origin
            name = name.rpartition(".")[0]
        return self.files[0] if len(self.files) == 1 else "configuration"

    def run(self, rule: Callable[[Draft], None], outputs: Iterable[str] = ()) -> None:
        """Run a rule; where it cannot be finished, its outputs count as unknown."""
        try:
            rule(self)
        except SkipRule:
            self.failed.update(name for name in outputs if name not in self.given)


def one_line(text: str) -> str:
    """A message whose values may hold line ends and other control characters: these are shown as escapes."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean ...?`, or nothing where no known word is near."""
    near = near_names(word, known)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def near_names(word: str, known: Iterable[str]) -> list[str]:
    """At most two known words that are near; one alone where only the letter case or the ends differ."""
    by_lower = {name.lower(): name for name in known}
    plain = re.sub(r"^\W+|\W+$", "", word.lower())
    if plain in by_lower:
        return [by_lower[plain]]
    return [by_lower[name] for name in difflib.get_close_matches(word.lower(), by_lower, n=2, cutoff=0.75)]
