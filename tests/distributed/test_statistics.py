"""log_*_norm and the noise scale are those of the logical tensors, at any layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron.engine.statistics import NoiseScale
from tests.distributed.layout_cases import Case, assemble
from tests.distributed.statistics_cases import watched

Ranks = Callable[..., list[Any]]
# An embedding row of an id that no batch holds has no gradient: the untied one shows zeros.
BASE = Case(steps=4, spec={"tied_head": False})


@pytest.mark.parametrize(
    "layout",
    [{}, {"dp": 2}, {"dp": 2, "zero_stage": 3}, {"tp": 2, "pp": 2}, {"pp": 2, "spec": {"tied_head": True}}],
    ids=str,
)
def test_statistics_are_of_the_whole_tensors(ranks: Ranks, layout: dict[str, Any]) -> None:
    case = replace(BASE, **layout)
    alone = replace(BASE, spec=case.spec)
    (single,) = ranks(watched, 1, alone, timeout=120)
    results = ranks(watched, case.world_size, case, timeout=120)
    assert all(result["steps"] == results[0]["steps"] for result in results)
    for step, (found, expected) in enumerate(zip(results[0]["steps"], single["steps"], strict=True)):
        assert found.keys() == expected.keys()
        for name, value in found.items():
            # A key's bias on unrotated dimensions has a gradient of rounding noise, which is 0 now and then.
            tolerance = 5.0 if name.startswith("pct_") and name.endswith("bias") else 2e-5
            assert value == pytest.approx(expected[name], rel=2e-3, abs=tolerance), (step, name)
        gradients = [value for name, value in found.items() if name.startswith("gradient_norms/")]
        assert math.hypot(*gradients) == pytest.approx(results[0]["norms"][step], rel=1e-5)
        assert ("train/noise_scale" in found) == (step % 2 == 1)
    # The norms of the last step against the tensors themselves.
    last = results[0]["steps"][-1]
    for kind, front, back in (("weight", "parameter_norms/", ""), ("exp_avg", "optimizer_state_norms/", "_exp_avg")):
        for name, tensor in assemble(results, kind).items():
            assert last[f"{front}{name}{back}"] == pytest.approx(tensor.norm().item(), rel=1e-5)


def test_zeros_and_noise_against_autograd(ranks: Ranks) -> None:
    """The percentage of zeros of the embedding is that of the ids that did not occur; offloading changes nothing."""
    (result,) = ranks(watched, 1, BASE, timeout=120)
    (offloaded,) = ranks(watched, 1, BASE, True, timeout=120)
    assert result["steps"] == offloaded["steps"]
    from tests.distributed.layout_cases import global_batch

    tokens, _, _ = global_batch(0, BASE)
    absent = 96 - len(torch.unique(tokens))
    zeros = result["steps"][0]["pct_grad_zeros/embedding.word_embeddings.weight"]
    assert zeros == pytest.approx(100 * absent / 96, abs=0.5)
    assert result["steps"][0]["pct_grad_zeros/final_norm.weight"] == 0


def test_skipped_steps_have_no_gradient(ranks: Ranks) -> None:
    case = replace(BASE, precision="fp16", initial_scale_power=30, steps=3, dp=2)
    first = ranks(watched, 2, case, timeout=120)[0]
    assert first["skipped"][0]
    assert not any(name.startswith(("gradient_norms/", "train/")) for name in first["steps"][0])
    assert "parameter_norms/head.weight" in first["steps"][0]


def test_noise_scale_of_gradients_with_known_noise() -> None:
    """Gradients of mean g and per-sequence covariance S: the scale is tr(S) / |g|^2."""
    generator = torch.Generator().manual_seed(2)
    dims, batch, steps, sigma = 500, 8, 4, 3.0
    mean = torch.full((dims,), 0.2)
    scale = NoiseScale(batch, steps)
    value = math.nan
    for _ in range(400):
        small = mean + sigma / math.sqrt(batch) * torch.randn(steps, dims, generator=generator)
        value = scale.add(small.square().sum(1).mean().item(), small.mean(0).square().sum().item())
    # 4500 / 20; the running means average about a hundred noisy estimates.
    assert value == pytest.approx(sigma**2 * dims / (dims * 0.04), rel=0.2)
