"""One optimizer step over DeepSpeed, the same from outside whether there are pipeline stages or not.

The engine owns the scaling of the loss: DeepSpeed divides by the number of micro-batches and averages over the
data-parallel ranks; `loss_denominators` makes that the normalisation that was asked for. Not here: when to step, save
or validate (megatron.training). Invariant: every method is collective over all ranks.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipelineParallelGrid

from megatron.common.heartbeat import beat
from megatron.data.loader import Batch
from megatron.engine.construction import build_module, fill, zero_3_division
from megatron.engine.modules import (
    StagedModule,
    counted,
    deepspeed_topology,
    external_parameters,
    public_names,
    stage_fillers,
)
from megatron.engine.options import EngineOptions, LossNormalization, deepspeed_config
from megatron.engine.step_guard import Judge, StepGuard, accept_finite
from megatron.model.build import NO_RECOMPUTE, choose_attention, is_block
from megatron.model.recompute import Recompute
from megatron.model.spec import ModelSpec
from megatron.parallel.process_groups import ProcessGroups
from megatron.parallel.random_streams import seed_streams

# What DeepSpeed's DynamicLossScaler changes as it goes.
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

OptimizerFactory = Callable[[list[tuple[str, torch.nn.Parameter]]], torch.optim.Optimizer]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports; equal on all ranks.

    loss: mean over micro-batches and data-parallel ranks, in nats per token. grad_norm: before clipping; infinite
    where it could not be computed. is_skipped: the optimizer did not move, because one of the two is not finite or the
    judge refused the step. loss_scale: of fp16, None otherwise. is_scale_lowered: fp16 gradients overflowed, and the
    dynamic loss scale can still give way.
    """

    loss: float
    grad_norm: float
    is_skipped: bool
    loss_scale: float | None
    is_scale_lowered: bool = False


def loss_denominators(
    masks: Sequence[torch.Tensor], normalization: LossNormalization, groups: ProcessGroups
) -> list[torch.Tensor]:
    """What to divide the loss sum of each micro-batch by, given its loss mask.

    micro_batch (upstream's): the mean over the micro-batch's unmasked tokens; a micro-batch without any counts as
    loss 0.
    tokens: after DeepSpeed's own averaging, exactly the mean over all unmasked tokens of the global batch, at any
    layout.
    """
    counts = [mask.sum(dtype=torch.float32) for mask in masks]
    if normalization == "micro_batch":
        return [count.clamp(min=1.0) for count in counts]
    total = torch.stack(counts).sum()
    if groups.dp is not None:
        dist.all_reduce(total, group=groups.dp)
    shares = len(masks) * groups.dp_size
    return [(total / shares).clamp(min=1.0 / shares)] * len(masks)


