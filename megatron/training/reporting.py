"""What a run tells: one record per step and per validation to the sinks, and the progress on the screen.

Only rank 0 of the job has a recorder and a progress display; on other ranks every call is a no-op. Metric names are
upstream's. Invariant: nothing here changes the course of a run, and nothing synchronises the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from megatron.engine.train_engine import StepResult
from megatron.observe.progress import Progress, StepReport
from megatron.observe.recorder import Recorder
from megatron.observe.throughput import Throughput
from megatron.training.plan import RunPlan
from megatron.training.saving import Position


class Reporter:
    """Turns results into metrics. `is_main` is false on all ranks but the first, whose calls then do nothing."""

    def __init__(self, plan: RunPlan, recorder: Recorder, throughput: Throughput, *, is_main: bool) -> None:
        self.plan, self.recorder, self.throughput, self.is_main = plan, recorder, throughput, is_main
        self.progress: Progress | None = None
        self.last_loss = math.nan
        self.last_validation: float | None = None

    def start(self, step: int) -> None:
        """Open the progress display of a run that goes on from `step`, and take back what was logged beyond it."""
        if self.is_main:
            self.go_on_from(step)
            self.progress = Progress(self.plan.train_iters, step, log_interval=self.plan.log_interval)

    def go_on_from(self, step: int) -> None:
        """Take back what was logged of steps beyond `step`: they are made again."""
        taken_back = self.recorder.go_on_from(step)
        if taken_back:
            self.message(taken_back)

    def message(self, text: str) -> None:
        """One line for the person who watches."""
        if self.progress is not None:
            self.progress.message(text)
        elif self.is_main:
            print(text, flush=True)

    def stepped(
        self,
        position: Position,
        result: StepResult,
        *,
        learning_rate: float,
        elapsed_s: float,
        cpu_s: float,
        num_skipped: int,
        num_not_finite: int,
        epoch: float,
        statistics: Mapping[str, float] | None = None,
    ) -> None:
        """Record the optimizer step that has just been made, the `position.step`-th. Units: elapsed_s, cpu_s of it."""
        if not self.is_main:
            return
        step = position.step
        rates = self.throughput.add(elapsed_s, cpu_s)
        self.last_loss = result.loss
        metrics = {
            "train/lm_loss": result.loss,
            "train/learning_rate": learning_rate,
            "train/grad_norm": result.grad_norm,
            "train/epoch": epoch,
            **(statistics or {}),
            "train/consumed_samples": position.consumed_samples,
            "train/skipped_steps": num_skipped,
            "runtime/elapsed_s": position.elapsed_s,
        }
        if result.loss_scale is not None:
            metrics["train/loss_scale"] = result.loss_scale
        if num_skipped:
            metrics["train/skipped_steps"] = num_skipped
        if step % self.plan.log_interval == 0 or step == self.plan.train_iters:
            metrics |= {
                "runtime/samples_per_sec": rates.samples_per_s,
                "runtime/tokens_per_sec": rates.tokens_per_s,
                "runtime/iteration_time": rates.step_s,
                "runtime/steps_per_sec": rates.steps_per_s,
            }
            if rates.flops_per_s is not None:
                metrics["runtime/flops_per_sec_per_gpu"] = rates.flops_per_s
            if rates.mfu is not None:
                metrics["runtime/model_flops_utilization"] = rates.mfu
        self.recorder.record(step, metrics, position.consumed_tokens)
        if self.progress is not None:
            self.progress.update(
                step,
                StepReport(
                    loss=result.loss,
                    learning_rate=learning_rate,
                    grad_norm=result.grad_norm,
                    tokens_per_s=rates.tokens_per_s,
                    samples_per_s=rates.samples_per_s,
                    step_s=rates.step_s,
                    flops_per_s=rates.flops_per_s,
                    mfu=rates.mfu,
                    loss_scale=result.loss_scale,
                    num_skipped=num_skipped,
                    num_nan=num_not_finite,
                ),
            )

    def evaluated(self, name: str, position: Position, loss: float, tokens_per_character: float | None = None) -> None:
        """Record the loss on a held-out set, `validation` or `test`; with the last, also perplexity per character."""
        if not self.is_main:
            return
        if name == "validation":
            self.last_validation = loss
        perplexity = math.exp(loss) if loss < 700 else math.inf
        metrics = {f"{name}/lm_loss": loss, f"{name}/lm_loss_ppl": perplexity}
        if tokens_per_character is not None:
            metrics[f"{name}/lm_loss_char_lvl_ppl"] = math.exp(min(loss * tokens_per_character, 700))
        self.recorder.record(position.step, metrics, position.consumed_tokens)
        if self.progress is not None:
            self.progress.validation(position.step, loss, name)

    def scored(self, position: Position, scores: dict[str, float]) -> None:
        """Record the scores of evaluation tasks, by `<task>_<metric>`."""
        if not self.is_main:
            return
        metrics = {f"validation/{name}": value for name, value in scores.items()}
        self.recorder.record(position.step, metrics, position.consumed_tokens)
        self.message(f"tasks at iteration {position.step} | " + " | ".join(f"{k}: {v:.4f}" for k, v in scores.items()))

    def close(self) -> None:
        """Leave the display as it stands and let go of the sinks."""
        if self.progress is not None:
            self.progress.close()
        self.recorder.close()
