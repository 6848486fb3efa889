"""Decide, before DeepSpeed's optimizer moves anything, whether it may: the seam behind the anomaly policy.

All of DeepSpeed's optimizers compute the global gradient norm first and throw a step away, cleaning up behind it, when
that norm is not finite. The guard stands where the norm is handed over. There it agrees with all ranks on loss and
norm, in one collective, asks the judge, and hands over infinity if the step may not be made. It holds no policy
(megatron.training.reliability.anomaly does). Invariant: all ranks refuse the same steps, and a refused step leaves
weights, masters and optimizer state as they were, bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import combine_grad_norm_groups

from megatron.common.heartbeat import reach

# (loss, gradient norm before clipping) -> whether the optimizer may make this step. Called with finite numbers only.
Judge = Callable[[float, float], bool]


def accept_finite(loss: float, grad_norm: float) -> bool:
    """The judge of a run without a policy: every finite step."""
    return True


@dataclass(frozen=True)
class Verdict:
    """What all ranks know of a step; the same bits on each of them.

    loss: mean over micro-batches and replicas; NaN or infinite if that of any of them is. grad_norm: infinite if it
    could not be computed. is_refused: the optimizer did not move. is_overflow: because fp16 gradients overflowed
    under a finite loss. is_scale_lowered: that can still lower the loss scale.
    """

    loss: float
    grad_norm: float
    is_refused: bool
    is_overflow: bool
    is_scale_lowered: bool


class StepGuard:
    """Wraps the optimizer of one DeepSpeed engine. Every step must be announced by `begin`."""

    def __init__(
        self,
        optimizer: Any,
        local_loss: Callable[[], torch.Tensor],
        *,
        holds_loss: bool,
        loss_share: float,
        is_fp16: bool,
        device: torch.device,
    ) -> None:
        """optimizer: DeepSpeed's. local_loss: this rank's loss [] of the micro-batches since `begin`.

        holds_loss: this rank computes losses (the last stage). loss_share: its part of the mean (0 on all but one
        tensor-parallel rank of each replica, so that every loss counts once).
        """
        self._optimizer, self._local_loss, self._device = optimizer, local_loss, device
        self._holds_loss, self._loss_share, self._is_fp16 = holds_loss, loss_share, is_fp16
        self._judge: Judge = accept_finite
        self._is_rehearsal = False
        self.verdict: Verdict | None = None
        self._scaler: Any = getattr(optimizer, "loss_scaler", None)
        if self._scaler is not None and hasattr(self._scaler, "raise_error_at_min_scale"):
            # DeepSpeed would end the run without a word on what to do; here the policy counts such steps.
            self._scaler.raise_error_at_min_scale = False
        if isinstance(optimizer, BF16_Optimizer):
            self._wrap_step_with_norm(optimizer)
        elif hasattr(optimizer, "scaled_global_norm"):
            self._wrap_norm(optimizer)
        else:
            self._wrap_norm_groups(optimizer)
        if hasattr(optimizer, "_update_scale"):
            self._wrap_scale(optimizer)

    def begin(self, judge: Judge, *, is_rehearsal: bool = False) -> None:
        """A step begins; `judge` will decide on it. is_rehearsal: it is not to touch the loss scale either."""
        self._judge, self._is_rehearsal, self.verdict = judge, is_rehearsal, None

    @property
    def loss(self) -> float:
        """The loss of the step that was decided on last."""
        return math.nan if self.verdict is None else self.verdict.loss

    def _can_lower_scale(self) -> bool:
        """Whether the loss scale is dynamic and above its least."""
        least = getattr(self._scaler, "min_scale", None)
        return least is not None and self._scaler.cur_scale > least

    def _wrap_step_with_norm(self, optimizer: Any) -> None:
        # This optimizer has the norm from a function of its module, and has no method around it.
        norm_of_tensors, step = bf16_optimizer.get_global_norm_of_tensors, optimizer.step

        def guarded_norm(*args: Any, input_tensors: list[torch.Tensor], **kwargs: Any) -> Any:
            # DeepSpeed fails where a rank has nothing to count: replicated parameters alone, which are another
            # rank's, or a stage on which nothing learns.
            counted = input_tensors or [torch.zeros(1, device=self._device)]
            return self._passed_on(norm_of_tensors(*args, input_tensors=counted, **kwargs))

        def guarded_step(*args: Any, **kwargs: Any) -> Any:
            bf16_optimizer.get_global_norm_of_tensors = guarded_norm
            try:
                return step(*args, **kwargs)
            finally:
                bf16_optimizer.get_global_norm_of_tensors = norm_of_tensors

        optimizer.step = guarded_step

    def _wrap_norm(self, optimizer: Any) -> None:
        # ZeRO 1 and 2. In bf16 only `check_grad_overflow` makes them heed the norm; switched on for that moment alone,
        # it does not cost the second pass over all gradients that it would in the configuration.
        norm, step, checks = optimizer.scaled_global_norm, optimizer.step, optimizer.check_grad_overflow

        def guarded_norm(*args: Any, **kwargs: Any) -> Any:
            optimizer.check_grad_overflow = True
            return self._passed_on(norm(*args, **kwargs))

        def guarded_step(*args: Any, **kwargs: Any) -> Any:
            try:
                return step(*args, **kwargs)
            finally:
                optimizer.check_grad_overflow = checks

        optimizer.scaled_global_norm, optimizer.step = guarded_norm, guarded_step

    def _wrap_norm_groups(self, optimizer: Any) -> None:
        # ZeRO 3 combines the norms of parameter groups itself.
        norm_groups = optimizer._get_norm_groups

        def guarded(*args: Any, **kwargs: Any) -> Any:
            norms = norm_groups(*args, **kwargs)
            passed = self._passed_on(combine_grad_norm_groups(norms))
            return norms if self.verdict and not self.verdict.is_refused else [passed]

        optimizer._get_norm_groups = guarded

    def _wrap_scale(self, optimizer: Any) -> None:
        update_scale = optimizer._update_scale

        def guarded(has_overflow: bool = False) -> None:
            if self.verdict is None:
                # fp16 gradients overflowed: the norm was not asked for.
                self._decide(math.inf)
            assert self.verdict is not None
            # A NaN from the forward pass or a spike is not the loss scale's fault, and no good step either.
            if (not self.verdict.is_refused or self.verdict.is_overflow) and not self._is_rehearsal:
                update_scale(has_overflow)

        optimizer._update_scale = guarded

    def _passed_on(self, scaled_norm: Any) -> Any:
        """The norm that DeepSpeed goes on with: infinite to make it throw the step away."""
        value = float(scaled_norm)
        # DeepSpeed says -1 where it found a NaN.
        norm = value / self._optimizer.loss_scale if self._is_fp16 else value
        if not self._decide(norm if math.isfinite(norm) and norm >= 0 else math.inf).is_refused:
            return scaled_norm
        return torch.full_like(scaled_norm, math.inf) if torch.is_tensor(scaled_norm) else math.inf

    def _decide(self, norm: float) -> Verdict:
        """Collective over all ranks: one sum of four numbers, and one wait for the device."""
        reach("the optimizer's step")
        shares = torch.zeros(4, dtype=torch.float64, device=self._device)
        if self._holds_loss:
            loss = self._local_loss().to(torch.float64)
            shares[0] = loss * self._loss_share
            shares[1] = ~torch.isfinite(loss)
        # Rank 0's norm for all: equal up to rounding at most, and everyone must decide alike.
        if math.isfinite(norm):
            shares[2] = norm if dist.get_rank() == 0 else 0.0
        else:
            shares[3] = 1.0
        dist.all_reduce(shares)
        loss_sum, bad_losses, norm, bad_norms = shares.tolist()
        is_finite_loss = not bad_losses and math.isfinite(loss_sum)
        is_finite = is_finite_loss and not bad_norms
        is_overflow = self._is_fp16 and is_finite_loss and bool(bad_norms)
        self.verdict = Verdict(
            loss=math.nan if bad_losses and math.isfinite(loss_sum) else loss_sum,
            grad_norm=math.inf if bad_norms else norm,
            is_refused=not (is_finite and self._judge(loss_sum, norm)),
            is_overflow=is_overflow,
            is_scale_lowered=is_overflow and self._can_lower_scale(),
        )
        return self.verdict
