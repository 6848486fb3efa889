"""Turn the list of named layers into what DeepSpeed trains: a plain module, or a PipelineModule of several stages.

Both compute the scaled loss themselves. Invariant: `public_names` gives every parameter of this rank the same name at
every layout.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import nn

from megatron.model.build import HEAD, WORD_EMBEDDING, NamedLayer, Transformer, is_block, layer_list, parameter_names
from megatron.model.layers import TransformerBlock
from megatron.model.recompute import Recompute, grouped
from megatron.model.soft_prompt import text_states
from megatron.model.spec import ModelSpec
from megatron.objectives.labels import label_loss, span_counts, span_loss
from megatron.objectives.language_model import LossTerm, language_model_loss
from megatron.parallel.process_groups import ProcessGroups
from megatron.parallel.random_streams import RandomStream
from megatron.parallel.topology import Topology

_TIED_KEY = "word_embeddings"
_FILLER = "stage_filler"


def deepspeed_topology(topology: Topology) -> PipeModelDataParallelTopology:
    """The same grid in DeepSpeed's terms (its rank order is ours: pipe, data, model)."""
    return PipeModelDataParallelTopology(num_pp=topology.pp_size, num_mp=topology.tp_size, num_dp=topology.dp_size)


def loss_term(
    spec: ModelSpec,
    groups: ProcessGroups,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    loss_mask: torch.Tensor,
) -> LossTerm:
    """The loss of the model's task. Shapes: hidden [B, S, H], weight and bias of the head, labels, loss_mask [B, S]."""
    if spec.task == "causal_lm":
        return language_model_loss(
            hidden, weight, labels, loss_mask, vocab_size=spec.vocab_size, groups=groups, bias=bias
        )
    return (span_loss if spec.task == "question_answering" else label_loss)(hidden, weight, labels, loss_mask, bias)


