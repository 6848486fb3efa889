"""The JSON schema by which an editor completes and checks configuration files.

As lenient as the loader: choices in any letter case, `-` for `_`, null for unset, whole numbers written 5e4. Rules
between keys are the loader's alone. Invariant: what the loader takes, the schema takes.
"""

from __future__ import annotations

import json
import re
from typing import Any

from megatron.config.deepspeed_blocks import PLAIN_BLOCKS, REFUSED_NAMES, table
from megatron.config.former_keys import RENAMED
from megatron.config.schema import SECTIONS, field_extra
from megatron.config.schema.base import ALIASES
from megatron.config.upstream_keys import NO_EFFECT, NOT_YET, REFUSED

_OURS = ("title", "ours", "deepspeed", "unit", "derived")
# Blocks whose fields are partly typed here, partly DeepSpeed's: definition -> path in DeepSpeed's table.
_OPEN_BLOCKS = {"ZeroBlock": "zero_optimization", "Fp16Block": "fp16", "Bf16Block": "bf16"}


def editor_schema() -> str:
    """The schema: `# yaml-language-server: $schema=schema.json` as a file's first line switches it on."""
    properties: dict[str, Any] = {}
    definitions: dict[str, Any] = {}
    for section in SECTIONS.values():
        schema = section.model_json_schema()
        definitions.update(schema.get("$defs", {}))
        for name, described in schema.get("properties", {}).items():
            if not field_extra(name, "derived"):
                properties[name] = _lenient(described)
    keys = table()["keys"]
    for name in PLAIN_BLOCKS:
        properties[name] = {"description": properties[name]["description"], **_of_table(keys[name], name)}
    for name, (_, reason) in NO_EFFECT.items():
        properties[name] = {"description": f"No effect: {reason}.", "deprecated": True}
    for name, (values, reason) in REFUSED.items():
        properties[name] = _only(values, f"Refused: {reason}.")
    for name, (values, what) in NOT_YET.items():
        properties[name] = _only(values, f"Not supported yet: {what}.")
    for old, name in RENAMED.items():
        properties[old] = {"description": f"The old name of {name}.", "deprecated": True}
    content = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Training configuration",
        "type": "object",
        "properties": properties,
        # Completion offers the names above; the same with dashes are checked alike.
        "patternProperties": {
            "^(?=.*-)" + name.replace("_", "[-_]") + "$": {"$ref": f"#/properties/{name}"}
            for name in properties
            if "_" in name
        },
        "additionalProperties": False,
        "$defs": {name: _definition(name, block) for name, block in definitions.items()},
    }
    return json.dumps(content, indent=1) + "\n"


def _only(values: tuple[Any, ...], description: str) -> dict[str, Any]:
    off = {"type": "object", "properties": {"enabled": {"const": False}}, "required": ["enabled"]}
    return {"description": description, "deprecated": True, "anyOf": [{"enum": [*dict.fromkeys((*values, None))]}, off]}


def _definition(name: str, block: dict[str, Any]) -> dict[str, Any]:
    """A block's definition, with DeepSpeed's further names where it has them."""
    fields = {field: _lenient(described) for field, described in block.get("properties", {}).items()}
    result: dict[str, Any] = {"type": "object", "description": block.get("description", ""), "properties": fields}
    path = _OPEN_BLOCKS.get(name)
    if path is not None:
        for field, entry in table()["keys"][path]["keys"].items():
            if f"{path}.{field}" not in REFUSED_NAMES:
                fields.setdefault(field, _of_table(entry, f"{path}.{field}"))
    elif block.get("additionalProperties") is True:
        return result
    return {**result, "additionalProperties": False}


def _lenient(described: dict[str, Any]) -> dict[str, Any]:
    """A field's schema, taking what the loader takes: null, any letter case, numbers for text."""
    kept = {name: value for name, value in described.items() if name not in _OURS}
    heading: dict[str, Any] = {name: kept.pop(name) for name in ("description", "default") if name in kept}
    forms = kept.pop("anyOf", None) or ([kept] if kept else [])
    if not forms:
        return heading
    wider = [wide for form in forms for wide in _wider(form)]
    if {"type": "null"} not in wider:
        wider.append({"type": "null"})
    return {**heading, "anyOf": wider}


def _wider(form: dict[str, Any]) -> list[dict[str, Any]]:
    words = form.get("enum") or ([form["const"]] if "const" in form else [])
    if words and all(isinstance(word, str) for word in words):
        spelt = {*words, *(alias for alias, meant in ALIASES.items() if meant in words)}
        pattern = "|".join(_any_case(word) for word in sorted(spelt))
        return [{"enum": list(words)}, {"type": "string", "pattern": f"^({pattern})$"}]
    if form.get("type") in ("integer", "number"):
        # In quotes, or as YAML 1.1 reads 1e-4: text that holds a number.
        return [form, {"type": "string", "pattern": r"^[-+]?[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?$"}]
    if form.get("type") == "string":
        return [form, {"type": "number"}]
    return [form]


def _any_case(word: str) -> str:
    return "".join(f"[{c.upper()}{c.lower()}]" if c.isalpha() else re.escape(c) for c in word)


def _of_table(entry: dict[str, Any], path: str) -> dict[str, Any]:
    """An entry of DeepSpeed's table as a JSON schema."""
    result: dict[str, Any] = {}
    if "types" in entry:
        result["type"] = sorted({*entry["types"], "null"})
    if "choices" in entry:
        result["enum"] = [*dict.fromkeys(entry["choices"]), None]
    if "minimum" in entry:
        result["minimum"] = entry["minimum"]
    if "above" in entry:
        result["exclusiveMinimum"] = entry["above"]
    if "keys" in entry:
        result["properties"] = {
            name: _of_table(inner, f"{path}.{name}")
            for name, inner in entry["keys"].items()
            if f"{path}.{name}" not in REFUSED_NAMES
        }
        result["additionalProperties"] = False
    return result
