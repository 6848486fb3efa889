"""The console: upstream's fields on plain lines, a live display on a terminal."""

from __future__ import annotations

import io
import re

import pytest

from megatron.observe.progress import Progress, StepReport, format_duration


class Clock:
    """Time that moves only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def report(loss: float, **more) -> StepReport:
    values = {"learning_rate": 6e-4, "grad_norm": 0.5, "tokens_per_s": 1000.0, "samples_per_s": 2.0, "step_s": 0.25}
    return StepReport(loss=loss, **{**values, **more})


def run(total: int, interval: int, start: int = 0) -> list[str]:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(total, start, log_interval=interval, stream=stream, clock=clock)
    for step in range(start + 1, total + 1):
        clock.now += 2.0
        progress.update(step, report(float(step)))
    progress.close()
    return stream.getvalue().splitlines()


def fields_of(line: str) -> dict[str, str]:
    return dict(part.strip().split(": ", 1) for part in line.split("|") if ": " in part)


def test_plain_lines_come_at_the_interval_and_at_both_ends():
    lines = run(total=11, interval=5)
    assert [re.search(r"iteration +(\d+)/ +(\d+)", line).groups() for line in lines] == [
        ("1", "11"), ("5", "11"), ("10", "11"), ("11", "11")
    ]  # fmt: skip


def test_a_line_has_upstreams_fields_and_the_mean_loss_since_the_last_line():
    lines = run(total=11, interval=5)
    fields = fields_of(lines[1])
    assert float(fields["lm_loss"]) == pytest.approx((2 + 3 + 4 + 5) / 4)
    assert float(fields["samples/sec"]) == 2.0
    assert float(fields["elapsed time per iteration (ms)"]) == 250.0
    assert float(fields["learning rate"]) == pytest.approx(6e-4)
    assert fields["number of skipped iterations"].strip() == "0"
    assert fields["number of nan iterations"].strip() == "0"
    assert fields["tokens/sec"] == "1000"
    assert fields["ETA"] == "0:12"
    assert "MFU" not in lines[1]
    assert "loss scale" not in lines[1]


def test_what_is_known_is_shown():
    stream = io.StringIO()
    progress = Progress(1, stream=stream)
    progress.update(1, report(2.0, flops_per_s=3.5e12, mfu=0.415, loss_scale=1024.0, num_skipped=2))
    fields = fields_of(stream.getvalue())
    assert fields["approx flops per GPU"] == "3.500TFLOPS"
    assert fields["MFU"] == "41.50%"
    assert fields["loss scale"] == "1024.0"
    assert fields["number of skipped iterations"].strip() == "2"


def test_a_continued_run_counts_time_from_where_it_started():
    lines = run(total=12, interval=5, start=10)
    assert [fields_of(line)["ETA"] for line in lines] == ["0:02", "0:00"]


def test_validation_and_messages_are_lines_of_their_own():
    stream = io.StringIO()
    progress = Progress(10, stream=stream)
    progress.validation(5, 2.0)
    progress.validation(5, 1000.0, name="test")
    progress.message("saved [bold]somewhere[/bold]")
    lines = stream.getvalue().splitlines()
    assert float(fields_of(lines[0])["lm_loss"]) == 2.0
    assert float(fields_of(lines[0])["lm_loss_ppl"]) == pytest.approx(7.389056, rel=1e-5)
    assert fields_of(lines[1])["lm_loss_ppl"] == "INF"
    assert lines[2] == "saved [bold]somewhere[/bold]"


def test_a_terminal_shows_the_newest_step_and_keeps_messages():
    stream, clock = io.StringIO(), Clock()
    progress = Progress(200, is_terminal=True, stream=stream, clock=clock, log_interval=1)
    for step in range(1, 101):
        clock.now += 0.5
        progress.update(step, report(100.0 - step / 2))
        if step == 50:
            progress.validation(step, 3.25)
            progress.message("saved a checkpoint")
    progress.close()
    progress.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    last = shown[shown.rindex("step 100/200") :]
    assert "50 %" in last
    assert "ETA 0:50" in last
    assert "loss 50.0000" in last
    assert "val loss 3.2500" in last
    assert shown.count("saved a checkpoint") == 1
    assert "lm_loss: 5.0" not in shown


def test_a_terminal_is_not_redrawn_for_every_fast_step():
    stream, clock = io.StringIO(), Clock()
    progress = Progress(1000, is_terminal=True, stream=stream, clock=clock)
    for step in range(1, 101):
        clock.now += 0.01
        progress.update(step, report(1.0))
    drawn = len(set(re.findall(r"step (\d+)/1000", stream.getvalue())))
    progress.close()
    assert 3 <= drawn <= 7


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "?"), (float("inf"), "?"), (0, "0:00"), (61, "1:01"), (3599.6, "1:00:00"), (90061, "25:01:01")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text
