"""All families by model_type, and the choice among them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.common.errors import CheckpointError
from megatron.convert.families.falcon_opt import FALCON, OPT
from megatron.convert.families.gpt2 import GPT2, GPT_BIGCODE, GPT_J
from megatron.convert.families.llama import GEMMA, LLAMA, MISTRAL, QWEN2, QWEN3
from megatron.convert.families.neox import GPT_NEOX
from megatron.convert.family import Family
from megatron.model.spec import ModelSpec

# In the order in which a model without a family of its own is offered to them.
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (GPT_NEOX, GPT2, GPT_J, GPT_BIGCODE, LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, FALCON, OPT)
}


def family_of_config(config: Mapping[str, Any]) -> Family:
    """The family that config.json names. Raises: CheckpointError naming the known ones."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise CheckpointError(f"config.json has model_type {model_type!r}; known are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def family_for(spec: ModelSpec, asked: str | None = None) -> Family:
    """The family that computes this model: the one asked for, or the first that can.

    asked: a model_type. Raises: CheckpointError with what stands in the way.
    """
    if asked:
        if reasons := FAMILIES[asked].refusals(spec):
            raise CheckpointError(f"this model is not a {FAMILIES[asked].architecture}: {'; '.join(reasons)}")
        return FAMILIES[asked]
    nearest: tuple[Family, list[str]] | None = None
    for family in FAMILIES.values():
        reasons = family.refusals(spec)
        if not reasons:
            return family
        # One that cannot even name the activation is further away than any that differs in a field.
        is_near = not reasons[0].startswith("config.json")
        if is_near and (nearest is None or len(reasons) < len(nearest[1])):
            nearest = (family, reasons)
    told = (
        f"Nearest is {nearest[0].architecture}, but: {'; '.join(nearest[1])}"
        if nearest
        else (f"None of them has activation {spec.activation}")
    )
    raise CheckpointError(f"no known architecture of Hugging Face computes this model. {told}.")
