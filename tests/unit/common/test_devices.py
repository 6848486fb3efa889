"""GPUs and cores counted without torch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron.common.devices import count_cores, count_gpus


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidia-uvm", "nvidiactl", "nvidia-caps"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 3),
        ({"CUDA_VISIBLE_DEVICES": "0,2"}, 2),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "1,-1,2"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3,4"}, 3),
        ({"CUDA_VISIBLE_DEVICES": "GPU-abc,MIG-def"}, 2),
        ({"DS_ACCELERATOR": "cpu"}, 0),
        ({"DS_ACCELERATOR": "cuda"}, 3),
    ],
)
def test_gpus(dev: Path, environment: dict[str, str], expected: int) -> None:
    assert count_gpus(environment, dev) == expected


def test_no_gpus(tmp_path: Path) -> None:
    assert count_gpus({}, tmp_path) == 0
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "GPU-abc"}, tmp_path) == 0


def test_cores_are_within_the_affinity() -> None:
    assert 1 <= count_cores() <= (os.cpu_count() or 1)
