"""The flat list of named layers: the single definition of their order, for the pipeline and the plain module alike.

Invariant: a parameter's public name is its layer's name, a dot, and its name within the layer, at every layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from megatron.model.attention import KeyValueStore, SelfAttention, rotary_table
from megatron.model.init import initialize_parameters
from megatron.model.layers import Head, PositionEmbedding, TransformerBlock, WordEmbedding
from megatron.model.norms import Norm
from megatron.model.recompute import Recompute, grouped
from megatron.model.soft_prompt import SOFT_PROMPT, SoftPromptEmbedding, text_states
from megatron.model.spec import ModelSpec
from megatron.ops.matmul import linear
from megatron.parallel.collectives import gather_last_dim
from megatron.parallel.process_groups import ProcessGroups
from megatron.parallel.random_streams import RandomStream

WORD_EMBEDDING = "embedding.word_embeddings"
POSITION_EMBEDDING = "embedding.position_embeddings"
HEAD = "head"


NO_RECOMPUTE = Recompute()


@dataclass(frozen=True)
class NamedLayer:
    """One entry of the list: the public name, and how to make the module (weights not yet filled)."""

    name: str
    kind: type[nn.Module]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """Make the module on the default device."""
        return self.kind(*self.args, **self.kwargs)


def layer_list(
    spec: ModelSpec,
    groups: ProcessGroups,
    stream: RandomStream | None = None,
    recompute: Recompute = NO_RECOMPUTE,
) -> list[NamedLayer]:
    """All layers from tokens to hidden states, and the head's weight unless it is the embedding's.

    stream: what divided dropout draws from; None is right for one tensor-parallel rank and without dropout.
    recompute: blocks know of the selective kind; groups of blocks are whoever runs the list's business (`grouped`).
    Raises ValueError if heads do not divide over the tensor-parallel ranks.
    """
    spec.kv_heads_on_rank(groups.tp_size)
    if spec.num_heads % groups.tp_size or spec.ffn_size % groups.tp_size:
        raise ValueError(
            f"{spec.num_heads} heads and {spec.ffn_size} MLP features do not divide over {groups.tp_size} ranks"
        )
    rotary = rotary_table(spec)
    layers = [NamedLayer(WORD_EMBEDDING, WordEmbedding, (spec, groups, stream))]
    if spec.soft_prompt is not None:
        layers.append(NamedLayer(SOFT_PROMPT, SoftPromptEmbedding, (spec, groups, stream)))
    if spec.has_position_layer:
        layers.append(NamedLayer(POSITION_EMBEDDING, PositionEmbedding, (spec, groups, stream)))
    inside = {"recompute_attention": recompute.mode == "selective"}
    layers += [
        NamedLayer(f"layers.{index}", TransformerBlock, (spec, groups, rotary, stream), {**inside, "layer": index})
        for index in range(spec.num_layers)
    ]
    layers.append(NamedLayer("final_norm", Norm, (spec, groups), {"scale": spec.output_scale}))
    if not spec.tied_head:
        layers.append(NamedLayer(HEAD, Head, (spec, groups)))
    return layers


class Transformer(nn.Module):
    """The whole model in one process (or one tensor-parallel rank): training without stages, inference, conversion.

    `named_parameters()` gives the public names.
    """

    def __init__(
        self,
        spec: ModelSpec,
        groups: ProcessGroups,
        stream: RandomStream | None = None,
        recompute: Recompute = NO_RECOMPUTE,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.groups = groups
        for layer in layer_list(spec, groups, stream, recompute):
            _register(self, layer.name, layer.build())
        blocks = list(self.get_submodule("layers").children())
        self.block_groups = grouped(blocks, is_block, recompute, stream)

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        stores: Sequence[KeyValueStore] | None = None,
    ) -> torch.Tensor:
        """Hidden states after the final norm, all tokens on every tensor-parallel rank.

        positions: of a soft prompt too, which is put before tokens without positions: they begin the sequence.
        Shapes: tokens int64 [B, T]; positions int64 [B, T] or None for 0..T-1; stores, one a block -> [B, T, H].
        """
        x = self.get_submodule(WORD_EMBEDDING)(tokens)
        if self.spec.soft_prompt is not None:
            x = self.get_submodule(SOFT_PROMPT)(x, positions)
        if self.spec.has_position_layer:
            x = self.get_submodule(POSITION_EMBEDDING)(x, positions)
        if stores is None:
            for run in self.block_groups:
                x = run(x, positions)
        else:
            for block, store in zip(self.get_submodule("layers").children(), stores, strict=True):
                x = block(x, positions, store)
        return text_states(self.get_submodule("final_norm")(x), self.spec, self.groups, begins=positions is None)

    @property
    def output_weight(self) -> nn.Parameter:
        """The head's weight [V / tp_size, H]: its own, or the embedding's when tied."""
        return self.get_parameter(f"{WORD_EMBEDDING if self.spec.tied_head else HEAD}.weight")

    @property
    def output_bias(self) -> nn.Parameter | None:
        """The head's bias [V / tp_size], where it has one."""
        return self.get_parameter(f"{HEAD}.bias") if self.spec.head_bias else None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits over the real vocabulary (or the labels), whole on every rank, to infer.

        Shapes: [..., H] -> [..., vocab_size or num_labels].
        """
        local = linear(hidden, self.output_weight, self.output_bias)
        if self.spec.task != "causal_lm":
            return local
        return gather_last_dim(local, self.groups.tp)[..., : self.spec.vocab_size]


def build_model(
    spec: ModelSpec,
    groups: ProcessGroups | None = None,
    *,
    seed: int | None = None,
    device: torch.device | str = "cpu",
) -> Transformer:
    """A Transformer on `device` in fp32, filled with initial values of `seed`, or left empty without one."""
    groups = groups or ProcessGroups.single()
    with torch.device(device):
        model = Transformer(spec, groups)
    if seed is not None:
        initialize_parameters(model.named_parameters(), spec, groups, seed)
    return model


def parameter_names(spec: ModelSpec) -> list[str]:
    """The public names of all parameters of a model, in order; nothing is allocated."""
    with torch.device("meta"):
        return [name for name, _ in Transformer(spec, ProcessGroups.single()).named_parameters()]


def choose_attention(model: nn.Module, backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Let all layers compute attention with this backend ("auto": the best that can).

    Raises: ConfigError naming what the backend lacks, on every rank alike.
    """
    for layer in model.modules():
        if isinstance(layer, SelfAttention):
            layer.choose(backend, device.type, dtype)


def vocabulary_parameters(spec: ModelSpec) -> list[str]:
    """The parameters whose first dimension is the padded vocabulary."""
    if spec.tied_head or spec.task != "causal_lm":
        return [f"{WORD_EMBEDDING}.weight"]
    heads = [f"{HEAD}.weight", *([f"{HEAD}.bias"] if spec.head_bias else [])]
    return [f"{WORD_EMBEDDING}.weight", *heads]


def is_block(layer: object) -> bool:
    """Whether a layer is one of those that recomputation groups."""
    return isinstance(layer, TransformerBlock)


def _register(root: nn.Module, dotted: str, module: nn.Module) -> None:
    *parents, leaf = dotted.split(".")
    for name in parents:
        if name not in dict(root.named_children()):
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    root.add_module(leaf, module)
