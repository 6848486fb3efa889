"""Coordinate check: do activations move as far in wide models as in narrow ones, when all train at one learning rate?

Source: Yang et al. 2022, arXiv 2203.03466, appendix D.1. They should under muP, and grow with the width otherwise.
Plain models in one process, without DeepSpeed. Invariant: every width sees the same tokens.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from megatron.model.build import WORD_EMBEDDING, Transformer, build_model
from megatron.model.lora import is_trained
from megatron.model.spec import ModelSpec, WidthScaling
from megatron.model.width_scaling import UpdateRule, lr_factor
from megatron.optim.parameter_groups import parameter_groups

STEPS, ROWS, MOST_TOKENS, REPEATS = 4, 4, 64, 3
LOGITS = "logits"
OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
# The ladder of widths: attended features at its foot, the most hidden features, and rungs; of what is no width, blocks,
# heads and words.
NARROWEST, WIDEST, MOST_WIDTHS = 64, 1024, 4
MOST_LAYERS, MOST_HEADS, MOST_WORDS = 4, 8, 1024
# Slopes of log change over log width. In theory 0 with muP, and without 1/2 or 1 for Adam. The narrow end bends them
# down: what vanishes as width^-1/2, as the logits of the start do under muP, adds to what stays.
LEVEL, FADING = 0.35, -0.75


@dataclass(frozen=True)
class Movement:
    """How far activations moved in `steps` steps, in the mean over seeds.

    widths: hidden sizes. changes: layer -> mean |x after - x before| at each of them.
    """

    widths: list[int]
    steps: int
    changes: dict[str, list[float]]

    def slope(self, layer: str) -> float:
        """p of change ~ width^p, fitted by least squares to the logarithms; nan if something did not move at all."""
        values = self.changes[layer]
        if not all(0 < value < math.inf for value in values):
            return math.nan
        widths = [math.log(width) for width in self.widths]
        return statistics.linear_regression(widths, [math.log(value) for value in values]).slope

    def slopes(self) -> dict[str, float]:
        """Of every layer."""
        return {layer: self.slope(layer) for layer in self.changes}


def ladder(spec: ModelSpec, factor: int) -> list[ModelSpec]:
    """The model at growing widths, narrow enough to train anywhere.

    Heads, blocks and words are few: they are no widths.
    """
    group = spec.num_heads // spec.num_kv_heads
    heads, kv_heads = spec.num_heads, spec.num_kv_heads
    if heads > MOST_HEADS:
        group = min(group, MOST_HEADS)
        kv_heads = MOST_HEADS // group
        heads = group * kv_heads
    head_dim = 8 * math.ceil(NARROWEST / (8 * heads))
    shallow = replace(
        spec.base,
        num_layers=min(spec.num_layers, MOST_LAYERS),
        num_heads=heads,
        num_kv_heads=kv_heads,
        hidden_size=round(spec.hidden_size * heads / spec.num_heads),
        ffn_size=round(spec.ffn_size * heads / spec.num_heads),
        vocab_size=min(spec.vocab_size, MOST_WORDS),
        padded_vocab_size=min(spec.padded_vocab_size, MOST_WORDS),
        window_layers=None,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    wider = [widened(shallow, head_dim * factor**rung) for rung in range(MOST_WIDTHS)]
    return [spec for rung, spec in enumerate(wider) if rung < 2 or spec.hidden_size <= WIDEST]


def widened(spec: ModelSpec, head_dim: int) -> ModelSpec:
    """The same model with heads of another size, and all other widths in proportion."""
    ratio = head_dim / spec.head_dim
    hidden_size = round(spec.hidden_size * ratio)
    return replace(
        spec,
        head_dim=head_dim,
        hidden_size=hidden_size,
        ffn_size=max(1, round(spec.ffn_size * ratio)),
        rotary_dims=max(2, 2 * round(spec.rotary_dims * ratio / 2)) if spec.rotary_dims else 0,
        embedding_scale=1.0 if spec.embedding_scale == 1.0 else math.sqrt(hidden_size),
    )


def measure(
    specs: Sequence[ModelSpec],
    optimizer_factory: OptimizerFactory,
    *,
    learning_rate: float,
    weight_decay: float,
    rule: UpdateRule,
    uses_mup: bool,
    seeds: Sequence[int],
    device: torch.device | str = "cpu",
    steps: int = STEPS,
) -> Movement:
    """Train a model of each spec on one batch for each seed.

    uses_mup: the first spec is the base of all, with the multipliers of its `mup`, if it has one.
    """
    changes: dict[str, list[float]] = {}
    for narrow in specs:
        spec = _with_base(narrow, specs[0]) if uses_mup else replace(narrow, mup=None)
        for seed in seeds:
            model = build_model(spec, seed=seed, device=device)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(is_trained(name, spec, (), ()))
            groups = parameter_groups(model.named_parameters(), weight_decay, _factor(spec, rule))
            optimizer = optimizer_factory(groups)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group["lr_factor"]
            for layer, change in _changes(model, optimizer, seed, steps).items():
                values = changes.setdefault(layer, [])
                if seed == seeds[0]:
                    values.append(0.0)
                values[-1] += change / len(seeds)
    return Movement([spec.hidden_size for spec in specs], steps, changes)


def _changes(model: Transformer, optimizer: torch.optim.Optimizer, seed: int, steps: int) -> dict[str, float]:
    length = min(model.spec.max_positions, MOST_TOKENS) + 1
    text = torch.randint(model.spec.vocab_size, (ROWS, length), generator=torch.Generator().manual_seed(seed))
    text = text.to(next(model.parameters()).device)
    before = activations(model, text[:, :-1])
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model.logits(model(text[:, :-1]))
        classes = logits.shape[-1]
        F.cross_entropy(logits.reshape(-1, classes), text[:, 1:].reshape(-1) % classes).backward()
        optimizer.step()
    after = activations(model, text[:, :-1])
    return {layer: float((x - before[layer]).abs().mean()) for layer, x in after.items()}


def verdict(with_mup: Movement, without: Movement) -> tuple[bool, str]:
    """Whether the scale of activations is independent of the width with muP, and that in words."""
    slopes = with_mup.slopes()
    broken = next((layer for layer, slope in slopes.items() if math.isnan(slope)), None)
    if broken is not None:
        return False, (
            f"NO VERDICT: {broken} did not move, or not by a finite amount, at some width. Choose another "
            "optimizer.params.lr: one at which a narrow model trains."
        )
    fastest, slowest = max(slopes, key=slopes.__getitem__), min(slopes, key=slopes.__getitem__)
    spread = f"change ~ width^p with p from {slopes[slowest]:.2f} ({slowest}) to {slopes[fastest]:.2f} ({fastest})"
    if slopes[fastest] > LEVEL:
        return False, (
            f"NOT INDEPENDENT of the width with muP: {spread}. {fastest} moves farther in wide models. At a smaller "
            "optimizer.params.lr, where narrow models train smoothly, this should not be."
        )
    if slopes[slowest] < FADING:
        return False, (
            f"NOT INDEPENDENT of the width with muP: {spread}. {slowest} moves less and less in wide models: they "
            "would not learn there. Look at the initial values and multipliers."
        )
    plain = {layer: slope for layer, slope in without.slopes().items() if not math.isnan(slope)}
    steepest = max(plain, key=plain.__getitem__, default=None)
    text = f"INDEPENDENT of the width with muP: {spread}."
    if steepest is None:
        return True, f"{text} Without, activations leave the range of numbers."
    if plain[steepest] > LEVEL:
        return True, f"{text} Without, p is up to {plain[steepest]:.2f} ({steepest})."
    return True, (
        f"{text} But without muP as well (p up to {plain[steepest]:.2f}): at this optimizer.params.lr weights hardly "
        "move in so few steps. A larger one tells the two apart."
    )


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
    """One line a layer: its change at each width, and the exponent of the width in it."""
    head = ["layer", *map(str, movement.widths), "p"]
    rows = [
        [layer, *(f"{value:.3g}" for value in values), f"{movement.slope(layer):.2f}"]
        for layer, values in movement.changes.items()
    ]
    sizes = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return "\n".join(
        "  ".join([row[0].ljust(sizes[0]), *(cell.rjust(size) for cell, size in zip(row[1:], sizes[1:], strict=True))])
        for row in [head, *rows]
    )


def _with_base(spec: ModelSpec, base: ModelSpec) -> ModelSpec:
    widths = {
        "hidden_size": base.hidden_size,
        "ffn_size": base.ffn_size,
        "num_heads": base.num_heads,
        "num_kv_heads": base.num_kv_heads,
        "head_dim": base.head_dim,
    }
    mup = WidthScaling(**widths) if base.mup is None else replace(base.mup, **widths)
    return replace(spec, mup=mup, embedding_scale=base.embedding_scale)


def _factor(spec: ModelSpec, rule: UpdateRule) -> Callable[[str], float]:
    return lambda name: lr_factor(name, spec, rule)