class TrainEngine:
    """The model of this rank, its optimizer, and DeepSpeed around both."""

    def __init__(
        self,
        spec: ModelSpec,
        groups: ProcessGroups,
        options: EngineOptions,
        optimizer_factory: OptimizerFactory,
        *,
        seed: int,
        device: torch.device,
        recompute: Recompute = NO_RECOMPUTE,
        compile_blocks: bool = False,
        is_trained: Callable[[str], bool] = lambda name: True,
    ) -> None:
        self.spec, self.groups, self.options, self.device = spec, groups, options, device
        self.is_staged = groups.topology.pp_size > 1
        self.is_fully_sharded = options.zero_stage == 3
        self.seed = seed
        self.stream = seed_streams(seed, groups, device)
        self.module = build_module(spec, groups, self.stream, options, device, recompute)
        choose_attention(self.module, options.attention_backend, device, options.dtype)
        if compile_blocks:
            # Block by block: all share one graph, and what DeepSpeed does between layers stays outside of it.
            for layer in self.module.modules():
                if is_block(layer):
                    layer.compile(dynamic=False)
        mpu = None
        if not self.is_staged and groups.tp_size > 1:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints its own view of the layout, which we have told
                mpu = PipelineParallelGrid(topology=deepspeed_topology(groups.topology))
        num_parameters = sum(parameter.numel() for _, parameter in public_names(self.module))
        config = deepspeed_config(options, groups, num_parameters)
        divide = zero_3_division(config, options.dtype, mpu) if self.is_fully_sharded else None
        fill(self.module, spec, groups, seed=seed, is_trained=is_trained, divide=divide, device=device)
        self.named_parameters = public_names(self.module)
        if self.is_fully_sharded:
            for owner, parameter in external_parameters(self.module):
                deepspeed.zero.register_external_parameter(owner, parameter)
        self.deepspeed: Any
        self.deepspeed, *_ = deepspeed.initialize(
            model=self.module,
            optimizer=optimizer_factory(self.named_parameters + stage_fillers(self.module)),
            config=config,
            mpu=mpu,
            dist_init_required=False,
        )
        self._losses: list[torch.Tensor] = []
        self._fed_shape: torch.Size | None = None
        self.guard = StepGuard(
            self.deepspeed.optimizer,
            lambda: torch.stack(self.micro_batch_losses()).mean(),
            holds_loss=groups.at.pp_rank == groups.topology.pp_size - 1,
            loss_share=0.0 if groups.tp_rank else 1.0 / groups.dp_size,
            is_fp16=options.precision == "fp16",
            device=device,
        )
        if self.is_staged:
            # The guard has agreed on the loss; DeepSpeed would do it a second time, in two collectives.
            self.deepspeed._aggregate_total_loss = lambda: torch.tensor(self.guard.loss)

    def train_step(self, batches: Sequence[Batch], learning_rate: float, judge: Judge = accept_finite) -> StepResult:
        """Forward and backward of every micro-batch, then one optimizer step, unless the judge refuses it.

        judge: asked on every rank with the same loss and gradient norm, if both are finite; if not, the step is
        skipped anyway. Raises nothing on a non-finite loss.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_factor", 1.0)
        self.guard.begin(judge)
        self._compute(batches)
        verdict = self.guard.verdict
        assert verdict is not None, "DeepSpeed made no step"
        scale = float(self.deepspeed.optimizer.loss_scale) if self.options.precision == "fp16" else None
        return StepResult(
            loss=verdict.loss,
            grad_norm=verdict.grad_norm,
            is_skipped=verdict.is_refused,
            loss_scale=scale,
            is_scale_lowered=verdict.is_scale_lowered,
        )

    def rehearse_step(self, batches: Sequence[Batch]) -> None:
        """Forward and backward once more, without a step: nothing is changed but random states and the losses."""
        self.guard.begin(lambda loss, norm: False, is_rehearsal=True)
        self._compute(batches)

    def micro_batch_losses(self) -> list[torch.Tensor]:
        """The losses [] of the last step's micro-batches on this rank; none on a stage that computes no loss."""
        return list(self.deepspeed.fwd_outputs) if self.is_staged else self._losses

    def _compute(self, batches: Sequence[Batch]) -> None:
        micro_batches = self._prepare(batches)
        if self.is_staged:
            self.deepspeed.train_batch(data_iter=self._feed(micro_batches))
            return
        self._losses = []
        for inputs in micro_batches:
            beat()
            loss = self.deepspeed(*inputs)
            self.deepspeed.backward(loss)
            # DeepSpeed's own step comes with the last of them, and it asks the guard for the losses.
            self._losses.append(loss.detach())
            self.deepspeed.step()

    def evaluate(self, batches: Sequence[Batch]) -> float:
        """The loss of these micro-batches without learning, averaged as in training."""
        micro_batches = self._prepare(batches)
        if self.is_staged:
            result = self.deepspeed.eval_batch(
                data_iter=self._feed(micro_batches), num_micro_batches=len(micro_batches)
            )
            self.module.train()
            return float(result)
        self.module.eval()
        with torch.no_grad():
            losses = [self.deepspeed(*inputs) for inputs in micro_batches]
        self.module.train()
        return float(self._mean(losses))

    def reseed(self, step: int) -> None:
        """Random numbers of a run that goes on after `step` steps without the states of its generators.

        Not those of the run's begin again.
        """
        self.stream.state = seed_streams(self.seed, self.groups, self.device, step).state

    def loss_scale_state(self) -> dict[str, float] | None:
        """The dynamic loss scale and its counters (fp16), None otherwise."""
        scaler = getattr(self.deepspeed.optimizer, "loss_scaler", None)
        if self.options.precision != "fp16" or scaler is None:
            return None
        return {name: getattr(scaler, name) for name in _SCALER_FIELDS if hasattr(scaler, name)}

    def restore_loss_scale(self, state: dict[str, float] | None) -> None:
        """Put back what `loss_scale_state` gave; a run that was not fp16 before starts with a fresh scale."""
        if state is not None and self.options.precision == "fp16":
            for name, value in state.items():
                setattr(self.deepspeed.optimizer.loss_scaler, name, value)

    def _prepare(self, batches: Sequence[Batch]) -> list[tuple[torch.Tensor, ...]]:
        moved = [
            tuple(tensor.to(self.device, non_blocking=True) for tensor in (batch.tokens, batch.labels, batch.loss_mask))
            for batch in batches
        ]
        masks = [counted(self.spec, labels, loss_mask) for _, labels, loss_mask in moved]
        denominators = loss_denominators(masks, self.options.loss_normalization, self.groups)
        return [(*tensors, denominator) for tensors, denominator in zip(moved, denominators, strict=True)]

    def _feed(self, micro_batches: list[tuple[torch.Tensor, ...]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The pipeline's data: tokens for the first stage; the last one finds its targets in the module."""
        assert isinstance(self.module, StagedModule)
        shape = micro_batches[0][0].shape
        if shape != self._fed_shape:
            # DeepSpeed tells the next stage a shape once, and goes on with it.
            self.deepspeed.reset_activation_shape()
            self._fed_shape = shape
        self.module.targets.clear()
        self.module.targets.extend(inputs[1:] for inputs in micro_batches)
        return self._tokens(micro_batches)

    @staticmethod
    def _tokens(micro_batches: list[tuple[torch.Tensor, ...]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for tokens, _, _, denominator in micro_batches:
            beat()
            # DeepSpeed wants (inputs, labels); the second is read by nobody.
            yield tokens, denominator

    def _mean(self, losses: list[torch.Tensor]) -> torch.Tensor:
        mean = torch.stack(losses).mean()
        if self.groups.dp is not None:
            dist.all_reduce(mean, group=self.groups.dp)
            mean /= self.groups.dp_size
        return mean
