"""Turn the list of named layers into what DeepSpeed trains: a plain module, or a PipelineModule of several stages.

Both compute the scaled loss themselves. Invariant: `public_names` gives every parameter of this rank the same name at every layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import nn

from megatron.model.build import HEAD, WORD_EMBEDDING, NamedLayer, Transformer, layer_list
from megatron.model.spec import ModelSpec
from megatron.objectives.language_model import language_model_loss
from megatron.parallel.process_groups import ProcessGroups
from megatron.parallel.topology import Topology

_TIED_KEY = "word_embeddings"


def deepspeed_topology(topology: Topology) -> PipeModelDataParallelTopology:
    """The same grid in DeepSpeed's terms (its rank order is ours: pipe, data, model)."""
    return PipeModelDataParallelTopology(
        num_pp=topology.pp_size, num_mp=topology.tp_size, num_dp=topology.dp_size
    )


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
        term = language_model_loss(
            hidden,
            model.output_weight,
            labels,
            loss_mask,
            vocab_size=model.spec.vocab_size,
            groups=model.groups,
        )
        return term.sum / denominator


class _NamedLayerSpec(LayerSpec):
    """DeepSpeed's layer description around ours."""

    def __init__(self, layer: NamedLayer) -> None:
        super().__init__(layer.kind, *layer.args, **layer.kwargs)


class StagedModule(PipelineModule):
    """This rank's stage. Its loss function takes (hidden, head weight) and (labels, loss mask, denominator)."""

    def __init__(self, spec: ModelSpec, groups: ProcessGroups, *, partition_method: str, recompute: bool) -> None:
        layers = layer_list(spec, groups, recompute=recompute)
        self.layer_names = [layer.name for layer in layers]
        specs: list[Any] = [_NamedLayerSpec(layer) for layer in layers]
        if spec.tied_head:
            first = layers[0]
            specs[0] = TiedLayerSpec(_TIED_KEY, first.kind, *first.args, tied_weight_attr="weight")
            specs.append(
                TiedLayerSpec(_TIED_KEY, first.kind, *first.args, forward_fn=_tied_head, tied_weight_attr="weight")
            )
            self.layer_names.append(HEAD)
        super().__init__(
            layers=specs,
            topology=deepspeed_topology(groups.topology),
            loss_fn=_pipeline_loss(spec, groups),
            partition_method=partition_method,
            activation_checkpoint_interval=0,
        )

    def public_name(self, local_name: str) -> str:
        """The public name of a parameter that this module calls `local_name`."""
        owner, _, rest = local_name.partition(".")
        if owner == "tied_modules":
            return f"{WORD_EMBEDDING}.{rest.partition('.')[2]}"
        return f"{self.layer_names[int(owner)]}.{rest}"


def _tied_head(embedding: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return hidden, embedding.get_parameter("weight")


def _pipeline_loss(
    spec: ModelSpec, groups: ProcessGroups
) -> Callable[[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]], torch.Tensor]:
    def loss(outputs: tuple[torch.Tensor, ...], targets: tuple[torch.Tensor, ...]) -> torch.Tensor:
        hidden, weight = outputs
        labels, loss_mask, denominator = targets
        term = language_model_loss(hidden, weight, labels, loss_mask, vocab_size=spec.vocab_size, groups=groups)
        return term.sum / denominator

    return loss


def public_names(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Every parameter of this rank with its public name, in the module's order."""
    if isinstance(module, StagedModule):
        return [(module.public_name(name), parameter) for name, parameter in module.named_parameters()]
    assert isinstance(module, LossModule)
    return list(module.model.named_parameters())
