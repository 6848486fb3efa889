"""Which keys of a configuration the code reads, found in its syntax trees.

A read is `config.<section>.<key>`, or `<name>.<key>` where `<name>` was assigned from a section or is a parameter of a
section's type. Rules and derivations do not count: a key that is only checked would still be accepted and ignored.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from megatron.config.schema import SECTIONS

SECTION_TYPES = {section.__name__: title for title, section in SECTIONS.items()}
# Derivations whose outcome, under another key, is what the program reads.
DERIVING = ("derive.py", "layout.py")


def keys_read(root: Path) -> set[str]:
    """Every key that some file below `root` reads."""
    found: set[str] = set()
    for path in root.rglob("*.py"):
        if "schema" in path.parts or path.name == "rules.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = dict(_section_names(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                section = _section_of(node.value, names)
                if section is not None and node.attr in SECTIONS[section].model_fields:
                    found.add(node.attr)
            if path.parent.name == "config" and path.name in DERIVING and isinstance(node, ast.Subscript):
                found |= _draft_keys(node)
    return found


def _section_of(node: ast.expr, names: dict[str, str]) -> str | None:
    if isinstance(node, ast.Attribute) and node.attr in SECTIONS:
        return node.attr
    return names.get(node.id) if isinstance(node, ast.Name) else None


def _section_names(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
            targets = target.elts if isinstance(target, ast.Tuple) else [target]
            values = value.elts if isinstance(value, ast.Tuple) else [value]
            for one, section in zip(targets, values, strict=False):
                if isinstance(one, ast.Name) and isinstance(section, ast.Attribute) and section.attr in SECTIONS:
                    yield one.id, section.attr
        if isinstance(node, ast.arg) and node.annotation is not None:
            annotation = ast.unparse(node.annotation).split(".")[-1]
            if annotation in SECTION_TYPES:
                yield node.arg, SECTION_TYPES[annotation]


def _draft_keys(node: ast.Subscript) -> set[str]:
    is_draft = isinstance(node.value, ast.Name) and node.value.id == "draft"
    if not (is_draft and isinstance(node.slice, ast.Constant) and isinstance(node.ctx, ast.Load)):
        return set()
    return {str(node.slice.value)}
