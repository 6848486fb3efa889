"""Optimizers against their update rules written out, and the weight-decay rule by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from megatron.common.errors import ConfigError
from megatron.optim.build import build_optimizer
from megatron.optim.parameter_groups import decays, parameter_groups

DECAYING = [
    "embedding.word_embeddings.weight",
    "embedding.position_embeddings.weight",
    "layers.3.attention.query_key_value.weight",
    "layers.0.mlp.linear1.weight",
    "layers.0.mlp.gate.weight",
    "head.weight",
]
NOT_DECAYING = [
    "layers.0.input_layernorm.weight",
    "layers.0.input_layernorm.bias",
    "layers.11.post_attention_layernorm.weight",
    "final_norm.weight",
    "layers.0.attention.dense.bias",
    "layers.0.mlp.linear2.bias",
]


def test_decay_follows_the_name() -> None:
    assert all(decays(name) for name in DECAYING)
    assert not any(decays(name) for name in NOT_DECAYING)


def test_groups_keep_order_and_leave_out_what_is_frozen_or_empty() -> None:
    named = [(name, Parameter(torch.ones(2))) for name in (*DECAYING, *NOT_DECAYING)]
    frozen = ("head.lora.weight", Parameter(torch.ones(2), requires_grad=False))
    decayed, plain = parameter_groups([*named, frozen], 0.1)
    assert [group["weight_decay"] for group in (decayed, plain)] == [0.1, 0.0]
    expected = [parameter for _, parameter in named]
    assert all(a is b for a, b in zip([*decayed["params"], *plain["params"]], expected, strict=True))
    assert len(parameter_groups(named[:3], 0.1)) == 1


def gradients(steps: int) -> list[Tensor]:
    """The same gradients for the optimizer and for its formula."""
    g = torch.Generator().manual_seed(5)
    return [torch.randn(7, generator=g) for _ in range(steps)]


def run(optimizer: torch.optim.Optimizer, parameter: Parameter, steps: int = 6) -> Tensor:
    """The parameter after some steps, in float64."""
    for gradient in gradients(steps):
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach().double()


@pytest.mark.parametrize("kind", ["Adam", "adamw", "ADAM"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adam_decouples_weight_decay(kind: str, weight_decay: float) -> None:
    start = torch.linspace(-1, 1, 7)
    lr, b1, b2, eps = 0.01, 0.8, 0.95, 1e-6
    p, m, v = start.double(), torch.zeros(7), torch.zeros(7)
    for t, g in enumerate(gradients(6), start=1):
        m, v = b1 * m + (1 - b1) * g.double(), b2 * v + (1 - b2) * g.double() ** 2
        p = p * (1 - lr * weight_decay) - lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
    parameter = Parameter(start.clone())
    groups = [{"params": [parameter], "weight_decay": weight_decay}]
    optimizer = build_optimizer(groups, kind, lr=lr, betas=(b1, b2), eps=eps)
    assert optimizer.defaults["fused"] is True
    assert torch.allclose(run(optimizer, parameter), p, atol=1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_lion_steps_by_the_sign(weight_decay: float) -> None:
    start = torch.linspace(-1, 1, 7)
    lr, b1, b2 = 0.01, 0.9, 0.97
    p, m = start.double(), torch.zeros(7, dtype=torch.float64)
    for g in gradients(6):
        p = p - lr * ((b1 * m + (1 - b1) * g.double()).sign() + weight_decay * p)
        m = b2 * m + (1 - b2) * g.double()
    parameter = Parameter(start.clone())
    optimizer = build_optimizer([{"params": [parameter], "weight_decay": weight_decay}], "Lion", lr=lr, betas=(b1, b2))
    assert torch.allclose(run(optimizer, parameter), p, atol=1e-6)
    assert torch.allclose(optimizer.state[parameter]["exp_avg"].double(), m, atol=1e-6)


def test_lion_skips_parameters_without_gradient_and_calls_the_closure() -> None:
    used, unused = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    optimizer = build_optimizer([{"params": [used, unused], "weight_decay": 0.5}], "lion", lr=0.1)

    def closure() -> Tensor:
        loss = used.sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)  # type: ignore[arg-type]
    assert loss is not None
    assert loss.item() == 2.0
    assert torch.allclose(used.detach(), torch.full((2,), 0.85))
    assert torch.equal(unused.detach(), torch.ones(2))


@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"betas": (0.9, 1.0)}])
def test_lion_refuses_impossible_values(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Lion"):
        build_optimizer([{"params": [Parameter(torch.ones(1))]}], "lion", **{"lr": 0.1, **bad})


def test_sgd_adds_the_decay_to_the_gradient() -> None:
    parameter = Parameter(torch.ones(1))
    optimizer = build_optimizer([{"params": [parameter], "weight_decay": 0.5}], "sgd", lr=0.1, momentum=0.5)
    for _ in range(2):
        parameter.grad = torch.ones(1)
        optimizer.step()
    # 1 - 0.1 * 1.5 = 0.85; then the velocity is 0.5 * 1.5 + (1 + 0.425) = 2.175.
    assert float(parameter.detach()) == pytest.approx(0.85 - 0.2175)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_madgrad_averages_towards_its_dual(weight_decay: float) -> None:
    start = torch.linspace(-1, 1, 7)
    lr, momentum, eps = 0.05, 0.8, 1e-6
    p = x0 = start.double()
    s, v = torch.zeros(7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    for t, g in enumerate(gradients(6), start=1):
        weight = lr * t**0.5
        s, v = s + weight * g.double(), v + weight * g.double() ** 2
        z = x0 - s / (v ** (1 / 3) + eps)
        p = momentum * p + (1 - momentum) * z - lr * weight_decay * p
    parameter = Parameter(start.clone())
    groups = [{"params": [parameter], "weight_decay": weight_decay}]
    optimizer = build_optimizer(groups, "madgrad_wd", lr=lr, momentum=momentum, eps=eps)
    assert torch.allclose(run(optimizer, parameter), p, atol=1e-6)
    assert int(optimizer.state[parameter]["step"]) == 6


def test_madgrad_leaves_what_has_no_gradient_and_calls_the_closure() -> None:
    used, unused = Parameter(torch.tensor([1.0, 2.0])), Parameter(torch.ones(2))
    optimizer = build_optimizer([{"params": [used, unused], "weight_decay": 0.0}], "madgrad_wd", lr=0.1, eps=0.0)

    def closure() -> Tensor:
        loss = used[0] * 2
        loss.backward()
        return loss

    assert optimizer.step(closure) == 2.0  # type: ignore[arg-type]
    assert used[1] == 2.0
    assert used[0] < 1.0
    assert torch.equal(unused.detach(), torch.ones(2))
    with pytest.raises(ValueError, match="Madgrad"):
        build_optimizer([{"params": [used]}], "madgrad_wd", lr=0.1, momentum=1.0)


def test_an_unknown_type_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'sm3' is not supported\. Use one of: adam, adamw, sgd, lion, madgrad_wd"):
        build_optimizer([], "sm3", lr=0.1)
