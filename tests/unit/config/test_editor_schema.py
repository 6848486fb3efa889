"""The editor's schema, judged by an independent validator: takes what the loader takes, marks what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

SCHEMA = json.loads(Path("configs/schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
SHIPPED = sorted(Path("configs").rglob("*.yml"))


def complaints(content: Any) -> list[str]:
    return ["/".join(map(str, error.path)) for error in VALIDATOR.iter_errors(content)]


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_shipped_files_are_right(path: Path) -> None:
    assert complaints(yaml.safe_load(path.read_text())) == []


@pytest.mark.parametrize(
    "content",
    [
        {"num-layers": 2, "hidden_size": 5e1, "train-iters": "5e4", "min_lr": "1e-5"},
        {"norm": "RMSNorm", "precision": "BF16", "optimizer": {"type": "AdamW", "params": {"lr": "1e-4"}}},
        {"seed": None, "fp16": {"enabled": True, "loss_scale": 0}, "wandb_run_name": 17},
        {"zero_optimization": {"stage": 1, "allgather_sequential": False, "cpu_offload": False}},
        {"curriculum_learning": {"enabled": False}, "amp": None, "gas": 1, "rope_fusion": True},
        {"comms_logger": {"enabled": True}, "deepspeed_extra_args": {"log_level": "info"}},
    ],
)
def test_what_the_loader_takes(content: dict[str, Any]) -> None:
    assert complaints(content) == []


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ({"num_layerz": 2}, ""),
        ({"num-layerz": 2}, ""),
        ({"num_layers": "many"}, "num_layers"),
        ({"num-layers": 0}, "num-layers"),
        ({"norm": "batchnorm"}, "norm"),
        ({"hidden_dropout": 1.0}, "hidden_dropout"),
        ({"fp16": {"enabeld": True}}, "fp16"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization"),
        ({"zero_optimization": {"stage": 1, "overlap_com": True}}, "zero_optimization"),
        ({"comms_logger": {"enable": True}}, "comms_logger"),
        ({"flops_profiler": {"top_modules": "x"}}, "flops_profiler/top_modules"),
        ({"elasticity": {"enabled": True}}, "elasticity"),
        ({"world_size": 4}, ""),
    ],
)
def test_what_is_wrong_is_marked(content: dict[str, Any], place: str) -> None:
    assert complaints(content) == [place]
