"""Completions equal those of an independent loop, of transformers, of single prompts, and of no cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPTNeoXForCausalLM

from megatron.convert.export import export_checkpoint
from megatron.inference.decode import DecodeSettings, PromptTooLongError, decode
from megatron.inference.load import load_model
from megatron.inference.sampling import Sampling
from megatron.model.build import Transformer
from megatron.model.spec import SoftPrompt, WidthScaling
from megatron.parallel.process_groups import ProcessGroups
from megatron.parallel.topology import Topology
from tests.unit.convert.small_models import save_model, small_model

PROMPTS = [[5, 7, 1, 30], [2], [9, 9, 8, 44, 17, 3, 60, 12, 28], [33, 4], [6, 5, 4, 3, 2, 1, 0]]
VARIANTS: dict[str, dict[str, Any]] = {
    "parallel": {},
    "sequential, tied": {"residual": "sequential", "tied_head": True},
    "grouped queries": {"num_kv_heads": 2},
    "learned positions": {"position": "learned", "rotary_dims": 0},
    "sinusoidal positions": {"position": "sinusoidal", "rotary_dims": 0},
    "alibi, grouped": {"position": "alibi", "rotary_dims": 0, "num_kv_heads": 2},
    "relative positions": {"position": "rpe", "rotary_dims": 0},
    "alibi, window": {"position": "alibi", "rotary_dims": 0, "window": 5},
    "muP": {"mup": WidthScaling(12, 40, 2, 2, 6, embedding_mult=1.4, attention_temp=0.3, output_temp=0.2)},
    "window of one layer": {"window": 3, "window_layers": (1,), "num_kv_heads": 1},
    "gpt-j": {"rotary_interleaved": True, "head_bias": True, "residual": "parallel_tied", "qkv_bias": False},
    "soft prompt": {"soft_prompt": SoftPrompt(6)},
    "soft prompt, learned positions": {"soft_prompt": SoftPrompt(3), "position": "learned", "rotary_dims": 0},
    "soft prompt, alibi, window": {"soft_prompt": SoftPrompt(9), "position": "alibi", "rotary_dims": 0, "window": 4},
    "qwen3": {"norm": "rmsnorm", "qk_norm": True, "head_dim": 8, "num_kv_heads": 2, "activation": "swiglu"},
}


@torch.no_grad()
def greedy(model: Transformer, prompt: list[int], count: int) -> tuple[list[int], list[torch.Tensor]]:
    """The oracle: the whole sequence anew for each token, one prompt."""
    tokens, logits = list(prompt), []
    for _ in range(count):
        logits.append(model.logits(model(torch.tensor([tokens]))[0, -1]))
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(prompt) :], logits


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_uneven_prompts_together_equal_each_alone(changes: dict[str, Any], use_cache: bool) -> None:
    model = small_model(**changes)
    settings = DecodeSettings(max_new_tokens=12, use_cache=use_cache, keep_logits=True)
    together = decode(model, PROMPTS, settings)
    for prompt, completion in zip(PROMPTS, together, strict=True):
        ids, logits = greedy(model, prompt, 12)
        assert completion.ids == ids
        assert not completion.finished
        assert (torch.stack(completion.logits) - torch.stack(logits)).abs().max() < 1e-4
    first = torch.stack([completion.logits[0] for completion in together])
    assert (first[1:] - first[0]).abs().amax(1).min() > 0.1, "the prompts must matter"


def test_greedy_equals_transformers_token_for_token(tmp_path: Path) -> None:
    model = small_model()
    export_checkpoint(save_model(tmp_path, model), tmp_path / "hf", "fp32", eod_id=0, pad_id=1)
    theirs = GPTNeoXForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    settings = DecodeSettings(max_new_tokens=25, eod_id=0)
    for prompt, completion in zip(PROMPTS, decode(model, PROMPTS, settings), strict=True):
        tokens = torch.tensor([prompt])
        mask = torch.ones_like(tokens)  # else the padding's id inside of a prompt would be taken for padding
        output = theirs.generate(tokens, attention_mask=mask, max_new_tokens=25, do_sample=False)
        output = output[0, len(prompt) :].tolist()
        ended = 0 in output
        assert completion.ids == (output[: output.index(0)] if ended else output)
        assert completion.finished == ended


def test_rows_end_each_at_its_own_time() -> None:
    model = small_model()
    plain = decode(model, PROMPTS, DecodeSettings(max_new_tokens=20))
    eod_id = plain[1].ids[4]
    ended = decode(model, PROMPTS, DecodeSettings(max_new_tokens=20, eod_id=eod_id))
    for before, after in zip(plain, ended, strict=True):
        expected = before.ids[: before.ids.index(eod_id)] if eod_id in before.ids else before.ids
        assert after.ids == expected
        assert after.finished == (eod_id in before.ids)
    assert {completion.finished for completion in ended} == {True, False}


def test_the_callers_rule_and_the_last_position_end_a_row() -> None:
    model = small_model()
    heard: list[tuple[int, int]] = []
    settings = DecodeSettings(max_new_tokens=100)
    done = decode(model, PROMPTS, settings, is_done=lambda ids: len(ids) == 9, on_token=lambda *it: heard.append(it))
    assert [len(completion.ids) for completion in done] == [9] * 5
    assert all(completion.finished for completion in done)
    assert [token for row, token in heard if row == 2] == done[2].ids
    full = decode(model, PROMPTS, settings)
    assert [len(prompt) + len(completion.ids) for prompt, completion in zip(PROMPTS, full, strict=True)] == [40] * 5
    assert not any(completion.finished for completion in full)
    assert full[2].ids == greedy(model, PROMPTS[2], 31)[0]


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_soft_prompt_takes_positions(use_cache: bool) -> None:
    model = small_model(soft_prompt=SoftPrompt(7))
    done = decode(model, PROMPTS, DecodeSettings(max_new_tokens=100, use_cache=use_cache))
    assert [len(prompt) + len(completion.ids) for prompt, completion in zip(PROMPTS, done, strict=True)] == [33] * 5
    assert done[2].ids == greedy(model, PROMPTS[2], 24)[0]
    with pytest.raises(PromptTooLongError, match="prompt 0 has 33 tokens; the model has 33 positions"):
        decode(model, [[1] * 33], DecodeSettings())


@pytest.mark.parametrize("use_cache", [True, False])
def test_random_streams_belong_to_prompts_not_to_batches(use_cache: bool) -> None:
    model = small_model()
    settings = DecodeSettings(max_new_tokens=10, sampling=Sampling(temperature=1.5), seed=3, use_cache=use_cache)
    together = [completion.ids for completion in decode(model, PROMPTS, settings)]
    alone = [decode(model, [prompt], settings, numbers=[n])[0].ids for n, prompt in enumerate(PROMPTS)]
    assert together == alone
    same = decode(model, [PROMPTS[0]] * 4, settings)
    assert len({tuple(completion.ids) for completion in same}) == 4, "repeated prompts get streams of their own"
    other = DecodeSettings(max_new_tokens=10, sampling=Sampling(temperature=1.5), seed=4)
    assert together != [completion.ids for completion in decode(model, PROMPTS, other)]


def test_bad_prompts() -> None:
    model = small_model()
    with pytest.raises(PromptTooLongError, match="prompt 1 has 40 tokens; the model has 40 positions"):
        decode(model, [[1], [1] * 40], DecodeSettings())
    assert len(decode(model, [[1] * 39], DecodeSettings())[0].ids) == 1
    with pytest.raises(ValueError, match="prompt 0 has no token"):
        decode(model, [[]], DecodeSettings())
    assert decode(model, [], DecodeSettings()) == []


def test_the_model_is_left_in_its_mode() -> None:
    model = small_model(hidden_dropout=0.5).train()
    first = decode(model, PROMPTS, DecodeSettings(max_new_tokens=5))
    assert model.training
    assert first == decode(model, PROMPTS, DecodeSettings(max_new_tokens=5)), "no dropout while generating"


def _decode_on_a_rank(world_size: int, root: str) -> list[list[int]]:
    from megatron.checkpoint import open_checkpoint

    groups = ProcessGroups.build(Topology(tp_size=world_size))
    model = load_model(open_checkpoint(root), groups)
    assert model.get_parameter("layers.0.mlp.linear1.weight").shape == (100 // world_size, 48)
    greedily = decode(model, PROMPTS, DecodeSettings(max_new_tokens=10))
    drawn = decode(model, PROMPTS, DecodeSettings(max_new_tokens=10, sampling=Sampling(temperature=1.0)))
    return [completion.ids for completion in greedily + drawn]


@pytest.mark.parametrize("prompt", [None, SoftPrompt(5)])
def test_tensor_parallel_ranks_write_the_same_text(
    tmp_path: Path, ranks: Callable[..., list[Any]], prompt: SoftPrompt | None
) -> None:
    model = small_model(
        padded_vocab_size=63, soft_prompt=prompt
    )  # 63 rows do not divide: the padding follows the reader's layout
    save_model(tmp_path, model, tp_size=1)
    expected = decode(model, PROMPTS, DecodeSettings(max_new_tokens=10))
    expected += decode(model, PROMPTS, DecodeSettings(max_new_tokens=10, sampling=Sampling(temperature=1.0)))
    for result in ranks(_decode_on_a_rank, 2, 2, str(tmp_path)):
        assert result == [completion.ids for completion in expected]
