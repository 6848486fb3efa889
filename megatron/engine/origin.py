"""Where a NaN or an infinity came from: the step is rehearsed with every output and every gradient looked at.

Nothing is watched in good steps, so they pay nothing. The rehearsal draws the same random numbers, so that only what
went wrong once (a flipped bit, a bad link) does not come again; and that is said. Invariant: weights, masters and
optimizer state are not touched.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron.data.loader import Batch
from megatron.engine.state import export_pieces
from megatron.engine.train_engine import TrainEngine
from megatron.model.build import is_block

_SHOWN = 8


@dataclass
class Finding:
    """What one rank saw. Tensors by their public names; micro_batches: which of the step's were bad on this rank.

    stored: of a weight, master or optimizer state that is itself not finite. output: of the first module whose
    output was not, the `output_at`-th that it saw. gradient: the first parameter's, in the order of the backward pass.
    """

    global_rank: int
    pp_rank: int
    dp_rank: int
    stored: str = ""
    output: str = ""
    output_at: int = 0
    gradient: str = ""
    gradient_at: int = 0
    bad_losses: set[int] = field(default_factory=set)
    micro_batches: set[int] = field(default_factory=set)
    sample_ids: list[int] = field(default_factory=list)

    @property
    def is_bad(self) -> bool:
        """Whether this rank saw anything."""
        return bool(self.stored or self.output or self.gradient or self.bad_losses)


@dataclass(frozen=True)
class Origin:
    """The findings of all ranks that saw something; equal on all ranks."""

    findings: list[Finding]

    @property
    def has_bad_state(self) -> bool:
        """Whether a weight, master or optimizer state is not finite, so that no other data can help."""
        return any(finding.stored for finding in self.findings)

    def __str__(self) -> str:
        if not self.findings:
            return (
                "computed a second time, the step was finite on every rank: a fault that comes and goes, as of memory, "
                "a link or a kernel that is not deterministic"
            )
        stored = [finding for finding in self.findings if finding.stored]
        # The forward pass runs from the first stage to the last, the backward pass the other way.
        outputs = sorted((f for f in self.findings if f.output), key=lambda f: (f.pp_rank, f.output_at, f.global_rank))
        gradients = sorted(
            (f for f in self.findings if f.gradient), key=lambda f: (-f.pp_rank, f.gradient_at, f.global_rank)
        )
        parts = []
        if stored:
            parts.append(f"first bad tensor: {stored[0].stored} on {_ranks(stored)}")
        elif outputs:
            same = [f for f in outputs if f.output == outputs[0].output]
            parts.append(f"first bad tensor: the output of {outputs[0].output} on {_ranks(same)}")
        elif gradients:
            same = [f for f in gradients if f.gradient == gradients[0].gradient]
            parts.append(f"first bad tensor: the gradient of {gradients[0].gradient} on {_ranks(same)}")
        elif any(f.bad_losses for f in self.findings):
            parts.append(f"the loss on {_ranks([f for f in self.findings if f.bad_losses])}; it did not come again")
        by_replica: dict[int, set[int]] = collections.defaultdict(set)
        for finding in self.findings:
            by_replica[finding.dp_rank].update(finding.sample_ids)
        parts += [f"samples of replica {dp_rank}: {brief(sorted(ids))}" for dp_rank, ids in sorted(by_replica.items())]
        return "; ".join(parts)


def brief(values: Sequence[int]) -> str:
    """The first few of them."""
    shown = ", ".join(map(str, values[:_SHOWN]))
    return shown if len(values) <= _SHOWN else f"{shown}, ... ({len(values)} in all)"


def _ranks(findings: Sequence[Finding]) -> str:
    numbers = sorted({finding.global_rank for finding in findings})
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {brief(numbers)}"


def find_origin(engine: TrainEngine, batches: Sequence[Batch], before: tuple[torch.Tensor, torch.Tensor]) -> Origin:
    """Rehearse the step just made on these batches, and tell all ranks what was not finite where. Collective.

    before: the random states that the step began with.
    """
    at = engine.groups.at
    finding = Finding(engine.groups.global_rank, at.pp_rank, at.dp_rank, stored=_first_stored(engine))
    finding.bad_losses = {i for i, loss in enumerate(engine.micro_batch_losses()) if not bool(torch.isfinite(loss))}
    after = engine.stream.capture()
    engine.stream.restore(before)
    handles = [*_watch_outputs(engine, finding), *_watch_gradients(engine, finding)]
    try:
        engine.rehearse_step(batches)
    finally:
        for handle in handles:
            handle.remove()
        engine.stream.restore(after)
    micro_batches = finding.micro_batches | finding.bad_losses
    finding.sample_ids = [sample for i in sorted(micro_batches) if i < len(batches) for sample in batches[i].sample_ids]
    findings: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(findings, finding)
    return Origin([finding for finding in findings if finding.is_bad])


def _first_stored(engine: TrainEngine) -> str:
    for piece in export_pieces(engine):
        if piece.tensor.is_floating_point() and not bool(torch.isfinite(piece.tensor).all()):
            return f"the stored {piece.name}" if piece.kind == "weight" else f"the stored {piece.name} ({piece.kind})"
    for name, parameter in engine.named_parameters:
        if parameter.numel() and not bool(torch.isfinite(parameter).all()):
            return f"the weight {name}"
    return ""


def _watch_outputs(engine: TrainEngine, finding: Finding) -> Iterator[Any]:
    """Every module that owns a parameter, by that parameter's public name, and every block.

    A block may add up the parts of two layers of its own before either has an output (tensor parallelism).
    """
    names = {id(parameter): name.rpartition(".")[0] for name, parameter in engine.named_parameters}
    order = itertools.count()

    def see(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            at = next(order)
            tensors = [output] if torch.is_tensor(output) else [t for t in _flat(output) if torch.is_tensor(t)]
            if not finding.output and not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
                finding.output, finding.output_at = name, at

        return hook

    for module in engine.module.modules():
        owned = [names[id(p)] for p in module.parameters(recurse=False) if id(p) in names]
        if not owned and is_block(module):
            # `layers.3` of `layers.3.mlp.linear1.weight`
            owned = [".".join(names[id(p)].split(".")[:2]) for p in module.parameters()][:1]
        if owned:
            yield module.register_forward_hook(see(owned[0]))


def _flat(output: Any) -> list[Any]:
    return list(output) if isinstance(output, (tuple, list)) else []


def _watch_gradients(engine: TrainEngine, finding: Finding) -> Iterator[Any]:
    """Every gradient as this rank made it, before it is averaged with those of the other replicas."""
    order = itertools.count()

    def see(name: str) -> Callable[[torch.Tensor], None]:
        calls = iter(range(engine.options.num_micro_batches))

        def hook(gradient: torch.Tensor) -> None:
            micro_batch, at = next(calls, None), next(order)
            if bool(torch.isfinite(gradient).all()):
                return
            if not finding.gradient:
                finding.gradient, finding.gradient_at = name, at
            if micro_batch is not None:
                finding.micro_batches.add(micro_batch)

        return hook

    for name, parameter in engine.named_parameters:
        if parameter.requires_grad:
            yield parameter.register_hook(see(name))
