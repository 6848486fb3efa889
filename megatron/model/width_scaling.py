"""Maximal update parametrization: how initial values and learning rates of each parameter follow from the widths.

Source: Yang et al. 2022, Tensor Programs V, arXiv 2203.03466, table 8 (the form that allows tied embeddings), with
every width as a ratio to the base model's, where all factors are 1. The multipliers of the function itself are
ModelSpec's (`attention_scale`, `output_scale`). Invariant: decided by name and spec alone, the same at every layout.
"""

from __future__ import annotations

from typing import Any, Literal

from megatron.model.lora import is_update
from megatron.model.spec import ModelSpec, WidthScaling

UpdateRule = Literal["adam", "sgd"]

# Keys of what WidthScaling holds besides the widths of mup_base_shapes.
_KEYS = {
    "num_heads": "mup_base_shapes.num_attention_heads",
    "embedding_mult": "mup_embedding_mult",
    "position_mult": "mup_rp_embedding_mult",
    "attention_temp": "mup_attn_temp",
    "output_temp": "mup_output_temp",
}


def update_rule(optimizer: str) -> UpdateRule:
    """The table's column for an optimizer: sgd, whose steps have the size of the gradient, or adam (also Lion)."""
    return "sgd" if optimizer.lower() == "sgd" else "adam"


def init_factor(name: str, spec: ModelSpec) -> float:
    """What the base model's standard deviation of a matrix is multiplied with: hidden ones with 1 / sqrt(fan-in).

    The spec's `init_scale` is part of it.
    """
    widths = _hidden_widths(name, spec)
    return spec.init_scale * (widths[0] ** -0.5 if widths else 1.0)


def lr_factor(name: str, spec: ModelSpec, rule: UpdateRule) -> float:
    """What the learning rate of a parameter is multiplied with.

    adam: hidden matrices 1 / fan-in, all else 1. sgd: hidden matrices fan-out / fan-in; embeddings, norms and biases
    fan-out; the head fan-in. Low-rank updates likewise, whose rank is no width.
    """
    if spec.mup is None:
        return 1.0
    widths = _hidden_widths(name, spec)
    if rule == "adam":
        return 1.0 / widths[0] if widths else 1.0
    if widths:
        return widths[1] / widths[0]
    module, _, own = name.rpartition(".")
    return _vector_width(module.rpartition(".")[2], own, spec, spec.mup)


def _hidden_widths(name: str, spec: ModelSpec) -> tuple[float, float] | None:
    """(fan-in, fan-out) of a matrix between two layers' features, as ratios to the base model's; None: no such one."""
    if spec.mup is None:
        return None
    matrices = _matrices(spec, spec.mup)
    if is_update(name):
        layer, own = name.split(".")[-3], name[-1]
        fan_in, fan_out = matrices[layer]
        return (fan_in, 1.0) if own == "a" else (1.0, fan_out)
    module, _, own = name.rpartition(".")
    return matrices.get(module.rpartition(".")[2]) if own == "weight" else None


def _matrices(spec: ModelSpec, base: WidthScaling) -> dict[str, tuple[float, float]]:
    hidden, ffn = spec.hidden_size / base.hidden_size, spec.ffn_size / base.ffn_size
    heads = spec.num_heads * spec.head_dim / (base.num_heads * base.head_dim)
    kv_heads = spec.num_kv_heads * spec.head_dim / (base.num_kv_heads * base.head_dim)
    return {
        "query_key_value": (hidden, heads),
        "query": (hidden, heads),
        "key_value": (hidden, kv_heads),
        "dense": (heads, hidden),
        **dict.fromkeys(("linear1", "gate", "up"), (hidden, ffn)),
        "linear2": (ffn, hidden),
    }


def _vector_width(module: str, own: str, spec: ModelSpec, base: WidthScaling) -> float:
    """The one width that grows of a parameter with a single one."""
    matrices = _matrices(spec, base)
    if module in matrices:
        return matrices[module][1]  # its bias
    if module in ("query_norm", "key_norm"):
        return spec.head_dim / base.head_dim
    if module == "rpe":
        return spec.num_heads / base.num_heads
    if (module == "head" and own == "bias") or (module.endswith("norm") and spec.norm == "scalenorm"):
        return 1.0
    return spec.hidden_size / base.hidden_size


def by_width_keys(first: dict[str, Any], second: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two specs as dicts, to be compared: in place of `mup` its fields, by the keys that set them.

    Where one has none, `use_mup` says it all, and the fields of the other are left out.
    """
    is_shared = first.get("mup") is not None and second.get("mup") is not None

    def flat(spec: dict[str, Any]) -> dict[str, Any]:
        widths: dict[str, Any] = spec["mup"] if is_shared else {}
        keys = {_KEYS.get(name, f"mup_base_shapes.{name}"): value for name, value in widths.items()}
        rest = {name: value for name, value in spec.items() if name != "mup"}
        return {**rest, "use_mup": spec.get("mup") is not None, **keys}

    return flat(first), flat(second)
