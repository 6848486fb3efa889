"""A soft prompt against the plain model with vectors put before its embeddings by hand; its start."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.model.build import Transformer, build_model
from megatron.model.soft_prompt import SoftPromptEmbedding
from megatron.model.spec import ModelSpec, SoftPrompt, WidthScaling
from megatron.parallel.process_groups import ProcessGroups
from megatron.parallel.random_streams import seed_streams
from megatron.parallel.topology import Topology
from tests.unit.convert.small_models import small_model

VARIANTS: dict[str, dict[str, Any]] = {
    "rotary": {},
    "learned": {"position": "learned", "rotary_dims": 0, "position_offset": 2},
    "sinusoidal, scaled": {"position": "sinusoidal", "rotary_dims": 0, "embedding_scale": 6.5},
    "muP": {"mup": WidthScaling(12, 40, 2, 2, 6, embedding_mult=1.4, position_mult=0.7), "position": "learned"},
    "relative": {"position": "rpe", "rotary_dims": 0, "num_kv_heads": 2},
    "alibi, window": {"position": "alibi", "rotary_dims": 0, "window": 4},
    "labels": {"task": "token_classification", "num_labels": 3, "head_bias": True},
}


def by_hand(model: Transformer, tokens: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """The hidden states of a plain model that is shown the prompt's vectors as if they were embeddings of words."""
    words = model.get_submodule("embedding.word_embeddings")

    def prepend(module: torch.nn.Module, inputs: Any, vectors: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.cat([prompt, row]) for row in vectors])

    hook = words.register_forward_hook(prepend)
    try:
        return model(tokens)[:, len(prompt) :]
    finally:
        hook.remove()


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_function_and_gradient(changes: dict[str, Any]) -> None:
    model = small_model(soft_prompt=SoftPrompt(5), **changes).double()
    plain = build_model(model.spec.base).double().eval()
    own = dict(model.named_parameters())
    prompt = own.pop("soft_prompt.weight")
    plain.load_state_dict(own)
    tokens = torch.randint(61, (3, 11), generator=torch.Generator().manual_seed(3))
    copy = prompt.detach().clone().requires_grad_()
    expected, found = by_hand(plain, tokens, copy), model(tokens)
    assert found.shape == (3, 11, 48)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    torch.testing.assert_close(prompt.grad, copy.grad, rtol=1e-11, atol=1e-11)
    assert prompt.grad is not None
    assert bool((prompt.grad.abs().sum(1) > 0.0).all()), "every virtual token matters"
    assert (expected - plain(tokens)).abs().max() > 0.1


@pytest.mark.parametrize("position", ["rotary", "learned"])
def test_dropout_is_that_of_embeddings(position: str) -> None:
    """A virtual token is dropped out as a word is, once."""
    changes: dict[str, Any] = {"position": position, "rotary_dims": 4 if position == "rotary" else 0}
    model = small_model(soft_prompt=SoftPrompt(400), max_positions=500, hidden_dropout=0.5, **changes)
    with torch.no_grad():
        model.get_parameter("soft_prompt.weight").fill_(1.0)
    entered = torch.zeros(2, 50, dtype=torch.int64)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "position_embeddings" in name:
            parameter.data.zero_()
    layers = ["embedding.word_embeddings", "soft_prompt", "embedding.position_embeddings"]
    for name in layers[: 3 if position == "learned" else 2]:
        entered = model.get_submodule(name).train()(entered)
    assert set(entered[:, :400].unique().tolist()) == {0.0, 2.0}
    for part in (entered[:, :400], entered[:, 400:]):
        assert 0.45 < float((part == 0).float().mean()) < 0.55


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_ranks_drop_alike_what_they_share(sequence_parallel: bool) -> None:
    groups = ProcessGroups(Topology(tp_size=2), 1, sequence_parallel=sequence_parallel)
    stream = seed_streams(4, groups, torch.device("cpu"))
    prompt = SoftPromptEmbedding(spec(soft_prompt=SoftPrompt(3), hidden_dropout=0.1), groups, stream)
    assert prompt.dropout.stream is (stream if sequence_parallel else None)


def spec(**changes: Any) -> ModelSpec:
    return ModelSpec(2, 12, 2, 2, 24, 29, 32, 20, rotary_dims=2, **changes)


@pytest.mark.parametrize("prompt", [SoftPrompt(7, 0.25), SoftPrompt(7, init_ids=(3, 28, 3, 0, 1, 17, 3))])
def test_the_start_is_the_same_on_every_rank(prompt: SoftPrompt) -> None:
    plain = build_model(spec(), seed=4)
    whole = build_model(spec(soft_prompt=prompt), seed=4)
    start = whole.get_parameter("soft_prompt.weight").detach()
    for tp_rank in range(2):
        shard = build_model(spec(soft_prompt=prompt), ProcessGroups(Topology(tp_size=2), tp_rank), seed=4)
        assert torch.equal(shard.get_parameter("soft_prompt.weight"), start)
    words = plain.get_parameter("embedding.word_embeddings.weight")
    assert torch.equal(whole.get_parameter("embedding.word_embeddings.weight"), words), "nothing else starts otherwise"
    if prompt.init_ids:
        assert torch.equal(start, words[list(prompt.init_ids)])
    else:
        assert 0.22 < float(start.abs().max()) <= 0.25
        assert abs(float(start.mean())) < 0.06
        assert not torch.equal(build_model(spec(soft_prompt=prompt), seed=5).get_parameter("soft_prompt.weight"), start)


@pytest.mark.parametrize(
    "changes", [{"embedding_scale": 3.0}, {"mup": WidthScaling(6, 12, 1, 1, 6, embedding_mult=2.0)}]
)
def test_words_are_scaled_as_the_model_scales_them(changes: dict[str, Any]) -> None:
    scaled = build_model(spec(soft_prompt=SoftPrompt(2, init_ids=(5, 6)), **changes), seed=4)
    tokens = torch.tensor([[5, 6]])
    entered = scaled.get_submodule("soft_prompt")(scaled.get_submodule("embedding.word_embeddings")(tokens))
    assert torch.equal(entered[:, :2], entered[:, 2:])


def test_a_spec_survives_json() -> None:
    import json

    one = spec(soft_prompt=SoftPrompt(2, 0.1, (5, 6)))
    assert ModelSpec.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    assert one.max_text_positions == 18
    assert one.base == spec()