def counted(spec: ModelSpec, labels: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
    """1 where something stands that the loss sums up, a token or an answer. Shapes: [B, S] -> float [B, S]."""
    return span_counts(labels, loss_mask) if spec.task == "question_answering" else loss_mask


class LossModule(nn.Module):
    """The whole model and its objective, for training without stages."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, tokens: torch.Tensor, labels: torch.Tensor, loss_mask: torch.Tensor, denominator: torch.Tensor
    ) -> torch.Tensor:
        """The scaled loss of one micro-batch. Shapes: tokens, labels, loss_mask [B, T], denominator [] -> []."""
        model = self.model
        hidden = model(tokens)
        term = loss_term(model.spec, model.groups, hidden, model.output_weight, model.output_bias, labels, loss_mask)
        return term.sum / denominator


class _NamedLayerSpec(LayerSpec):
    """DeepSpeed's layer description around ours."""

    def __init__(self, layer: NamedLayer) -> None:
        super().__init__(layer.kind, *layer.args, **layer.kwargs)


class StagedModule(PipelineModule):
    """This rank's stage. The last one ends in the loss; its `targets` wait in line, one entry per micro-batch.

    The loss must be made within `forward`. DeepSpeed hooks the outputs of `forward` and clears gradients when theirs
    arrive (bf16 optimizer): the head's weight, used in a `loss_fn` behind it, would have had its gradient before, and
    lose it.
    """

    def __init__(
        self,
        spec: ModelSpec,
        groups: ProcessGroups,
        stream: RandomStream | None,
        *,
        partition_method: str,
        recompute: Recompute,
    ) -> None:
        layers = layer_list(spec, groups, stream, recompute)
        self.spec, self.groups = spec, groups
        self.targets: deque[tuple[torch.Tensor, ...]] = deque()
        self.layer_names = [layer.name for layer in layers]
        specs: list[Any] = [_NamedLayerSpec(layer) for layer in layers]
        if spec.tied_head:
            first = layers[0]
            specs[0] = TiedLayerSpec(_TIED_KEY, first.kind, *first.args, tied_weight_attr="weight")
            specs.append(
                TiedLayerSpec(_TIED_KEY, first.kind, *first.args, forward_fn=_pass_through, tied_weight_attr="weight")
            )
            self.layer_names.append(HEAD)
        super().__init__(
            layers=specs,
            topology=deepspeed_topology(groups.topology),
            partition_method=partition_method,
            activation_checkpoint_interval=0,
        )

        if groups.at.pp_rank == 0:
            self.forward_funcs[0].register_forward_hook(_with_gradient)
        self.forward_funcs: list[Any] = grouped(list(self.forward_funcs), is_block, recompute, stream)
        if groups.at.pp_rank == groups.topology.pp_size - 1:
            self.forward_funcs[-1] = self._loss
        # DeepSpeed's gradient norm makes one collective per parameter group. A stage of the head alone, which has no
        # norm and no bias, would make one fewer than the others, and all would wait for ever: so each stage has a
        # number in each.
        self.fillers = {f"{_FILLER}_{place}": name for place, name in enumerate(_filler_names(spec))}
        for name in self.fillers:
            filler = torch.nn.Parameter(torch.zeros(1))
            filler.ds_pipe_replicated = False  # type: ignore[attr-defined]
            self.register_parameter(name, filler)

    def _loss(self, hidden: torch.Tensor) -> torch.Tensor:
        labels, loss_mask, denominator = self.targets.popleft()
        owner = (
            self.tied_modules[_TIED_KEY] if self.spec.tied_head else self.get_submodule(str(len(self.layer_names) - 1))
        )
        term = loss_term(
            self.spec,
            self.groups,
            text_states(hidden, self.spec, self.groups),
            owner.get_parameter("weight"),
            owner.get_parameter("bias") if self.spec.head_bias else None,
            labels,
            loss_mask,
        )
        return term.sum / denominator

    def public_name(self, local_name: str) -> str:
        """The public name of a parameter that this module calls `local_name`."""
        owner, _, rest = local_name.partition(".")
        if owner == "tied_modules":
            return f"{WORD_EMBEDDING}.{rest.partition('.')[2]}"
        return f"{self.layer_names[int(owner)]}.{rest}"


def _filler_names(spec: ModelSpec) -> list[str]:
    """One name for every group that the optimizer may make: it groups by name (megatron.optim.parameter_groups)."""
    if spec.mup is None:
        return [f"{_FILLER}.weight", f"{_FILLER}.bias"]
    # Learning rates differ by what a parameter is; all blocks have the same ones.
    names = parameter_names(replace(spec, num_layers=1, window_layers=None))
    return [f"{_FILLER}.{name}" for name in names]


def _with_gradient(embedding: nn.Module, inputs: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Stages hand gradients back whether or not anything before them learns: with all of it frozen, start one here."""
    return hidden.requires_grad_() if torch.is_grad_enabled() and not hidden.requires_grad else hidden


def _pass_through(embedding: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return hidden


def public_names(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Every parameter of this rank with its public name, in the module's order."""
    if isinstance(module, StagedModule):
        return [
            (module.public_name(name), parameter)
            for name, parameter in module.named_parameters()
            if name not in module.fillers
        ]
    assert isinstance(module, LossModule)
    return list(module.model.named_parameters())


def stage_fillers(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Numbers without meaning that keep the optimizer's groups alike on all stages; no checkpoint holds them."""
    if not isinstance(module, StagedModule):
        return []
    return [(public, module.get_parameter(name)) for name, public in module.fillers.items()]


def external_parameters(module: nn.Module) -> list[tuple[nn.Module, nn.Parameter]]:
    """Parameters that a module reads although a child owns them: ZeRO 3 must gather them for the module's forward pass.

    The head's weight goes into the loss, and a block sums its two output layers before it adds their biases.
    """
    found: list[tuple[nn.Module, nn.Parameter]] = []
    if isinstance(module, LossModule):
        found.append((module, module.model.output_weight))
        if module.model.output_bias is not None:
            found.append((module, module.model.output_bias))
    for owner in module.modules():
        if isinstance(owner, TransformerBlock):
            outputs = (owner.attention.dense, owner.mlp.linear2)
            found += [(owner, parameter) for layer in outputs for parameter in layer.parameters()]
    return found
