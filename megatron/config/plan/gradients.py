"""Where gradients flow through a block of which some parameters are frozen: what waits for them, and what they cost.

A frozen matrix needs no gradient of its own and so not its input; a tensor that depends on nothing that learns needs no
gradient at all. Invariant: the same products and the same kept tensors as autograd's, for every choice of parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from megatron.config.plan.architecture import BLOCK, Layer, Parameter
from megatron.config.schema import ModelSection

_QKV = ("attention.query_key_value", "attention.query", "attention.key_value")
_INNER = ("mlp.linear1", "mlp.gate", "mlp.up")


def with_gradients(
    layers: Iterable[Layer], model: ModelSection, *, dropped_updates: bool, staged: bool
) -> tuple[Layer, ...]:
    """The layers with the FLOPs of their backward pass, and without what no backward pass asks for.

    dropped_updates: low-rank updates drop parts of their input, and so keep one of their own. staged: pipeline stages
    ask for the gradient of what enters them, needed or not, the first one for that of the embeddings.
    """
    found: list[Layer] = []
    # Whether the residual stream depends on something that learns.
    flows = staged
    for layer in layers:
        if layer.kind == BLOCK:
            block = _Block(layer, model, flows, dropped_updates)
            found.append(block.layer())
            flows = block.leaves
            continue
        learns = any(p.trained for p in layer.parameters)
        if layer.flops:
            # The output head; a tied one learns where the embedding does.
            weights = found[0].parameters if layer.ties else layer.parameters
            times = int(weights[0].trained) + int(flows)
            layer = replace(layer, backward=tuple((name, times * count) for name, count in layer.flops))
        found.append(layer)
        flows = flows or learns
    return tuple(found)


class _Block:
    """One block: which of its tensors need a gradient, if its input does (`enters`) or not."""

    def __init__(self, layer: Layer, model: ModelSection, enters: bool, dropped_updates: bool) -> None:
        self.block, self.model, self.dropped = layer, model, dropped_updates
        self.named: dict[str, Parameter] = {p.name.split(".", 2)[2]: p for p in layer.parameters}
        is_parallel = model.gpt_j_residual
        self.normed = enters or self._learns("input_layernorm")
        values = {name: self.normed or self._learns(name) for name in _QKV if f"{name}.weight" in self.named}
        self.queries = values.get(_QKV[0], values.get(_QKV[1], False)) or self._learns("attention.query_norm")
        self.values = values.get(_QKV[0], values.get(_QKV[2], False))
        self.keys = self.values or self._learns("attention.key_norm")
        self.scores = self.queries or self.keys or self._learns("attention.rpe")
        self.attended = self.scores or self.values
        projected = self.attended or self._learns("attention.dense")
        between = enters if is_parallel else enters or projected
        self.mlp_input = self.normed if model.gpt_j_tied else between or self._learns("post_attention_layernorm")
        self.inner = self.mlp_input or self._learns(*_INNER)
        self.leaves = enters or projected or self.inner or self._learns("mlp.linear2")
        self.needed = {
            "normed": self.normed,
            "mlp input": self.mlp_input,
            "attended": self.attended,
            "projected": projected,
            "inner": self.inner,
            "leaves": self.inner or self._learns("mlp.linear2"),
            "first norm's weight": self._learns("input_layernorm.weight"),
            "second norm's weight": self._learns("post_attention_layernorm.weight"),
            "qkv's weight": self._reads_input(*_QKV),
            "dense's weight": self._reads_input("attention.dense"),
            "inner weight": self._reads_input(*_INNER),
            "linear2's weight": self._reads_input("mlp.linear2"),
        }

    def layer(self) -> Layer:
        """The block, as it is trained."""
        kept = tuple(x for x in self.block.kept if not x.needed_by or any(self.needed[name] for name in x.needed_by))
        return replace(self.block, kept=kept, backward=tuple(self._backward()))

    def _learns(self, *parts: str) -> bool:
        """Whether a parameter of one of these parts learns, low-rank updates included."""
        return any(
            p.trained and (name == part or name.startswith(f"{part}."))
            for name, p in self.named.items()
            for part in parts
        )

    def _reads_input(self, *parts: str) -> bool:
        """Whether a gradient of one of these matrices asks for the matrix's input as it was."""
        weights = [f"{part}.weight" for part in parts]
        updates = [] if self.dropped else [f"{part}.lora.a" for part in parts]
        return any(name in self.named and self.named[name].trained for name in (*weights, *updates))

    def _backward(self) -> Iterable[tuple[str, int]]:
        """FLOPs of one token by term, the backward pass alone."""
        forward = dict(self.block.flops)
        inputs = {
            **dict.fromkeys(_QKV, self.normed),
            "attention.dense": self.attended,
            **dict.fromkeys(_INNER, self.mlp_input),
            "mlp.linear2": self.inner,
        }
        terms = {**dict.fromkeys(_QKV, "query_key_value"), "attention.dense": "attention_output"}
        cost = dict.fromkeys(forward, 0)
        for part, has_gradient in inputs.items():
            weight = self.named.get(f"{part}.weight")
            if weight is None:
                continue
            cost[terms.get(part, "feed_forward")] += 2 * weight.numel * (int(weight.trained) + int(has_gradient))
            a, b = self.named.get(f"{part}.lora.a"), self.named.get(f"{part}.lora.b")
            if a is not None and b is not None:
                cost["low_rank_updates"] += 2 * a.numel * (int(a.trained) + int(has_gradient))
                cost["low_rank_updates"] += 2 * b.numel * (int(b.trained) + int(a.trained or has_gradient))
        cost["scores"] = forward["scores"] * (int(self.queries) + int(self.keys))
        cost["weighted_values"] = forward["weighted_values"] * (int(self.scores) + int(self.values))
        return cost.items()
