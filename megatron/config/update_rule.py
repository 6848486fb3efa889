"""The `optimizer` block: which update rule, and its numbers, typed.

Invariant: after `derive_optimizer`, lr, betas, eps, momentum and weight_decay say all that the optimizer is built with.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from megatron.config.draft import Draft, SkipRule
from megatron.config.messages import plain_message, show, unknown_name
from megatron.config.schema.base import Block, Float, key


class UpdateParams(Block):
    """What `optimizer.params` may hold for every optimizer."""

    lr: Float = key(0.001, "Peak learning rate.", gt=0)
    weight_decay: Float | None = key(None, "The same as the key weight_decay.", ge=0)
    max_grad_norm: Float | None = key(None, "Ignored upstream; gradient_clipping is the key.")


class AdamParams(UpdateParams):
    """Adam's further parameters."""

    betas: tuple[Float, Float] = key((0.9, 0.999), "Decay rates.")
    eps: Float = key(1e-8, "Added to the denominator.", ge=0)


class LionParams(UpdateParams):
    """Lion's further parameters."""

    betas: tuple[Float, Float] = key((0.9, 0.99), "Decay rates.")


class SgdParams(UpdateParams):
    """SGD's further parameters."""

    momentum: Float = key(0.0, "Decay rate of the accumulated gradient.", ge=0, lt=1)


class MadgradParams(UpdateParams):
    """MADGRAD's further parameters."""

    momentum: Float = key(0.9, "Part of the old parameter that a step keeps.", ge=0, lt=1)
    eps: Float = key(1e-6, "Added to the cube root.", ge=0)


OPTIMIZER_PARAMS: dict[str, type[UpdateParams]] = {
    "adam": AdamParams,
    "lion": LionParams,
    "sgd": SgdParams,
    "madgrad_wd": MadgradParams,
}
# Upstream's Adams that differ from Adam in where they run, not in what they compute.
SAME_AS_ADAM = ("cpu_adam", "cpu_torch_adam")
# Switches of other libraries' optimizers, with the value that is how ours work anyway.
_SWITCHES: dict[str, Any] = {
    "adam_w_mode": True,
    "adamw_mode": True,
    "bias_correction": True,
    "amsgrad": False,
    "fused": True,
    "set_grad_none": True,
    "torch_adam": True,
    "maximize": False,
    "nesterov": False,
    "dampening": 0,
    "decouple_decay": True,
}


def derive_optimizer(draft: Draft) -> None:
    """Typed numbers of the update rule out of the `optimizer` block."""
    block = draft["optimizer"]
    if block is None:
        return
    name = block.type
    if "type" not in block.model_fields_set and block.params:
        draft.warn("optimizer", f"optimizer.type is not set; {name} is used")
    if name in SAME_AS_ADAM:
        draft.warn(
            "optimizer.type",
            f"{name} is computed as Adam; zero_optimization.offload_optimizer decides whether on the CPU",
        )
        name = "adam"
    draft.derive("optimizer_type", name, "optimizer.type")
    kind = OPTIMIZER_PARAMS[name]
    params = _typed_params(draft, name, kind, block.params)
    for field in ("lr", "betas", "eps", "momentum"):
        if field in kind.model_fields:
            source = f"optimizer.params.{field}" if field in block.params else "the optimizer's default"
            draft.derive(field, getattr(params, field), source)
    if params.max_grad_norm is not None:
        draft.warn(
            "optimizer.params.max_grad_norm",
            "max_grad_norm has no effect, upstream ignores it too; gradient_clipping is the key",
        )
    if params.weight_decay is not None:
        if draft.is_given("weight_decay") and draft["weight_decay"] != params.weight_decay:
            draft.fail(
                "optimizer.params.weight_decay",
                f"optimizer.params.weight_decay = {params.weight_decay} contradicts weight_decay = "
                f"{draft['weight_decay']} ({draft.place('weight_decay')}). Keep one of the two.",
            )
        draft.derive("weight_decay", params.weight_decay, "optimizer.params.weight_decay")
    if "lr" not in block.params:
        draft.warn("optimizer", "optimizer.params.lr is not set; 0.001 is used")


def _typed_params(draft: Draft, name: str, kind: type[UpdateParams], given: dict[str, Any]) -> UpdateParams:
    """The block's params, checked. Raises: SkipRule after noting what is wrong."""
    params, is_good = {}, True
    for field, value in given.items():
        if field not in _SWITCHES or field in kind.model_fields:
            params[field] = value
        elif value not in (None, _SWITCHES[field]):
            dotted = f"optimizer.params.{field}"
            needed = show(_SWITCHES[field])
            draft.problem(dotted, f"{dotted} = {show(value)}: {name} here works as with {needed}. Remove it.")
            is_good = False
    try:
        typed = kind.model_validate(params)
    except ValidationError as error:
        known = [field for field in kind.model_fields if field != "max_grad_norm"]
        for item in error.errors():
            dotted = ".".join(("optimizer.params", *(str(part) for part in item["loc"])))
            if item["type"] == "extra_forbidden":
                text = unknown_name(str(item["loc"][0]), f"optimizer.params of {name}", known)
                draft.problem(dotted, text)
            else:
                draft.problem(dotted, plain_message(dotted, item, kind))
        raise SkipRule from error
    if not is_good:
        raise SkipRule
    return typed
