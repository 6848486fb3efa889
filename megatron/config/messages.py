"""pydantic's findings in this project's words: what was given, what is required, what to do.

Invariant: a message names the key, its value and the accepted type or choices.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel

from megatron.config.draft import did_you_mean
from megatron.config.schema.base import choices_of
from megatron.config.value_hints import OTHER_OPTIMIZERS, other_value_hint, value_hint

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "dict": "a block of `key: value` lines",
    "model": "a block of `key: value` lines",
    "tuple": "a list",
}
_BOUNDS = {
    "greater_than": "above",
    "greater_than_equal": "at least",
    "less_than": "below",
    "less_than_equal": "at most",
}


def plain_message(dotted: str, item: Mapping[str, Any], section: type[BaseModel]) -> str:
    """One sentence for one finding (an entry of `ValidationError.errors()`) about the key `dotted`."""
    kind = str(item["type"])
    context = item.get("ctx") or {}
    if kind == "extra_forbidden":
        block, name = dotted.rsplit(".", 1) if "." in dotted else ("", dotted)
        if block == "optimizer":
            return f"unknown key {name} in optimizer: it holds type and params. Move {name} into params."
        return unknown_name(name, block, _fields_of(section, block.split(".")))
    block, _, name = dotted.rpartition(".")
    if kind == "missing" and not name.isdigit():
        return f"{block} needs {name}. Add it."
    given = f"{dotted} = {show(item.get('input'))}"
    if kind == "literal_error":
        choices = choices_of(section, dotted) or tuple(str(context.get("expected", "")).replace("'", "").split(", "))
        reason = OTHER_OPTIMIZERS.get(str(item.get("input")).lower()) if dotted == "optimizer.type" else None
        if reason is not None:
            return f"{given}: {reason}."
        near = other_value_hint(dotted, item.get("input")) or did_you_mean(str(item.get("input")), choices)
        return f"{given} is not one of {', '.join(choices)}.{near}"
    for prefix, word in _BOUNDS.items():
        if kind == prefix:
            bound = next(value for name, value in context.items() if name in ("gt", "ge", "lt", "le"))
            limit = bound if isinstance(bound, int) else f"{bound:g}"
            return f"{given} must be {word} {limit}.{value_hint(dotted, item.get('input'), '')}"
    if kind in ("missing", "too_long", "too_short"):
        return f"{dotted.rstrip('.0123456789')} = {show(item.get('input'))} must hold two numbers, as [0.9, 0.95]."
    if kind == "value_error":
        return f"{given}: {context['error']}."
    if kind == "int_from_float":
        return f"{given} must be a whole number."
    if kind == "finite_number":
        return f"{given} must be a finite number."
    for prefix, words in _KINDS.items():
        if kind.startswith(prefix):
            return f"{given} must be {words}.{value_hint(dotted, item.get('input'), prefix)}"
    return f"{given}: {item['msg']}."


def unknown_name(name: str, block: str, known: Collection[str]) -> str:
    """A name that a block does not have: the nearest, or else what there is."""
    near = did_you_mean(name, known)
    if near:
        return f"unknown key {name} in {block}.{near}"
    shown = sorted(known)
    names = ", ".join(shown) if len(shown) <= 12 else f"{', '.join(shown[:12])}, ... (configs/neox_arguments.md)"
    return f"unknown key {name} in {block}. Known: {names}."


def show(value: Any) -> str:
    """A value as the user may have written it, shortened where it is long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict | list):
        text = json.dumps(value, default=str, ensure_ascii=False)
    else:
        text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _fields_of(section: type[BaseModel], path: list[str]) -> list[str]:
    current: type[BaseModel] = section
    for name in path:
        field = current.model_fields.get(name)
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())) if field else ():
            if isinstance(part, type) and issubclass(part, BaseModel):
                current = part
    return list(current.model_fields)
