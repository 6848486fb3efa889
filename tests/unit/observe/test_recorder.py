"""Records reach every sink, and a remote logger's failure never reaches the run."""

from __future__ import annotations

import json
import math

import pytest

from megatron.common.errors import DataError
from megatron.observe.metrics_log import SUPERSEDED_NAME, MetricsLog, read_metrics
from megatron.observe.recorder import ForgivingSink, Recorder


class Failing:
    """A remote logger that fails from its n-th call on."""

    def __init__(self, good_calls: int = 0) -> None:
        self.calls = 0
        self.good_calls = good_calls

    def record(self, step, metrics, consumed_tokens):
        self.calls += 1
        if self.calls > self.good_calls:
            raise ConnectionError("the network is away")

    def go_on_from(self, step):
        raise ConnectionError("the network is away")

    def close(self):
        raise ConnectionError("still away")


class TakenBack:
    """Remembers from where it was told to go on."""

    def __init__(self, told: list[int]) -> None:
        self.told = told

    def record(self, step, metrics, consumed_tokens):
        """Nothing to keep."""

    def go_on_from(self, step):
        self.told.append(step)

    def close(self):
        """Nothing to do."""


def test_records_are_appended_and_read_back_by_step(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    recorder = Recorder([MetricsLog(path, clock=lambda: 12.5)])
    recorder.record(1, {"train/lm_loss": 3.5}, consumed_tokens=64)
    recorder.record(1, {"validation/lm_loss": 3.25})
    recorder.close()
    recorder.close()
    assert read_metrics(path) == {
        1: {"time": 12.5, "consumed_tokens": 64.0, "train/lm_loss": 3.5, "validation/lm_loss": 3.25}
    }


def test_a_record_is_on_disk_before_the_next_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.record(7, {"train/lm_loss": 1.0}, None)
    assert read_metrics(path)[7]["train/lm_loss"] == 1.0
    log.close()


def test_the_later_record_of_a_repeated_step_wins(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for losses in ({1: 5.0, 2: 4.0, 3: 3.0}, {2: 4.5, 3: 3.5}):
        log = MetricsLog(path)
        for step, loss in losses.items():
            log.record(step, {"train/lm_loss": loss}, None)
        log.close()
    assert {step: values["train/lm_loss"] for step, values in read_metrics(path).items()} == {1: 5.0, 2: 4.5, 3: 3.5}


def test_steps_that_are_made_again_leave_the_log_and_are_kept_beside_it(tmp_path):
    path = tmp_path / "metrics.jsonl"

    def run(start, stop, loss):
        said = []
        recorder = Recorder([MetricsLog(path, clock=lambda: 0.0), ForgivingSink(TakenBack(said), "remote")])
        told = recorder.go_on_from(start)
        for step in range(start + 1, stop + 1):
            recorder.record(step, {"train/lm_loss": loss})
            recorder.record(step, {"validation/lm_loss": loss})
        recorder.close()
        assert said == [start]
        return told

    assert run(0, 4, 1.0) == ""
    whole = path.read_bytes()
    assert "(4 records" in run(2, 3, 2.0)
    # Nothing beyond: nothing is touched and nothing said.
    assert run(3, 5, 3.0) == ""
    lines = path.read_bytes().splitlines(keepends=True)
    assert b"".join(lines[:4]) == b"".join(whole.splitlines(keepends=True)[:4])
    assert [json.loads(line)["step"] for line in lines] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert [values["train/lm_loss"] for values in read_metrics(path).values()] == [1.0, 1.0, 2.0, 3.0, 3.0]
    assert (tmp_path / SUPERSEDED_NAME).read_bytes() == b"".join(whole.splitlines(keepends=True)[4:])
    run(0, 1, 4.0)
    assert list(read_metrics(path)) == [1]
    assert len((tmp_path / SUPERSEDED_NAME).read_bytes().splitlines()) == 4 + 10


def test_a_logger_that_cannot_take_back_is_left_out():
    said: list[str] = []
    recorder = Recorder([ForgivingSink(Failing(), "W&B", said.append)])
    recorder.go_on_from(3)
    recorder.record(4, {})
    assert len(said) == 1
    assert "W&B failed at step 3" in said[0]


@pytest.mark.parametrize("kept", [0, 1, 17, 5000])
def test_a_torn_last_line_is_ignored_and_removed_by_the_next_run(tmp_path, kept):
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 1, "time": 0.0, "train/lm_loss": 2.0}\n'
    path.write_text(whole + '{"step": 2, '.ljust(kept, "9")[:kept])
    assert list(read_metrics(path)) == [1]
    log = MetricsLog(path)
    log.record(2, {"train/lm_loss": 1.5}, None)
    log.close()
    assert {step: values["train/lm_loss"] for step, values in read_metrics(path).items()} == {1: 2.0, 2: 1.5}
    assert path.read_text().startswith(whole)


def test_a_file_with_nothing_but_a_torn_line_becomes_empty(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step"')
    MetricsLog(path).close()
    assert path.read_bytes() == b""


def test_non_finite_values_stay_valid_json_and_come_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.record(1, {"a": math.nan, "b": math.inf, "c": -math.inf}, None)
    log.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    values = read_metrics(path)[1]
    assert math.isnan(values["a"])
    assert (values["b"], values["c"]) == (math.inf, -math.inf)


@pytest.mark.parametrize("line", ["not json", '{"time": 1}', "[1]", '{"step": 1, "a": {}}', ""])
def test_a_damaged_line_is_an_error_with_its_number(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "time": 0.0}\n' + line + '\n{"step": 2, "time": 0.0}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a record"):
        read_metrics(path)


def test_a_missing_log_is_an_error_that_says_who_writes_it(tmp_path):
    with pytest.raises(DataError, match="A training run writes"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_failing_sink_is_told_once_and_left_out(tmp_path):
    failing, said = Failing(good_calls=1), []
    path = tmp_path / "metrics.jsonl"
    recorder = Recorder([ForgivingSink(failing, "W&B", said.append), MetricsLog(path)])
    for step in range(1, 5):
        recorder.record(step, {"train/lm_loss": 1.0})
    recorder.close()
    assert failing.calls == 2
    assert len(said) == 1
    assert "W&B failed at step 2" in said[0]
    assert "the network is away" in said[0]
    assert list(read_metrics(path)) == [1, 2, 3, 4]


def test_a_failure_at_the_end_is_told_too():
    said: list[str] = []
    Recorder([ForgivingSink(Failing(good_calls=9), "Comet", said.append)]).close()
    assert said == ["Comet could not be closed: ConnectionError: still away"]


def test_an_interrupt_passes_through_a_forgiving_sink():
    class Interrupted:
        def record(self, step, metrics, consumed_tokens):
            raise KeyboardInterrupt

        def close(self):
            """Nothing to do."""

    with pytest.raises(KeyboardInterrupt):
        ForgivingSink(Interrupted(), "W&B").record(1, {}, None)
