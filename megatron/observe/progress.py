"""What a person at the console sees of a run: a live display on a terminal, plain lines anywhere else.

The plain line carries upstream's fields under upstream's names, so that existing scripts that read them go on working.
Invariant: it never starts a thread and never waits; a step costs it microseconds unless something is drawn.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

REDRAW_S = 0.2


@dataclass(frozen=True)
class StepReport:
    """One optimizer step as the console shows it.

    Units: tokens_per_s and samples_per_s over all ranks; step_s seconds per step; flops_per_s per device; mfu 0 to 1.
    None: not known, and not shown.
    """

    loss: float
    learning_rate: float
    grad_norm: float | None
    tokens_per_s: float
    samples_per_s: float
    step_s: float
    flops_per_s: float | None = None
    mfu: float | None = None
    loss_scale: float | None = None
    num_skipped: int = 0
    num_nan: int = 0


class Progress:
    """The console of a run that goes from `start_step` to `total_steps`.

    is_terminal: None asks the stream. A line is printed every `log_interval` steps, at the first and at the last one;
    its loss is the mean since the line before.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        log_interval: int = 10,
        is_terminal: bool | None = None,
        stream: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_steps
        self._start = self._step = start_step
        self._interval = log_interval
        self._stream = stream or sys.stdout
        self._clock = clock
        self._started = self._drawn = clock()
        self._losses: list[float] = []
        self._report: StepReport | None = None
        self._validation: tuple[int, float] | None = None
        self._live: Live | None = None
        is_terminal = self._stream.isatty() if is_terminal is None else is_terminal
        self._console = Console(file=self._stream, highlight=False, soft_wrap=True, force_terminal=is_terminal)
        if is_terminal:
            # Without rich's own refresh thread: the run's process draws when it reports, and does nothing in between.
            self._live = Live(console=self._console, auto_refresh=False, get_renderable=self._display)
            self._live.start()

    def update(self, step: int, report: StepReport) -> None:
        """Show that `step` is done."""
        self._step, self._report = step, report
        self._losses.append(report.loss)
        if self._live is not None:
            self._redraw()
        elif step % self._interval == 0 or step in (self._start + 1, self._total):
            self._print(self._line(report))
            self._losses.clear()

    def validation(self, step: int, loss: float, name: str = "validation") -> None:
        """Show the loss on a held-out set."""
        if name == "validation":
            self._validation = (step, loss)
        self._print(f"{name} at iteration {step} | lm_loss: {loss:.6E} | lm_loss_ppl: {_perplexity(loss):.6E} |")

    def message(self, text: str) -> None:
        """Say something in between, without disturbing the display."""
        self._print(text)

    def close(self) -> None:
        """Leave the display as it stands; a second call does nothing."""
        if self._live is not None:
            self._live.refresh()
            self._live.stop()
        self._live = None

    def remaining_s(self) -> float | None:
        """Seconds until the last step at the mean speed so far, everything included; None before the first step."""
        done = self._step - self._start
        if done <= 0:
            return None
        return (self._clock() - self._started) / done * (self._total - self._step)

    def _print(self, text: str) -> None:
        if self._live is not None:
            self._console.print(Text(text))
            return
        self._stream.write(text + "\n")
        self._stream.flush()

    def _redraw(self) -> None:
        now = self._clock()
        if self._live is not None and (now - self._drawn >= REDRAW_S or self._step == self._total):
            self._drawn = now
            self._live.refresh()

    def _line(self, report: StepReport) -> str:
        fields = [
            f"samples/sec: {report.samples_per_s:.3f}",
            f"iteration {self._step:8d}/{self._total:8d}",
            f"elapsed time per iteration (ms): {report.step_s * 1000:.1f}",
            f"learning rate: {report.learning_rate:.3E}",
        ]
        if report.flops_per_s is not None:
            fields.append(f"approx flops per GPU: {report.flops_per_s / 1e12:.3f}TFLOPS")
        if report.mfu is not None:
            fields.append(f"MFU: {100 * report.mfu:.2f}%")
        # A skipped step without a loss says nothing of the others.
        losses = [loss for loss in self._losses if math.isfinite(loss)] or self._losses
        fields.append(f"lm_loss: {sum(losses) / len(losses):.6E}")
        if report.grad_norm is not None:
            fields.append(f"grad norm: {report.grad_norm:.4f}")
        if report.loss_scale is not None:
            fields.append(f"loss scale: {report.loss_scale:.1f}")
        fields += [
            f"number of skipped iterations: {report.num_skipped:3d}",
            f"number of nan iterations: {report.num_nan:3d}",
            f"tokens/sec: {report.tokens_per_s:.0f}",
            f"ETA: {format_duration(self.remaining_s())}",
        ]
        return " " + " | ".join(fields) + " |"

    def _display(self) -> Group:
        done, remaining = self._step - self._start, self.remaining_s()
        head = Table.grid(padding=(0, 2))
        percent = 100 * self._step / max(1, self._total)
        head.add_row(
            Text(f"step {self._step}/{self._total}", style="bold"),
            ProgressBar(total=max(1, self._total), completed=self._step, width=30),
            f"{percent:.0f} %",
            Text(f"ETA {format_duration(remaining)}" if done else "starting", style="cyan"),
        )
        report = self._report
        if report is None:
            return Group(head)
        facts = [("loss", f"{report.loss:.4f}")]
        if self._validation is not None:
            facts.append(("val loss", f"{self._validation[1]:.4f}"))
        facts.append(("lr", f"{report.learning_rate:.2e}"))
        if report.grad_norm is not None:
            facts.append(("grad norm", f"{report.grad_norm:.2f}"))
        facts.append(("tokens/s", f"{report.tokens_per_s:,.0f}"))
        if report.mfu is not None:
            facts.append(("MFU", f"{100 * report.mfu:.1f} %"))
        if report.num_skipped:
            facts.append(("skipped", str(report.num_skipped)))
        line = Text()
        for name, value in facts:
            line.append(f"{name} ", style="dim").append(f"{value}   ")
        return Group(head, line)


def format_duration(seconds: float | None) -> str:
    """`1:02:03` or `2:03`; `?` if it is not known."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
