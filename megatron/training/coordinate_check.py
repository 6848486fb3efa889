"""Coordinate check: do activations move as far in wide models as in narrow ones, when all train at one learning rate?

Source: Yang et al. 2022, arXiv 2203.03466, appendix D.1. They should under muP, and grow with the width otherwise.
Plain models in one process, without DeepSpeed. Invariant: every width sees the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from megatron.model.build import WORD_EMBEDDING, Transformer, build_model
from megatron.model.spec import ModelSpec, WidthScaling
from megatron.model.width_scaling import UpdateRule, lr_factor
from megatron.optim.parameter_groups import parameter_groups

STEPS, ROWS, MOST_TOKENS = 4, 4, 64
LOGITS = "logits"
OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Movement:
    """changes: layer -> mean |x after `steps` steps - x before| at each of `widths` (hidden sizes)."""

    widths: list[int]
    steps: int
    changes: dict[str, list[float]]

    def growth(self, layer: str) -> float:
        """How much farther a layer's output moves in the widest model than in the narrowest."""
        return self.changes[layer][-1] / self.changes[layer][0]


def widened(spec: ModelSpec, head_dim: int, num_layers: int | None = None) -> ModelSpec:
    """The same model with heads of another size, and all other widths in proportion; no dropout, no updates."""
    ratio = head_dim / spec.head_dim
    return replace(
        spec,
        num_layers=num_layers or spec.num_layers,
        head_dim=head_dim,
        hidden_size=round(spec.hidden_size * ratio),
        ffn_size=round(spec.ffn_size * ratio),
        rotary_dims=2 * round(spec.rotary_dims * ratio / 2),
        window_layers=None,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        lora=None,
        mup=None,
    )


def measure(
    specs: Sequence[ModelSpec],
    optimizer_factory: OptimizerFactory,
    *,
    learning_rate: float,
    weight_decay: float,
    rule: UpdateRule,
    uses_mup: bool,
    seed: int,
    device: torch.device | str = "cpu",
    steps: int = STEPS,
) -> Movement:
    """Train a model of each spec on one batch; the first spec is the base of the others where muP is used."""
    base = specs[0]
    widths = WidthScaling(base.hidden_size, base.ffn_size, base.num_heads, base.num_kv_heads, base.head_dim)
    length = min(base.max_positions, MOST_TOKENS) + 1
    text = torch.randint(base.vocab_size, (ROWS, length), generator=torch.Generator().manual_seed(seed)).to(device)
    changes: dict[str, list[float]] = {}
    for narrow in specs:
        spec = replace(narrow, mup=widths) if uses_mup else narrow
        model = build_model(spec, seed=seed, device=device)
        groups = parameter_groups(model.named_parameters(), weight_decay, _factor(spec, rule))
        optimizer = optimizer_factory(groups)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_factor"]
        before = activations(model, text[:, :-1])
        for _ in range(steps):
            optimizer.zero_grad()
            logits = model.logits(model(text[:, :-1]))
            classes = logits.shape[-1]
            F.cross_entropy(logits.reshape(-1, classes), text[:, 1:].reshape(-1) % classes).backward()
            optimizer.step()
        after = activations(model, text[:, :-1])
        for layer, x in after.items():
            changes.setdefault(layer, []).append(float((x - before[layer]).abs().mean()))
    return Movement([spec.hidden_size for spec in specs], steps, changes)


@torch.no_grad()
def activations(model: Transformer, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The outputs of the embedding, of both halves of every block, of every block, and the logits."""
    found: dict[str, torch.Tensor] = {}
    names = [WORD_EMBEDDING]
    for index in range(model.spec.num_layers):
        names += [f"layers.{index}.attention.dense", f"layers.{index}.mlp.linear2", f"layers.{index}"]
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: found.__setitem__(name, output.float())
        )
        for name in names
    ]
    logits = model.logits(model(tokens)).float()
    for hook in hooks:
        hook.remove()
    return {**{name: found[name] for name in names}, LOGITS: logits}


def table(movement: Movement) -> str:
    """One line a layer, one column a width, and the last over the first."""
    head = ["layer", *map(str, movement.widths), "last / first"]
    rows = [
        [layer, *(f"{value:.3g}" for value in values), f"{movement.growth(layer):.2f}"]
        for layer, values in movement.changes.items()
    ]
    sizes = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return "\n".join(
        "  ".join([row[0].ljust(sizes[0]), *(cell.rjust(size) for cell, size in zip(row[1:], sizes[1:], strict=True))])
        for row in [head, *rows]
    )


def _factor(spec: ModelSpec, rule: UpdateRule) -> Callable[[str], float]:
    return lambda name: lr_factor(name, spec, rule)
