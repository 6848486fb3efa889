"""Whole runs by configuration: what the logging keys leave behind, DeepSpeed's blocks, and every optimizer's resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.observe.metrics_log import read_metrics
from tests.distributed.recovery_cases import run_over
from tests.integration.run_cases import checkpoint_tensors, write_config

Ranks = Callable[..., list[Any]]


def test_what_the_logging_keys_leave_behind(ranks: Ranks, tmp_path: Path) -> None:
    """All of upstream's log_* keys, a profile, and perplexity per character, on two stages."""
    keys = ["log_grad_norm", "log_param_norm", "log_grad_pct_zeros", "log_optimizer_states", "log_gradient_noise_scale"]
    path = write_config(
        tmp_path,
        train_iters=5,
        eval_iters=2,
        eval_interval=5,
        checkpoint_factor=5,
        pipe_parallel_size=2,
        gradient_noise_scale_n_batches=2,
        char_level_ppl=True,
        profile=True,
        profile_step_start=2,
        profile_step_stop=3,
        **dict.fromkeys(keys, True),
    )
    assert [result["error"] for result in ranks(run_over, 2, str(path), timeout=120)] == ["", ""]
    log = read_metrics(tmp_path / "run" / "metrics.jsonl")
    for front in ("gradient_norms", "parameter_norms", "pct_grad_zeros", "optimizer_state_norms"):
        # One of each stage.
        assert any(name.startswith(f"{front}/layers.0.") for name in log[1]), front
        assert any(name.startswith(f"{front}/final_norm.") for name in log[1]), front
    assert "train/noise_scale" in log[4]
    per_token, per_character = (log[5][f"validation/lm_loss_{name}"] for name in ("ppl", "char_lvl_ppl"))
    # A token is a character here.
    assert 1 < per_character == pytest.approx(per_token)
    folder = tmp_path / "run" / "profile"
    assert sorted(file.name for file in folder.iterdir()) == [f"trace_steps2-3_rank{rank}.json" for rank in (0, 1)]


@pytest.mark.parametrize(
    "settings",
    [
        {"bf16": {"enabled": True, "check_grad_overflow": False, "immediate_grad_update": True}},
        {"deepspeed_extra_args": {"comms_logger": {"enabled": True}, "log_level": "warning", "memory_breakdown": True}},
        {"flops_profiler": {"enabled": True, "profile_step": 2, "detailed": False}, "wall_clock_breakdown": True},
        {"zero_optimization": {"stage": 2, "overlap_comm": True, "round_robin_gradients": True, "cpu_offload": False}},
        {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "elastic_checkpoint": True}},
        {"data_types": {"grad_accum_dtype": "fp32"}, "prescale_gradients": True, "dump_state": True},
        {"csv_monitor": {"enabled": True, "output_path": "csv", "job_name": "j"}},
        {"deepspeed_extra_args": {"timers": {"throughput": {"enabled": False}}, "disable_python_gc": False}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_deepspeed_takes_what_the_configuration_lets_through(
    ranks: Ranks, tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "csv_monitor" in settings:
        settings = {"csv_monitor": {**settings["csv_monitor"], "output_path": str(tmp_path / "csv")}}
    path = write_config(tmp_path, train_iters=3, eval_iters=0, checkpoint_factor=3, **settings)
    assert [result["error"] for result in ranks(run_over, 2, str(path), timeout=120)] == ["", ""]


@pytest.mark.parametrize("precision", ["fp32", "bfloat16"])
def test_parked_weights_differ_in_last_bits_at_most(ranks: Ranks, tmp_path: Path, precision: str) -> None:
    parked = {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    found = []
    for name, further in (("plain", {}), ("parked", parked)):
        settings = {"precision": precision, "zero_optimization": {"stage": 3, **further}}
        path = write_config(tmp_path, name, train_iters=3, eval_iters=0, checkpoint_factor=3, **settings)
        assert [result["error"] for result in ranks(run_over, 2, str(path), timeout=120)] == ["", ""]
        found.append(checkpoint_tensors(tmp_path / name, 3))
    plain, other = found
    assert plain.keys() == other.keys()
    for key, tensor in plain.items():
        # The gradient norm is summed in another order.
        difference = (tensor - other[key]).abs().max() / tensor.abs().max()
        assert difference < 2e-6, key


OPTIMIZERS: list[dict[str, Any]] = [
    {"type": "madgrad_wd", "params": {"lr": 0.003, "momentum": 0.8}},
    {"type": "Lion", "params": {"lr": 0.0003}},
    {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
    {"type": "cpu_adam", "params": {"lr": 0.003, "adam_w_mode": True, "bias_correction": True}},
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: optimizer["type"])
def test_every_optimizer_resumes_bitwise(ranks: Ranks, tmp_path: Path, optimizer: dict[str, Any]) -> None:
    settings = {"optimizer": optimizer, "min_lr": 1e-4, "eval_iters": 0, "train_iters": 4, "checkpoint_factor": 2}
    whole = write_config(tmp_path, "whole", **settings)
    halves = write_config(tmp_path, "halves", **settings, exit_interval=2)
    for path in (whole, halves, halves):
        assert ranks(run_over, 2, str(path), timeout=120)[0]["error"] == ""
    one, other = (checkpoint_tensors(tmp_path / name, 4) for name in ("whole", "halves"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
