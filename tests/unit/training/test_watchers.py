"""The profiler's files, and characters per token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron.data.loader import Batch
from megatron.parallel.process_groups import ProcessGroups
from megatron.training.characters import CharacterCount
from megatron.training.profiling import StepProfiler


def work() -> None:
    torch.ones(8, 8) @ torch.ones(8, 8)


def test_a_trace_of_the_asked_steps_only(tmp_path: Path) -> None:
    said: list[str] = []
    profiler = StepProfiler(0, 2, 3, trace_folder=tmp_path / "p", say=said.append)
    for step in range(1, 6):
        with profiler.around(step):
            work()
    profiler.close()
    (file,) = (tmp_path / "p").iterdir()
    assert file.name == "trace_steps2-3_rank0.json"
    names = [event.get("name") for event in json.loads(file.read_text())["traceEvents"]]
    assert {"step 2", "step 3"} <= set(names)
    assert not {"step 1", "step 4"} & set(names)
    assert names.count("aten::mm") == 2
    assert len(said) == 1


@pytest.mark.parametrize("fails", [True, False])
def test_a_run_that_ends_inside_the_range_keeps_its_trace(tmp_path: Path, fails: bool) -> None:
    profiler = StepProfiler(1, 1, 9, trace_folder=tmp_path)
    if fails:
        with pytest.raises(RuntimeError, match="broken"), profiler.around(1):
            raise RuntimeError("broken")
    else:
        with profiler.around(1):
            work()
    profiler.close()
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_memory_on_a_cpu_writes_nothing(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, where a snapshot is written")
    profiler = StepProfiler(0, 1, 1, memory_folder=tmp_path)
    with profiler.around(1):
        work()
    profiler.close()
    assert list(tmp_path.iterdir()) == []


def test_tokens_per_character_of_what_is_learnt() -> None:
    groups = ProcessGroups.__new__(ProcessGroups)
    object.__setattr__(groups, "dp", None)
    count = CharacterCount(lambda ids: "".join("ab" * (i + 1) for i in ids), groups, torch.device("cpu"))
    labels = torch.tensor([[0, 1, 2], [3, 0, 0]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    count.add([Batch(labels, labels, mask, [0, 1])])
    # Three tokens of 2, 4 and 8 characters.
    assert count.tokens_per_character() == pytest.approx(3 / 14)
    count.reset()
    count.add([Batch(labels, labels, torch.ones(2, 3), [0, 1])])
    assert count.tokens_per_character() == pytest.approx(6 / 24)
