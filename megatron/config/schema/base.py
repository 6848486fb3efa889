"""What one configuration key is: a typed field with its default, sentence, unit, choices and DeepSpeed name.

Holds no key itself. Invariant: a key is written once, as one `key(...)` line of one section; validation, the reference
page, the editor schema and the DeepSpeed dictionary are all read from that line.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Block(BaseModel):
    """A frozen mapping of typed fields, such as `fp16` or `zero_optimization`; choices may come in any letter case."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), coerce_numbers_to_str=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _spell_choices(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: _spell(value, choices_of(cls, name)) for name, value in values.items()}


class Section(Block):
    """A frozen group of keys; every field is an upstream key, one of ours (`ours=True`) or derived."""


def key(
    default: Any,
    doc: str,
    *,
    unit: str | None = None,
    deepspeed: str | None = None,
    ours: bool = False,
    derived: str | None = None,
    **limits: Any,
) -> Any:
    """One configuration key.

    deepspeed: the name under which the value goes into DeepSpeed's configuration, where it does.
    ours: upstream does not have this key.
    derived: what to set instead; a user cannot set the key itself.
    limits: pydantic's ge, gt, le, lt, min_length.
    """
    extra = {"unit": unit, "deepspeed": deepspeed, "ours": ours, "derived": derived}
    return Field(
        default,
        description=doc,
        json_schema_extra={name: value for name, value in extra.items() if value},
        validate_default=False,
        **limits,
    )


def _refuse_bool(kind: str) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError(f"{str(value).lower()} is not {kind}")
        return value

    return check


def _whole(value: Any) -> Any:
    """`"5e4"` in quotes is a whole number too."""
    with contextlib.suppress(ValueError):
        return float(value) if isinstance(value, str) and not value.lstrip("+-").isdigit() else value
    return value


def _only_bool(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and value not in (0, 1):
        raise ValueError(f"{value} is neither true nor false")
    return value


def choices_of(section: type[BaseModel], name: str) -> tuple[str, ...]:
    """The words that a field accepts, or () where it is not a choice."""
    field = section.model_fields.get(name)
    for part in (field.annotation, *get_args(field.annotation)) if field else ():
        if get_origin(part) is Literal:
            return get_args(part)
    return ()


def _spell(value: Any, choices: tuple[str, ...]) -> Any:
    if not choices or not isinstance(value, str):
        return value
    for word in (value.lower(), ALIASES.get(value.lower(), "").lower()):
        for choice in choices:
            if choice.lower() == word:
                return choice
    return value


# Other names of the same thing; applied only where the field is a choice.
ALIASES = {
    "bf16": "bfloat16",
    "float16": "fp16",
    "half": "fp16",
    "bfp16": "bf16",
    "float32": "fp32",
    "adamw": "adam",
    "rope": "rotary",
}

Int = Annotated[int, BeforeValidator(_whole), BeforeValidator(_refuse_bool("a whole number"))]
Float = Annotated[float, BeforeValidator(_refuse_bool("a number"))]
Bool = Annotated[bool, BeforeValidator(_only_bool)]
