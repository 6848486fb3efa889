"""Norms of every parameter, gradient and optimizer state, zeros in gradients, and the gradient noise scale.

Each is that of the logical tensor, whatever the layout: sums over fragments are added up over all ranks, copies are
counted once. Invariant: nothing here changes what a step does.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron.checkpoint.piece import Piece
from megatron.engine.gradients import gradient_pieces, master_pieces
from megatron.engine.state import WEIGHT, export_pieces
from megatron.engine.train_engine import StepResult, TrainEngine
from megatron.parallel.sharding import get_shard_spec

# Weight of the past in the noise scale's two running means.
_DECAY = 0.99
_GRADIENT, _ZEROS = "gradient", "zeros"

Key = tuple[str, str]  # kind, name


@dataclass(frozen=True)
class StatisticsOptions:
    """Which statistics there are; upstream's log_* keys.

    noise_scale_batches: steps whose gradients are averaged for the large batch; 0 leaves the noise scale out.
    offload_noise_scale: keep that average in the host's memory.
    """

    param_norm: bool = False
    grad_norm: bool = False
    grad_zeros: bool = False
    optimizer_states: bool = False
    noise_scale_batches: int = 0
    offload_noise_scale: bool = False

    @property
    def any(self) -> bool:
        """Whether there is anything to do."""
        return self.param_norm or self.sees_gradients or self.optimizer_states

    @property
    def sees_gradients(self) -> bool:
        """Whether gradients are needed."""
        return self.grad_norm or self.grad_zeros or self.noise_scale_batches > 0


class NoiseScale:
    """The simple gradient noise scale: the batch size, in sequences, at which noise and signal are alike.

    Source: McCandlish et al. 2018, arXiv 1812.06162, appendix A.1; as upstream, the small batch is one step's and the
    large one the mean of several steps'.
    """

    def __init__(self, batch_size: int, num_batches: int) -> None:
        self.small, self.large = batch_size, batch_size * num_batches
        self._noise = self._signal = 0.0

    def add(self, small_squared: float, large_squared: float) -> float:
        """Squared norms of the gradient at the small batch (a mean) and at the large one -> the noise scale."""
        signal = (self.large * large_squared - self.small * small_squared) / (self.large - self.small)
        noise = (small_squared - large_squared) / (1 / self.small - 1 / self.large)
        self._signal = _DECAY * self._signal + (1 - _DECAY) * signal
        self._noise = _DECAY * self._noise + (1 - _DECAY) * noise
        return self._noise / self._signal if self._signal else math.nan


class Statistics:
    """Looks at every step. Building one, and `collect`, is collective over all ranks."""

    def __init__(self, engine: TrainEngine, options: StatisticsOptions, batch_size: int) -> None:
        """batch_size: sequences per step."""
        self.engine, self.options = engine, options
        # Name -> elements of the logical tensor, of all stages.
        own = {name: math.prod(get_shard_spec(p).logical_shape) for name, p in engine.named_parameters}
        every: list[dict[str, int]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(every, own)
        self._numel = {name: numel for of_rank in every for name, numel in of_rank.items()}
        self._sums: dict[Key, torch.Tensor] = {}
        self._masters: list[Piece] = []
        self._accumulated: dict[str, torch.Tensor] = {}
        self._pending: dict[str, torch.Tensor] = {}
        self._small_squared: list[float] = []
        self._noise = NoiseScale(batch_size, options.noise_scale_batches) if options.noise_scale_batches else None
        self._is_watching = False
        if options.sees_gradients:
            engine.deepspeed.optimizer.optimizer.register_step_pre_hook(self._see_gradients)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Make a step within."""
        self._sums, self._pending = {}, {}
        if self.options.sees_gradients:
            self._masters, self._is_watching = master_pieces(self.engine), True
        try:
            yield
        finally:
            self._is_watching = False

    @torch.no_grad()
    def collect(self, result: StepResult) -> dict[str, float]:
        """The statistics of the step just made, under upstream's metric names; equal on all ranks.

        Of a skipped step there are those of parameters and states only.
        """
        options = self.options
        if options.param_norm or options.optimizer_states:
            for piece in export_pieces(self.engine):
                if (options.param_norm if piece.kind == WEIGHT else options.optimizer_states) and not piece.is_replica:
                    self._add(piece.kind, piece.name, piece.tensor)
        sums = self._added_up()
        found: dict[str, float] = {}
        # Clipping is undone: all gradients were multiplied by one number.
        clipped = math.sqrt(sum(value for (kind, _), value in sums.items() if kind == _GRADIENT))
        scale = result.grad_norm / clipped if clipped else 1.0
        for (kind, name), value in sums.items():
            if kind == _GRADIENT and options.grad_norm:
                found[f"gradient_norms/{name}"] = math.sqrt(value) * scale
            elif kind == _ZEROS:
                found[f"pct_grad_zeros/{name}"] = 100.0 * value / self._numel[name]
            elif kind == WEIGHT:
                found[f"parameter_norms/{name}"] = math.sqrt(value)
            elif kind != _GRADIENT:
                found[f"optimizer_state_norms/{name}_{kind}"] = math.sqrt(value)
        if self._noise is not None and not result.is_skipped:
            found |= self._noise_scale(result, scale)
        return found

    def _noise_scale(self, result: StepResult, scale: float) -> dict[str, float]:
        """Take this step's gradient into the large batch; when that is full, the noise scale. Collective."""
        assert self._noise is not None
        for key, clipped in self._pending.items():
            gradient = clipped * scale
            kept = self._accumulated.get(key)
            if kept is None:
                kept = self._accumulated[key] = torch.zeros_like(
                    gradient, device="cpu" if self.options.offload_noise_scale else gradient.device
                )
            kept.add_(gradient.to(kept.device))
        self._small_squared.append(result.grad_norm**2)
        count = len(self._small_squared)
        if count < self.options.noise_scale_batches:
            return {}
        squares = [value.square().sum(dtype=torch.float64).cpu() for value in self._accumulated.values()]
        total = torch.stack([*squares, torch.zeros((), dtype=torch.float64)]).sum().float().to(self.engine.device)
        dist.all_reduce(total)
        small = sum(self._small_squared) / count
        self._accumulated, self._small_squared = {}, []
        return {"train/noise_scale": self._noise.add(small, float(total) / count**2)}

    def _see_gradients(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Called by torch at the head of the optimizer's own step."""
        if not self._is_watching:
            return
        for piece, gradient in gradient_pieces(optimizer, self._masters):
            if piece.is_replica:
                continue
            self._add(_GRADIENT, piece.name, gradient)
            if self.options.grad_zeros:
                zeros = (gradient == 0).sum(dtype=torch.float32)
                self._sums[_ZEROS, piece.name] = self._sums.get((_ZEROS, piece.name), 0.0) + zeros
            if self._noise is not None:
                self._pending[f"{piece.name}:{piece.start}"] = gradient.float().clone()

    def _add(self, kind: str, name: str, tensor: torch.Tensor) -> None:
        square = tensor.float().square().sum()
        self._sums[kind, name] = self._sums.get((kind, name), 0.0) + square.to(self.engine.device)

    def _added_up(self) -> dict[Key, float]:
        """Sums over all ranks. Collective."""
        kinds: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(kinds, sorted({kind for kind, _ in self._sums}))
        keys = [
            (kind, name) for kind in sorted({kind for of_rank in kinds for kind in of_rank}) for name in self._numel
        ]
        if not keys:
            return {}
        zero = torch.zeros((), device=self.engine.device)
        vector = torch.stack([self._sums.get(key, zero) for key in keys])
        dist.all_reduce(vector)
        return dict(zip(keys, vector.tolist(), strict=True))
