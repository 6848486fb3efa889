"""muP against a loop in plain torch that follows the paper's table, and its coordinate check."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from megatron.model.build import build_model, parameter_names
from megatron.model.lora import is_update
from megatron.model.soft_prompt import SOFT_PROMPT_WEIGHT
from megatron.model.spec import LowRank, ModelSpec, SoftPrompt, WidthScaling
from megatron.model.width_scaling import UpdateRule, lr_factor
from megatron.optim.build import build_optimizer
from megatron.optim.parameter_groups import parameter_groups

H, N, D, F_, V, T = 24, 3, 8, 60, 31, 7
BASE = WidthScaling(
    6, 20, num_heads=1, num_kv_heads=1, head_dim=4,
    embedding_mult=1.3, position_mult=0.6, attention_temp=0.7, output_temp=1.9,
)  # fmt: skip
SPEC = ModelSpec(
    num_layers=1, hidden_size=H, num_heads=N, num_kv_heads=N, ffn_size=F_, vocab_size=V, padded_vocab_size=V,
    max_positions=T, position="learned", tied_head=False, mup=BASE, init_method="normal", init_std=0.5,
    output_init_method="small_init",
)  # fmt: skip
# Table 8, by hand: (fan-in, fan-out) over the base's; 4 = 24 / 6, 6 = (3 * 8) / (1 * 4), 3 = 60 / 20.
MATRICES = {"query_key_value": (4, 6), "dense": (6, 4), "linear1": (4, 3), "linear2": (3, 4)}


def by_hand(w: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of one sequence."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ w[f"layers.0.{name}.weight"].T + w[f"layers.0.{name}.bias"]

    x = 1.3 * w["embedding.word_embeddings.weight"][tokens] + 0.6 * w["embedding.position_embeddings.weight"][:T]
    projected = linear(norm(x, "layers.0.input_layernorm"), "attention.query_key_value").view(T, N, 3, D)
    heads = []
    for head in range(N):
        q, k, v = projected[:, head].unbind(1)
        scores = (q @ k.T / D / 0.7).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v)
    x = x + linear(torch.cat(heads, -1), "attention.dense")
    x = x + linear(F.gelu(linear(norm(x, "layers.0.post_attention_layernorm"), "mlp.linear1")), "mlp.linear2")
    return norm(x, "final_norm") @ w["head.weight"].T * (6 / 24) / 1.9


def rate(name: str, rule: UpdateRule) -> float:
    """The factor of a parameter's learning rate by table 8."""
    layer, own = name.split(".")[-2:]
    if layer in MATRICES and own == "weight":
        fan_in, fan_out = MATRICES[layer]
        return 1 / fan_in if rule == "adam" else fan_out / fan_in
    if rule == "adam":
        return 1.0
    return MATRICES[layer][1] if layer in MATRICES else 4.0


@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_trains_as_the_table_says(rule: UpdateRule) -> None:
    model = build_model(SPEC, seed=4).double()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    first, second = ({name: torch.zeros_like(p) for name, p in weights.items()} for _ in range(2))
    lr, decay = 0.01, 0.3
    groups = parameter_groups(model.named_parameters(), decay, lambda name: lr_factor(name, SPEC, rule))
    optimizer = build_optimizer(groups, rule, lr=lr, betas=(0.8, 0.9), eps=1e-8)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
    for step in range(1, 4):
        text = torch.randint(V, (T + 1,), generator=torch.Generator().manual_seed(step))
        logits = model.logits(model(text[None, :-1]))[0]
        optimizer.zero_grad()
        F.cross_entropy(logits, text[1:]).backward()
        optimizer.step()
        for tensor in weights.values():
            tensor.requires_grad_()
        mine = by_hand(weights, text[:-1])
        torch.testing.assert_close(logits, mine, rtol=1e-9, atol=1e-11)
        gradients = torch.autograd.grad(F.cross_entropy(mine, text[1:]), list(weights.values()))
        with torch.no_grad():
            for (name, tensor), gradient in zip(weights.items(), gradients, strict=True):
                decays = not name.endswith("bias") and "norm" not in name
                # The pull of a step, rate times decay, does not depend on the width.
                pull = lr * decay * tensor if decays else torch.zeros_like(tensor)
                if rule == "adam":
                    first[name] = 0.8 * first[name] + 0.2 * gradient
                    second[name] = 0.9 * second[name] + 0.1 * gradient**2
                    gradient = first[name] / (1 - 0.8**step) / ((second[name] / (1 - 0.9**step)).sqrt() + 1e-8)
                tensor -= pull + lr * rate(name, rule) * gradient
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, weights[name], rtol=1e-8, atol=1e-10, msg=name)


def test_initial_values() -> None:
    """Standard deviations: the base model's, and hidden matrices' over the root of their fan-in."""
    wide = {"hidden_size": 96, "ffn_size": 300, "vocab_size": 999, "padded_vocab_size": 999}
    spec = dataclasses.replace(SPEC, num_heads=12, num_kv_heads=12, **wide)
    model = build_model(dataclasses.replace(spec, init_scale=1.5), seed=5)
    small = math.sqrt(2 / (5 * 6))
    expected = {
        "embedding.word_embeddings": 0.5,
        "head": 0.5,
        "layers.0.attention.query_key_value": 0.5 / 4,
        "layers.0.mlp.linear1": 0.5 / 4,
        "layers.0.attention.dense": small / math.sqrt(96 / 4),
        "layers.0.mlp.linear2": small / math.sqrt(15),
    }
    for name, deviation in expected.items():
        found = float(model.get_parameter(f"{name}.weight").detach().std())
        assert found == pytest.approx(1.5 * deviation, rel=0.03), name


def test_a_soft_prompt_begins_as_words_that_the_multipliers_have_seen() -> None:
    spec = dataclasses.replace(SPEC, position="rotary", init_scale=1.5, soft_prompt=SoftPrompt(2, init_ids=(7, 0)))
    named = dict(build_model(spec, seed=2).named_parameters())
    words = named["embedding.word_embeddings.weight"][[7, 0]]
    torch.testing.assert_close(named[SOFT_PROMPT_WEIGHT], 1.3 * words)


def test_at_the_base_widths_nothing_but_attention_is_scaled() -> None:
    plain = dataclasses.replace(SPEC, mup=None)
    base = WidthScaling(H, F_, N, N, D)
    scaled = dataclasses.replace(SPEC, mup=base)
    ours, theirs = (dict(build_model(spec, seed=2).named_parameters()) for spec in (scaled, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {lr_factor(name, scaled, rule) for name in ours for rule in ("adam", "sgd")} == {1.0}  # type: ignore[arg-type]
    assert (scaled.output_scale, scaled.input_scale, scaled.attention_scale) == (1.0, 1.0, 1 / D)


def test_low_rank_updates_have_one_width() -> None:
    """`a` reads the features and writes the rank, `b` the other way round."""
    spec = dataclasses.replace(SPEC, lora=LowRank(2, 4.0, ("query_key_value", "dense", "linear1", "linear2")))
    updates = [name for name in parameter_names(spec) if is_update(name)]
    assert len(updates) == 8
    for name in updates:
        fan_in, fan_out = MATRICES[name.split(".")[3]]
        is_a = name.endswith(".a")
        assert lr_factor(name, spec, "adam") == pytest.approx(1 / fan_in if is_a else 1)
        assert lr_factor(name, spec, "sgd") == pytest.approx(1 / fan_in if is_a else fan_out)


def test_a_spec_with_base_widths_survives_a_manifest() -> None:
    assert ModelSpec.from_dict(SPEC.to_dict()) == SPEC
