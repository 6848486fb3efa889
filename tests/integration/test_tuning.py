"""Fine-tuning with low-rank updates and with frozen parameters, as a user's YAML asks for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint import Reader, find
from megatron.cli.merge_lora import main as merge_lora
from megatron.convert.export import export_checkpoint
from tests.integration.run_cases import checkpoint_tensors, train_run, write_config
from tests.pool import RankFailure

Ranks = Callable[..., list[Any]]
PROMPT = {
    "soft_prompt_tuning": {"num_tokens": 5, "init_string": "ab "},
    "finetune": True,
    "allow_fresh_start": None,
}
LORA = {"lora_rank": 2, "lora_alpha": 4.0, "lora_dropout": 0.1, "finetune": True, "allow_fresh_start": None}


@pytest.fixture
def base(ranks: Ranks, tmp_path: Path) -> Path:
    """A folder with a trained model of two steps in base/."""
    key = {"checkpoint_validation_with_forward_pass": True}
    ranks(train_run, 1, str(write_config(tmp_path, "base", train_iters=2, **key)))
    return tmp_path


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (1, {}),
        (2, {"zero_optimization": {"stage": 3}, "precision": "bfloat16"}),
        (4, {"model_parallel_size": 2, "pipe_parallel_size": 2}),
    ],
    ids=["one", "zero3-bf16", "tp2-pp2"],
)
def test_lora_starts_at_the_base_and_resumes_bitwise(
    ranks: Ranks, base: Path, world_size: int, layout: dict[str, Any]
) -> None:
    tuned = {**LORA, "load": str(base / "base"), "train_iters": 4, **layout}
    whole = ranks(train_run, world_size, str(write_config(base, "whole", **tuned)))
    plain = {**tuned, "lora_rank": None, "lora_alpha": None, "lora_dropout": None}
    untouched = ranks(train_run, world_size, str(write_config(base, "plain", **plain)))
    assert whole[0]["losses"][0] == untouched[0]["losses"][0], "the updates start at zero"
    ranks(train_run, world_size, str(write_config(base, "split", **tuned, exit_interval=2)))
    again = {**tuned, "finetune": None, "load": str(base / "split")}
    resumed = ranks(train_run, world_size, str(write_config(base, "split", **again)))
    assert [r["losses"] for r in resumed] == [r["losses"][2:] for r in whole]
    left, right = checkpoint_tensors(base / "whole"), checkpoint_tensors(base / "split")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    before = checkpoint_tensors(base / "base")
    for (name, kind), tensor in left.items():
        if ".lora." not in name:
            assert kind == "weight", "frozen weights have no optimizer state"
            assert torch.equal(tensor.float(), before[name, kind].to(tensor.dtype).float())
    assert any(bool(tensor.any()) for (name, kind), tensor in left.items() if name.endswith("lora.b"))
    merge_lora(["--input_dir", str(base / "whole"), "--output_dir", str(base / "merged")])
    merged = {name for name, _ in checkpoint_tensors(base / "merged")}
    assert merged == {name for name, _ in before}


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (1, {}),
        (2, {"zero_optimization": {"stage": 3}, "precision": "bfloat16"}),
        (4, {"model_parallel_size": 2, "pipe_parallel_size": 2, "sequence_parallel": True}),
    ],
    ids=["one", "zero3-bf16", "tp2-sp-pp2"],
)
def test_a_soft_prompt_starts_as_its_text_and_resumes_bitwise(
    ranks: Ranks, base: Path, world_size: int, layout: dict[str, Any]
) -> None:
    tuned = {**PROMPT, "load": str(base / "base"), "train_iters": 4, "extra_save_iters": [0], **layout}
    tuned["checkpoint_validation_with_forward_pass"] = True
    whole = ranks(train_run, world_size, str(write_config(base, "whole", **tuned)))
    before, start = checkpoint_tensors(base / "base"), checkpoint_tensors(base / "whole", 0)
    words = before["embedding.word_embeddings.weight", "weight"].float()
    prompt = start.pop(("soft_prompt.weight", "weight"))
    assert torch.equal(prompt.float(), words[[ord(letter) for letter in "ab ab"]])
    ranks(train_run, world_size, str(write_config(base, "split", **tuned, exit_interval=2)))
    again = {**tuned, "finetune": None, "load": str(base / "split"), "soft_prompt_tuning": {"num_tokens": 5}}
    resumed = ranks(train_run, world_size, str(write_config(base, "split", **again)))
    assert [r["losses"] for r in resumed] == [r["losses"][2:] for r in whole]
    left, right = checkpoint_tensors(base / "whole"), checkpoint_tensors(base / "split")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    for (name, kind), tensor in {**start, **left}.items():
        if name != "soft_prompt.weight":
            assert kind == "weight", "frozen weights have no optimizer state"
            assert torch.equal(tensor.float(), before[name, kind].to(tensor.dtype).float())
    assert {kind for name, kind in left if name == "soft_prompt.weight"} == {"weight", "exp_avg", "exp_avg_sq"}
    assert not torch.equal(left["soft_prompt.weight", "weight"], prompt)
    if world_size == 1:  # the same start from a Hugging Face folder
        export_checkpoint(Reader(find(base / "base")), base / "hf", "fp32")
        ranks(train_run, 1, str(write_config(base, "from_hf", **{**tuned, "load": str(base / "hf"), "train_iters": 1})))
        theirs = checkpoint_tensors(base / "from_hf", 0)
        assert all(torch.equal(theirs[key], tensor) for key, tensor in start.items())
        assert torch.equal(theirs["soft_prompt.weight", "weight"], prompt)
        return
    # Another layout goes on from it, and a new run takes the trained prompt, not its text.
    further = {**PROMPT, "finetune": None, "load": str(base / "whole"), "train_iters": 5, "save": str(base / "on")}
    assert ranks(train_run, 2, str(write_config(base, "on", **further, pipe_parallel_size=2)))[0]["start"] == 4
    anew = {**PROMPT, "load": str(base / "whole"), "train_iters": 1, "extra_save_iters": [0]}
    ranks(train_run, 1, str(write_config(base, "anew", **anew)))
    taken = checkpoint_tensors(base / "anew", 0)
    assert all(torch.equal(taken[key].float(), left[key].float()) for key in taken)


def test_frozen_parameters_stay(ranks: Ranks, base: Path) -> None:
    changes = {"load": str(base / "base"), "finetune": True, "train_iters": 2, "train_parameters": ["layers.1.*"]}
    config = write_config(base, "frozen", **changes, freeze_parameters=["*.bias"])
    ranks(train_run, 2, str(config))
    before, after = checkpoint_tensors(base / "base"), checkpoint_tensors(base / "frozen")
    moved = {name for (name, kind), tensor in after.items() if not torch.equal(tensor, before[name, kind])}
    assert moved == {name for name, _ in after if name.startswith("layers.1.") and not name.endswith("bias")}


def test_mistakes(ranks: Ranks, base: Path) -> None:
    load = {"load": str(base / "base"), "train_iters": 2}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({**LORA, "finetune": None}, "Set finetune: true"),
        ({"train_parameters": ["layer.0.*"]}, "'layer.0.*' fits no parameter"),
        ({"freeze_parameters": ["*"]}, "leave nothing to train"),
        ({"lora_alpha": 3}, "lora_alpha does nothing without lora_rank"),
        ({**LORA, "lora_targets": ["gate"]}, "lora_targets holds gate"),
        ({**LORA, "lora_targets": ["q_proj"]}, "q_proj"),
        ({**PROMPT, "finetune": None}, "Set finetune: true to start training a prompt"),
        ({**PROMPT, "freeze_parameters": ["soft_prompt.*"]}, "leave nothing to train"),
    ]
    for number, (changes, message) in enumerate(wrong):
        config = write_config(base, f"wrong{number}", **{**load, **changes})
        with pytest.raises(RankFailure) as failure:
            ranks(train_run, 1, str(config))
        assert message in str(failure.value)
    ranks(train_run, 1, str(write_config(base, "tuned", **{**load, **LORA})))
    config = write_config(base, "without", load=str(base / "tuned"), finetune=True)
    with pytest.raises(RankFailure, match="merge the updates"):
        ranks(train_run, 1, str(config))


def test_mistakes_with_a_soft_prompt(ranks: Ranks, base: Path) -> None:
    ranks(train_run, 1, str(write_config(base, "tuned", **PROMPT, load=str(base / "base"), train_iters=2)))
    load = {**PROMPT, "load": str(base / "tuned")}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"soft_prompt_tuning": None}, "has a soft prompt of 5 tokens, the config has none"),
        ({"soft_prompt_tuning": None, "finetune": None}, "has a soft prompt of 5 tokens, the config has none"),
        ({"soft_prompt_tuning": {"num_tokens": 4}}, "the config has soft_prompt_tuning.num_tokens = 4"),
        ({"soft_prompt_tuning": {"num_tokens": 4}, "finetune": None}, "Set num_tokens: 5 to go on"),
    ]
    for number, (changes, message) in enumerate(wrong):
        config = write_config(base, f"wrong{number}", **{**load, **changes})
        with pytest.raises(RankFailure) as failure:
            ranks(train_run, 1, str(config))
        assert message in str(failure.value)
