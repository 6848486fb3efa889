"""The picture shows the curves of the log."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from megatron.cli.plot_losses import main
from megatron.common.errors import ConfigError, DataError
from megatron.observe.metrics_log import MetricsLog
from megatron.observe.plot import plot_losses, read_curve, smoothed


@pytest.fixture
def log(tmp_path):
    """A log of 60 steps with a validation every 20 and a NaN at step 7."""
    path = tmp_path / "metrics.jsonl"
    sink = MetricsLog(path)
    for step in range(1, 61):
        sink.record(step, {"train/lm_loss": math.nan if step == 7 else 8.0 / step}, step * 100)
        if step % 20 == 0:
            sink.record(step, {"validation/lm_loss": 9.0 / step}, step * 100)
    sink.close()
    return path


def test_curves_come_from_the_log_without_non_finite_values(log):
    train = read_curve(log, "train/lm_loss")
    assert [step for step, _ in train] == [s for s in range(1, 61) if s != 7]
    assert read_curve(log, "validation/lm_loss", "tokens") == [(2000, 0.45), (4000, 0.225), (6000, 0.15)]


def test_tokens_that_the_log_does_not_hold_are_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = MetricsLog(path)
    sink.record(3, {"train/lm_loss": 1.0}, None)
    sink.close()
    with pytest.raises(DataError, match="step 3 does not say consumed_tokens"):
        read_curve(path, "train/lm_loss", "tokens")


@pytest.mark.parametrize("options", [[], ["--tokens", "--log-scale", "--title", "A run"]])
def test_the_command_draws_both_curves(log, options, capsys):
    assert main([str(log.parent), *options]) == 0
    picture = log.with_name("losses.png")
    assert str(picture) in capsys.readouterr().out
    from matplotlib.image import imread

    pixels = imread(picture)[..., :3]
    for colour in ((0x44, 0x77, 0xAA), (0xCC, 0x66, 0x22)):
        assert (np.abs(pixels - np.array(colour) / 255).max(-1) < 0.02).sum() > 100


def test_a_log_without_losses_is_an_error_and_writes_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = MetricsLog(path)
    sink.record(1, {"runtime/tokens_per_sec": 1.0}, None)
    sink.close()
    with pytest.raises(DataError, match="nothing to draw"):
        plot_losses(path, tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_missing_matplotlib_names_the_requirements_file(log, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"requirements/requirements-plot\.txt"):
        plot_losses(log, log.with_name("out.png"))


@pytest.mark.parametrize(("count", "span"), [(1, 3), (2, 3), (7, 3), (10, 4), (61, None)])
def test_smoothing_is_the_mean_of_the_window(count, span):
    values = np.random.default_rng(0).normal(size=count)
    half = (max(3, count // 20) if span is None else span) // 2
    expected = [values[max(0, i - half) : i + half + 1].mean() for i in range(count)]
    assert smoothed(values.tolist(), span) == pytest.approx(expected)
