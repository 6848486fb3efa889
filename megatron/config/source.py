"""YAML and JSON files read into plain values, with the line of every key kept and duplicate keys refused.

Does not know which keys exist. Numbers may be written as people write them (`1e-4`, `5e4`, `1_000`); dates stay text.
Invariant: every value that leaves here has an origin `file:line`.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron.common.errors import ConfigError
from megatron.config.draft import one_line
from megatron.config.syntax_hints import explain, explain_bytes, mended

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*)$")
_HEX = re.compile(r"[-+]?0x[0-9a-fA-F_]+$")
_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)([eE][-+]?[0-9]+)?$")
_BOOLS = {
    word: value for value, words in {True: "true yes on", False: "false no off"}.items() for word in words.split()
}
# `010`: 8 for upstream's YAML reader, 10 for most others.
_OCTAL = re.compile(r"[-+]?0[0-9_]+$")
# More than any configuration has; `*name` inside `*name` inside ... would make billions.
MAX_VALUES, MAX_DEPTH = 100_000, 50
# Slips of one file that are mended to read on.
MAX_SLIPS = 20
_SPECIAL = {".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf, ".nan": math.nan}


@dataclass
class Source:
    """One file's contents.

    name: how the file is called in messages.
    text: the file as it is.
    values: top-level keys, `-` turned into `_`.
    lines: line of each key; nested keys are dotted (`optimizer.params.lr`).
    problems: located messages (duplicate keys), in the order of the lines.
    """

    name: str
    text: str
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_source(path: Path) -> Source:
    """Read one YAML or JSON file.

    Raises: ConfigError if the file is not readable, is not valid YAML, or is not a mapping.
    """
    name = str(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read ({error.strerror}).") from error
    try:
        # As text files are read everywhere: lines end in \n, \r\n or \r.
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ConfigError(explain_bytes(name, content, error.start)) from error
    return parse_source(name, text)


def parse_source(name: str, text: str) -> Source:
    """Parse the text of one file; see `read_source`."""
    source = Source(name, text)
    # A JSON file may be indented with tabs, which YAML forbids; inside JSON strings raw tabs cannot occur.
    body = text.replace("\t", " ") if name.endswith(".json") else text
    root = _compose(name, body, source.problems)
    if root is None:
        return source
    if not isinstance(root, yaml.MappingNode):
        if text.lstrip()[:9].lower().startswith(("<!doctype", "<html")):
            raise ConfigError(f"{name}:1: this is a web page, not a configuration. Download the raw file.")
        kind = "list" if isinstance(root, yaml.SequenceNode) else "single value"
        how = ", with a colon" if re.match(r"\s*[\w.-]+\s*=", str(root.value)) else ""
        raise ConfigError(
            f"{name}:{root.start_mark.line + 1}: holds a {kind}, not `key: value` pairs. Write one `key: value` per "
            f"line{how}."
        )
    values = _Builder(source).mapping(root, "")
    source.values.update(values)
    return source


def _compose(name: str, body: str, problems: list[str]) -> yaml.Node | None:
    """PyYAML's tree. A slip whose mending is sure is noted in `problems`, and what stands behind it is read on.

    Raises: ConfigError with these and the error that ends it.
    """
    while True:
        try:
            root: yaml.Node | None = yaml.compose(body, Loader=_LOADER)
        except RecursionError as error:
            raise ConfigError("\n".join([*problems, f"{name}: {_TOO_DEEP}"])) from error
        except yaml.YAMLError as error:
            problems.append(explain(name, body, error))
            changed = mended(body, error)
            if changed is None or len(problems) > MAX_SLIPS:
                raise ConfigError("\n".join(problems)) from error
            body = changed
        else:
            return root


def parse_value(text: str, where: str = "command line") -> Any:
    """The value of `--set key=text`, by the same rules as in a file.

    Text that is no YAML, such as `@run`, stands for itself. Raises: ConfigError for a list or block that does not end,
    or that sets a key twice.
    """
    source = Source(where, text)
    try:
        node = yaml.compose(text, Loader=_LOADER)
    except RecursionError as error:
        raise ConfigError(f"{where}: {_TOO_DEEP}") from error
    except yaml.YAMLError as error:
        if text.lstrip().startswith(("[", "{")):
            problem = getattr(error, "problem", None) or error
            raise ConfigError(f"{where}: not valid YAML: {problem}. Quote the whole argument for the shell.") from error
        return text
    value = None if node is None else _Builder(source).value(node, "")
    if source.problems:
        raise ConfigError("\n".join(source.problems))
    return value


_TOO_DEEP = f"lists and blocks stand inside each other, more than {MAX_DEPTH} of them. Remove brackets."


class _Builder:
    """Turns PyYAML's nodes into plain values and notes where each key stands."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.count = 0
        # The lists and blocks around the present value.
        self.around: list[int] = []

    def value(self, node: yaml.Node, path: str) -> Any:
        self._refuse_tag(node, path)
        self.count += 1
        if self.count > MAX_VALUES:
            raise ConfigError(
                f"{self.source.name}:{node.start_mark.line + 1}: the file holds more than {MAX_VALUES:,} values once "
                "every `*name` is replaced by what it repeats. Write the values that are meant."
            )
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if id(node) in self.around:
            self._problem(node, f"{path} holds itself: `*name` stands inside what `&name` marks. Write the value.")
            return None
        if len(self.around) >= MAX_DEPTH:
            raise ConfigError(f"{self.source.name}:{node.start_mark.line + 1}: {_TOO_DEEP}")
        self.around.append(id(node))
        found = (
            self.mapping(node, path)
            if isinstance(node, yaml.MappingNode)
            else [self.value(child, path) for child in node.value]
        )
        self.around.pop()
        return found

    def _scalar(self, node: yaml.ScalarNode, path: str) -> Any:
        # A shell takes quotes away: what comes from it stays the text that it is.
        if path and not node.style and _OCTAL.match(node.value):
            octal = re.fullmatch(r"[-+]?0[0-7_]+", node.value)
            also = f"{int(node.value.replace('_', ''), 8)} or " if octal else ""
            self._problem(
                node,
                f"{path} = {node.value}: a number that begins with 0 is read as octal by some. Write "
                f"{also}{int(node.value)}, or quote it if it is text.",
            )
        return _scalar(node)

    def mapping(self, node: yaml.MappingNode, path: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        seen: dict[str, tuple[str, int]] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in self._entries(node, path):
            line = key_node.start_mark.line + 1
            if key_node.tag.endswith(":merge"):
                # `<<: *anchor` fills in what the mapping itself does not say.
                for part in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                    block = self.value(part, path)
                    if isinstance(block, dict):
                        merged = {**block, **merged}
                    elif not isinstance(part, yaml.MappingNode):
                        self._problem(key_node, "`<<` takes a block, as in `<<: *name`. Name one, or remove the line.")
                continue
            spelt = str(key_node.value)
            # What goes to Comet keeps its spelling: those names are not ours.
            name = spelt if path.startswith("comet_others") else spelt.replace("-", "_")
            dotted = f"{path}.{name}" if path else name
            if name in seen:
                first, first_line = seen[name]
                same = f"`{spelt}`" if first == spelt else f"`{spelt}` (the same key as `{first}`)"
                self._problem(key_node, f"{same} is set twice, first in line {first_line}. Keep one of the two.")
                continue
            seen[name] = (spelt, line)
            self.source.lines[dotted] = line
            values[name] = self.value(value_node, dotted)
        return {**merged, **values}

    def _entries(self, node: yaml.MappingNode, path: str) -> Iterator[tuple[yaml.Node, yaml.Node]]:
        """The entries of a mapping whose keys are words."""
        tuple_key = ""
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._problem(
                    key_node, "a key is one word, not a list or a block. Quote it if the brackets belong to it."
                )
            elif not key_node.value.strip() or (key_node.value == "~" and not key_node.style):
                self._problem(key_node, "a key is missing before the colon. Write `key: value`, or remove the line.")
            elif tuple_key:
                # `betas: (0.9, 0.95)` is the text `(0.9` and a second key `0.95)`; the problem is noted already.
                tuple_key = "" if key_node.value.endswith(")") else tuple_key
            elif isinstance(value_node, yaml.ScalarNode) and re.match(r"\([^)]*$", str(value_node.value)):
                tuple_key = key_node.value if node.flow_style else ""
                where = f"{path}.{key_node.value}" if path else key_node.value
                self._problem(key_node, f"{where}: a list stands in square brackets, as in [0.9, 0.95].")
            else:
                yield key_node, value_node

    def _refuse_tag(self, node: yaml.Node, path: str) -> None:
        if not node.tag.startswith("tag:yaml.org,2002:") or ":python" in node.tag:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            self._problem(node, f"{path} has the tag {tag}, and tags are not read. Write the value itself.")

    def _problem(self, node: yaml.Node, text: str) -> None:
        self.source.problems.append(f"{self.source.name}:{node.start_mark.line + 1}: {one_line(text)}")


def _scalar(node: yaml.Node) -> Any:
    text = str(node.value)
    if getattr(node, "style", None) in ("'", '"', "|", ">"):
        return text
    if text in ("", "~") or text.lower() == "null":
        return None
    if text.lower() in _BOOLS:
        return _BOOLS[text.lower()]
    if text.lower() in _SPECIAL:
        return _SPECIAL[text.lower()]
    with contextlib.suppress(ValueError):
        if _INT.match(text):
            return int(text)
        if _HEX.match(text):
            return int(text, 16)
        if _FLOAT.match(text) and not re.match(r"[-+]?0[0-9]", text):
            return float(text)
    return text
