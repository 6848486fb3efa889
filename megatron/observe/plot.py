"""A picture of a run: training and validation loss from its JSONL log. The only file that imports matplotlib.

Invariant: it draws what the log holds; smoothing is drawn over the raw values, never instead of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from megatron.common.errors import ConfigError, DataError
from megatron.common.files import atomic_write
from megatron.observe.metrics_log import read_metrics

TRAIN_LOSS = "train/lm_loss"
VALIDATION_LOSS = "validation/lm_loss"


def plot_losses(
    log: Path,
    picture: Path,
    *,
    x_axis: Literal["steps", "tokens"] = "steps",
    is_log_scale: bool = False,
    title: str = "",
) -> None:
    """Draw training loss (raw and smoothed) and validation loss into a PNG.

    Raises: DataError if the log is missing, damaged or holds no loss; ConfigError if matplotlib is not installed.
    """
    figure = _figure((8, 5))
    train, valid = read_curve(log, TRAIN_LOSS, x_axis), read_curve(log, VALIDATION_LOSS, x_axis)
    if not train and not valid:
        raise DataError(f"{log}: neither {TRAIN_LOSS} nor {VALIDATION_LOSS} is in it, so there is nothing to draw")
    axes = figure.add_subplot()
    if train:
        at, losses = zip(*train, strict=True)
        is_smoothed = len(train) >= 20
        axes.plot(at, losses, color="#4477aa", alpha=0.3 if is_smoothed else 1.0, linewidth=1,
                  label=None if is_smoothed else _label("training", losses[-1]))  # fmt: skip
        if is_smoothed:
            smooth = smoothed(losses)
            axes.plot(at, smooth, color="#4477aa", linewidth=2, label=_label("training (smoothed)", smooth[-1]))
    if valid:
        at, losses = zip(*valid, strict=True)
        axes.plot(
            at, losses, color="#cc6622", marker="o", markersize=4, linewidth=2, label=_label("validation", losses[-1])
        )
    if is_log_scale:
        axes.set_yscale("log")
    axes.set_xlabel("tokens" if x_axis == "tokens" else "step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title or "Training and validation loss")
    axes.grid(visible=True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02)
    axes.legend(frameon=False)
    with atomic_write(picture, "wb") as stream:
        figure.savefig(stream, format="png")


def plot_movements(picture: Path, sides: Mapping[str, tuple[Sequence[int], Mapping[str, Sequence[float]]]]) -> None:
    """Draw a coordinate check into a PNG: a panel for each side, a line for each layer over the width.

    sides: title -> (hidden sizes, layer -> change at each of them). Raises: ConfigError without matplotlib.
    """
    figure = _figure((6 * len(sides), 5))
    # One scale of heights: that they differ is what the picture is for.
    panels = figure.subplots(1, len(sides), sharey=True, squeeze=False)[0]
    for axes, (title, (widths, changes)) in zip(panels, sides.items(), strict=True):
        for layer, values in changes.items():
            axes.plot(widths, values, marker="o", markersize=3, linewidth=1, label=layer)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(list(widths), [str(width) for width in widths])
        axes.set_xlabel("hidden_size")
        axes.set_ylabel("mean |change| of activations")
        axes.set_title(title)
        axes.grid(visible=True, alpha=0.25)
        axes.legend(frameon=False, fontsize=6)
    with atomic_write(picture, "wb") as stream:
        figure.savefig(stream, format="png")


def _figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plotting needs matplotlib: pip install -r requirements/requirements-plot.txt") from None
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def read_curve(log: Path, metric: str, x_axis: Literal["steps", "tokens"] = "steps") -> list[tuple[float, float]]:
    """The finite values of a metric as (step or consumed tokens, value), in the order of steps.

    Raises: DataError if tokens are asked for and a step with the metric does not say how many it had seen.
    """
    curve = []
    for step, values in read_metrics(log).items():
        if metric not in values or not math.isfinite(values[metric]):
            continue
        if x_axis == "tokens" and "consumed_tokens" not in values:
            raise DataError(f"{log}: step {step} does not say consumed_tokens. Plot over steps instead.")
        curve.append((values["consumed_tokens"] if x_axis == "tokens" else float(step), values[metric]))
    return curve


def smoothed(values: Sequence[float], span: int | None = None) -> list[float]:
    """A centred moving mean over `span` values (unset: a twentieth of them); the window is cut off at both ends."""
    span = max(3, len(values) // 20) if span is None else span
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    half, count = span // 2, len(values)
    windows = ((max(0, index - half), min(count, index + half + 1)) for index in range(count))
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in windows]


def _label(name: str, value: float) -> str:
    return f"{name}, {value:.3f} at the end"
