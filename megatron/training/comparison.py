"""Two traces of one model at two layouts: is the difference rounding, and if not, where does it begin?

What is judged, each against the noise that its number format explains (NOISE):

    loss, gradient norm   relative, every step
    moments               root mean square of the difference, relative to that of the tensor. A tensor whose gradient
    is much smaller
                          than the model's typical one is measured by a tenth of the typical: it may be a small
                          difference of large terms, or zero but for rounding (a key's bias).
    weights               relative to how far the weights have come since the start, and only in elements whose
    gradient stands
                          well above its rounding error. Adam divides a gradient by its own size: where it is nothing
                          but rounding, the step is as large as any, and its direction is chance.

Invariant: two traces of which one is of another model are never called equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron.checkpoint import Reader
from megatron.training.tracing import Trace

WEIGHT, FIRST, SECOND = "weight", "exp_avg", "exp_avg_sq"


@dataclass(frozen=True)
class Noise:
    """Largest differences that rounding explains after one step.

    They grow in proportion to the number of steps, because each step starts from weights that are off already.

    unit: of the number format, half the distance from 1 to the next number. Relative, without units.
    """

    unit: float
    loss: float
    norm: float
    moment: float
    weight: float


# Measured over the matrix of docs/parallel_equivalence.md and whole runs of small models, times about five. fp32:
# losses agree to 2 units, gradients to some tens, for they are sums in another order. bf16 and fp16 round every
# activation: the fp32 masters and moments differ by what the activations do, so by a few units of the half format,
# times the depth.
NOISE = {
    "fp32": Noise(6e-8, loss=1e-6, norm=1e-5, moment=3e-5, weight=3e-3),
    "bfloat16": Noise(4e-3, loss=5e-3, norm=0.1, moment=0.15, weight=0.3),
    "fp16": Noise(5e-4, loss=1e-3, norm=1e-2, moment=3e-2, weight=0.1),
}

# A gradient's element counts as rounding where it is below this many units of the typical gradient.
_CLEAR_UNITS = 100.0
# See the module's docstring: tensors with small gradients.
_SMALL_TENSOR = 0.1


@dataclass(frozen=True)
class Finding:
    """One quantity at one step: its difference, and the difference that rounding explains."""

    step: int
    name: str
    kind: str
    difference: float
    noise: float

    @property
    def ratio(self) -> float:
        """Above 1, rounding does not explain it."""
        return math.inf if math.isnan(self.difference) else self.difference / self.noise

    @property
    def is_beyond(self) -> bool:
        """Whether rounding does not explain it."""
        return self.ratio > 1.0


def compare_traces(first: Path, second: Path) -> Iterator[list[Finding]]:
    """All findings of one step after the other, from step 0, the initial weights; each in the model's order."""
    one, other = Trace.read(first), Trace.read(second)
    noise = NOISE[one.precision]
    for step in range(len(one.losses) + 1):
        findings = []
        if step:
            pairs = (
                ("loss", one.losses, other.losses, noise.loss),
                ("gradient norm", one.norms, other.norms, noise.norm),
            )
            findings = [
                Finding(step, name, "", _relative(ours[step - 1], theirs[step - 1]), bound * step)
                for name, ours, theirs, bound in pairs
            ]
            if one.skipped[step - 1] != other.skipped[step - 1]:
                findings.append(Finding(step, "skipped step", "", 1.0, 0.5))
        if step in one.saved:
            findings += _compare_tensors(first, second, step, noise)
        yield findings


def _compare_tensors(first: Path, second: Path, step: int, noise: Noise) -> list[Finding]:
    ours, theirs = (Reader(folder / f"global_step{step}") for folder in (first, second))
    if ours.names() != theirs.names():
        missing = sorted(set(ours.names()) ^ set(theirs.names()))
        return [Finding(step, name, "in one run only", math.inf, 1.0) for name in missing]
    names = ours.names()
    if not step:
        return [
            Finding(0, name, "initial weight", _largest(ours.read(name) - theirs.read(name)), 1e-30) for name in names
        ]
    # An optimizer that steps by the sign alone (Lion) turns rounding into whole steps: its weights say nothing.
    is_by_sign = bool(theirs.names(FIRST)) and not theirs.names(SECOND)
    before = Reader(first / "global_step0")
    typical = {kind: _typical(theirs, kind) for kind in (FIRST, SECOND)}
    findings = []
    for name in names:
        for kind in (kind for kind in theirs.kinds(name) if kind != WEIGHT):
            mine, reference = ours.read(name, kind), theirs.read(name, kind)
            size = max(_rms(reference), _SMALL_TENSOR * typical.get(kind, 0.0))
            if size:
                # A second moment is a square: its relative error is twice the gradient's.
                bound = noise.moment * step * (2.0 if kind == SECOND else 1.0)
                findings.append(Finding(step, name, kind, _rms(mine - reference) / size, bound))
        if is_by_sign:
            continue
        mine, reference = ours.read(name), theirs.read(name)
        clear = _clear_elements(theirs, name, typical[SECOND], noise)
        moved = (reference - before.read(name))[clear]
        if moved.numel() and _rms(moved):
            difference = _rms((mine - reference)[clear]) / _rms(moved)
            findings.append(Finding(step, name, WEIGHT, difference, noise.weight * step))
    return findings


def _clear_elements(reader: Reader, name: str, typical: float, noise: Noise) -> torch.Tensor:
    """Where the gradients of an element have stood well above rounding; everywhere without a second moment."""
    if SECOND not in reader.kinds(name):
        return torch.ones(reader.spec(name).logical_shape, dtype=torch.bool)
    return reader.read(name, SECOND).sqrt() > _CLEAR_UNITS * noise.unit * math.sqrt(typical)


def _typical(reader: Reader, kind: str) -> float:
    """Root mean square over all elements of all tensors."""
    squares, elements = 0.0, 0
    for name in reader.names(kind):
        tensor = reader.read(name, kind)
        squares += float(tensor.double().square().sum())
        elements += tensor.numel()
    return math.sqrt(squares / elements) if elements else 0.0


def _relative(ours: float, theirs: float) -> float:
    if ours == theirs:
        return 0.0
    return abs(ours - theirs) / abs(theirs) if theirs else math.inf


def _rms(tensor: torch.Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max())
