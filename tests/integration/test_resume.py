"""Continuing a run: bitwise where nothing has changed, by the documented keys where something has, and never silently.

The oracle of most tests is the run that was not interrupted.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from megatron.checkpoint import open_checkpoint
from megatron.model.build import build_model
from megatron.model.spec import ModelSpec
from megatron.observe.metrics_log import SUPERSEDED_NAME
from tests.integration.resume_cases import refusals, state_of, told_run
from tests.integration.run_cases import BASE, checkpoint_tensors, train_run, write_config, write_dataset
from tests.pool import RankFailure

Ranks = Callable[..., list[Any]]

BASE_SHAPES = {"hidden_size": 8, "ffn_size": 24, "num_attention_heads": 1, "num_kv_heads": 1, "head_dim": 8}
MUP = {"use_mup": True, "mup_base_shapes": BASE_SHAPES, "mup_embedding_mult": 2.0}
DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.1}


def logged(folder: Path) -> list[dict[str, Any]]:
    """The records of training steps in a run's log, as they stand there."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "train/lm_loss" in record]


def assert_same_checkpoints(one: Path, other: Path) -> None:
    left, right = checkpoint_tensors(one), checkpoint_tensors(other)
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {"optimizer": {"type": "Lion", "params": {"lr": 0.001, "betas": [0.9, 0.99]}}}),
        (2, {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}, **DROPOUT}),
        (2, {"precision": "fp16", "fp16": {"initial_scale_power": 18, "loss_scale_window": 2, "hysteresis": 1}}),
        (2, {**MUP, "pipe_parallel_size": 2, **DROPOUT}),
        # Epochs of 7 samples: a step of 8 ends in the middle of one, every time.
        (1, {"split": "1,2,97", "num_workers": 0, **DROPOUT}),
    ],
    ids=["lion", "sgd", "fp16-overflowing", "mup-stages", "mid-epoch"],
)
def test_every_state_of_every_optimizer_is_continued_bitwise(
    ranks: Ranks, tmp_path: Path, world_size: int, changes: dict[str, Any]
) -> None:
    whole = ranks(train_run, world_size, str(write_config(tmp_path, "whole", **changes)))
    ranks(train_run, world_size, str(write_config(tmp_path, "parts", exit_interval=4, **changes)))
    # Another number of reading threads changes nothing.
    rest = ranks(train_run, world_size, str(write_config(tmp_path, "parts", **{**changes, "num_workers": 3})))
    assert rest[0]["start"] == 4
    assert [r["losses"] for r in rest] == [r["losses"][4:] for r in whole]
    assert [r["samples"] for r in rest] == [r["samples"][4:] for r in whole]
    assert_same_checkpoints(tmp_path / "parts", tmp_path / "whole")


def test_counters_go_on_and_the_log_has_every_step_once(ranks: Ranks, tmp_path: Path) -> None:
    """Killed after step 5 of 6, with a checkpoint of step 4: step 5 is made, and recorded, again."""
    overflowing = {"precision": "fp16", "fp16": {"initial_scale_power": 18, "hysteresis": 1}}
    config = str(write_config(tmp_path, **overflowing))
    with pytest.raises(RankFailure):
        ranks(train_run, 2, config, 5)
    before = logged(tmp_path / "run")
    result = ranks(told_run, 2, config)[0]
    after = logged(tmp_path / "run")
    assert [record["step"] for record in before] == [1, 2, 3, 4, 5]
    assert [record["step"] for record in after] == [1, 2, 3, 4, 5, 6]
    assert [record["consumed_tokens"] for record in after] == [8 * 9 * step for step in range(1, 7)]
    assert [record["train/consumed_samples"] for record in after] == [8 * step for step in range(1, 7)]
    skipped = [record["train/skipped_steps"] for record in after]
    assert skipped[3] > 0
    assert skipped == sorted(skipped)
    elapsed = [record["runtime/elapsed_s"] for record in after]
    assert elapsed == sorted(elapsed)
    assert 0 < elapsed[0] < elapsed[-1]
    superseded = [json.loads(line) for line in (tmp_path / "run" / SUPERSEDED_NAME).read_text().splitlines()]
    assert superseded == [record for record in before if record["step"] == 5]
    saved = state_of(str(tmp_path / "run"), 6)["position"]
    assert (saved["step"], saved["consumed_samples"], saved["consumed_tokens"]) == (6, 48, 432)
    assert saved["anomalies"]["num_skipped"] == skipped[-1]
    assert f"step 4, 32 samples, 288 tokens, {int(skipped[3])} skipped steps" in result["said"]
    assert "metrics of steps beyond 4 (1 records" in result["said"]


def cosine(step: int, lr: float) -> float:
    """BASE's schedule by its formula (warm-up of 0.2 * 6 steps, cosine to 0.001 at step 6)."""
    step = max(step, 1)
    return lr * step / 1.2 if step <= 1.2 else 0.001 + (lr - 0.001) * (1 + math.cos(math.pi * (step - 1.2) / 4.8)) / 2


@pytest.mark.parametrize(
    ("keys", "peak", "words"),
    [
        ({}, 0.02, "warning: learning-rate schedules differ: lr 0.01 in the checkpoint, 0.02 in the configuration;"),
        ({"override_lr_scheduler": True}, 0.02, "The configuration's takes over (override_lr_scheduler)"),
        ({"use_checkpoint_lr_scheduler": True}, 0.01, "The checkpoint's goes on (use_checkpoint_lr_scheduler)"),
        ({"use_checkpoint_lr_scheduler": True, "no_load_optim": True}, 0.01, "The checkpoint's goes on"),
        ({"finetune": True}, 0.02, "schedule and data start anew"),
    ],
    ids=["neither", "override", "checkpoint", "checkpoint-without-states", "finetune"],
)
def test_which_schedule_wins(ranks: Ranks, tmp_path: Path, keys: dict[str, Any], peak: float, words: str) -> None:
    """lr doubled between saving and loading; what runs is read off the log and compared with the formula."""
    ranks(train_run, 1, str(write_config(tmp_path, exit_interval=2)))
    optimizer = {"type": "Adam", "params": {**BASE["optimizer"]["params"], "lr": 0.02}}
    result = ranks(told_run, 1, str(write_config(tmp_path, optimizer=optimizer, **keys)))[0]
    assert words in result["said"]
    assert ("warning" in result["said"]) == (not keys)
    start = 0 if "finetune" in keys else 2
    rates = [record["train/learning_rate"] for record in logged(tmp_path / "run")][-(6 - start) :]
    assert rates == pytest.approx([cosine(step, peak) for step in range(start, 6)], rel=1e-12)
    # And so in the next checkpoint: a second start does not wonder again.
    assert state_of(str(tmp_path / "run"), 6)["schedule"]["lr"] == peak


def test_what_has_changed_is_said(ranks: Ranks, tmp_path: Path) -> None:
    ranks(train_run, 1, str(write_config(tmp_path, exit_interval=2)))
    said = ranks(told_run, 1, str(write_config(tmp_path)))[0]["said"]
    assert "warning" not in said
    assert "changed since that checkpoint: exit_interval: 2 then, None now\n" in said
    shutil.rmtree(tmp_path / "run" / "global_step6")
    changes = {"train_iters": 8, "lr_decay_iters": 6, "weight_decay": 0.05, **DROPOUT}
    said = ranks(told_run, 1, str(write_config(tmp_path, **changes)))[0]["said"]
    assert (
        "attention_dropout: 0.0 then, 0.1 now; hidden_dropout: 0.0 then, 0.2 now; train_iters: 6 then, 8 now; "
        "weight_decay: 0.1 then, 0.05 now" in said
    )


def test_states_that_are_not_loaded_start_anew_and_the_rest_goes_on(ranks: Ranks, tmp_path: Path) -> None:
    dropping = {"eval_iters": 0, **DROPOUT}
    whole = ranks(train_run, 1, str(write_config(tmp_path, "whole", **dropping)))[0]
    ranks(train_run, 1, str(write_config(tmp_path, "parts", exit_interval=4, **dropping)))

    def goes_on(name: str, **keys: Any) -> dict[str, Any]:
        shutil.copytree(tmp_path / "parts", tmp_path / name)
        return ranks(told_run, 1, str(write_config(tmp_path, name, **dropping, **keys)))[0]

    for name, keys in {"rng": {"no_load_rng": True}, "optim": {"no_load_optim": True}}.items():
        result = goes_on(name, **keys)
        assert result["start"] == 4
        assert result["samples"] == whole["samples"][4:]
        assert next(iter(keys)) in result["said"]
        same_first_loss = result["losses"][0] == whole["losses"][4]
        # Without the generators' states the first loss has other dropout; without Adam's moments the second differs.
        assert same_first_loss == (name == "optim")
        assert result["losses"][1] != whole["losses"][5]
    # Bias correction counts from the optimizer's own beginning.
    assert state_of(str(tmp_path / "optim"), 6)["optimizer_steps"] == 2
    assert state_of(str(tmp_path / "rng"), 6)["optimizer_steps"] == 6


def test_dropout_does_not_begin_again_where_its_states_cannot_be_continued(ranks: Ranks, tmp_path: Path) -> None:
    """At another layout, or with no_load_rng: the numbers are new ones, not those of steps 1 and 2."""
    constant = {"eval_iters": 0, "optimizer": {"type": "SGD", "params": {"lr": 1e-30}}, **DROPOUT}
    write_dataset(tmp_path, num_documents=1, seed=1)  # the same few samples in every step
    changes = {**constant, "split": "1,0,0", "min_lr": 0.0, "train_batch_size": 2, "train_iters": 4}
    write = {"checkpoint_factor": 2, **changes}
    first = ranks(train_run, 1, str(write_config(tmp_path, exit_interval=2, **write)))[0]
    rest = ranks(train_run, 1, str(write_config(tmp_path, no_load_rng=True, **write)))[0]
    assert rest["start"] == 2
    assert not set(first["losses"]) & set(rest["losses"])


def test_other_facts_are_refused_with_the_difference(ranks: Ranks, tmp_path: Path) -> None:
    ranks(train_run, 1, str(write_config(tmp_path, train_iters=2)))
    where = {"save": str(tmp_path / "run"), "load": str(tmp_path / "run")}
    longer = {"train_iters": 4}
    sgd = {"type": "SGD", "params": {"lr": 0.01}}
    goes_on = "allow_changed_data: true to go on with this data"
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"optimizer": sgd}, ["trained with the optimizer adam, the configuration says sgd", "no_load_optim"]),
        ({"seed": 99}, ["train data has changed: seed: 1234 then, 99 now\n", goes_on]),
        ({"seq_length": 8}, ["train data has changed: seq_length: 9 then, 8 now\n", goes_on]),
        ({"split": "7,2,1"}, ["train data has changed: documents: '0 to ", " now (split)\n", goes_on]),
        (
            {"train_iters": 40},
            ["epochs: 1 then, 3 now (as many as train_iters needs; all of them are shuffled as one)\n", goes_on],
        ),
        ({"hidden_size": 32}, ["hidden_size: checkpoint 16, config 32"]),
        ({"norm": "rmsnorm"}, ["norm: checkpoint 'layernorm', config 'rmsnorm'"]),
        ({"rotary_emb_base": 500}, ["rotary_base: checkpoint 10000, config 500.0"]),
        ({"no_weight_tying": False}, ["tied_head: checkpoint False, config True"]),
        ({"activation": "silu"}, ["activation: checkpoint 'gelu', config 'silu'"]),
    ]
    configs = [
        str(write_config(tmp_path, f"case{number}", **{**where, **longer, **changes}))
        for number, (changes, _) in enumerate(cases)
    ]
    (messages,) = ranks(refusals, 1, configs)
    for message, (changes, words) in zip(messages, cases, strict=True):
        assert [word for word in words if word not in message] == [], changes
    started = ranks(told_run, 1, str(write_config(tmp_path, optimizer=sgd, no_load_optim=True, **longer)))[0]
    assert started["start"] == 2
    # A run made longer by epochs, on purpose: everything but the order goes on, and its own checkpoints are as good.
    more = {"train_iters": 40, "exit_interval": 5, "optimizer": sgd}
    first = ranks(told_run, 1, str(write_config(tmp_path, **more, allow_changed_data=True)))[0]
    assert (first["start"], len(first["losses"])) == (4, 1)
    assert "warning: the train data has changed: epochs: 1 then, 3 now" in first["said"]
    assert "as many samples as were read" in first["said"]
    second = ranks(told_run, 1, str(write_config(tmp_path, **more)))[0]
    assert (second["start"], second["error"]) == (5, None)


def test_another_tokenizer_of_the_same_size_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    def tokenizer(name: str, words: list[str]) -> dict[str, str]:
        vocabulary = {word: number for number, word in enumerate([*words, "<|endoftext|>"])}
        Tokenizer(WordLevel(vocabulary, unk_token=words[0])).save(str(tmp_path / name))
        return {"tokenizer_type": "HFTokenizer", "vocab_file": str(tmp_path / name)}

    words = [f"word{number}" for number in range(130)]
    one, other = tokenizer("one.json", words), tokenizer("other.json", words[::-1])
    ranks(train_run, 1, str(write_config(tmp_path, train_iters=2, **one)))
    assert ranks(told_run, 1, str(write_config(tmp_path, train_iters=2, **one)))[0]["start"] == 2
    refusal = ranks(told_run, 1, str(write_config(tmp_path, train_iters=4, **other)))[0]["error"]
    assert "tokenizer: then" in refusal
    assert "train data" not in refusal


def test_the_forward_pass_is_stored_and_compared(ranks: Ranks, tmp_path: Path) -> None:
    key = {"checkpoint_validation_with_forward_pass": True, "eval_iters": 0}
    plain = ranks(train_run, 2, str(write_config(tmp_path, "plain", eval_iters=0, **DROPOUT)))
    checked = ranks(train_run, 2, str(write_config(tmp_path, **key, **DROPOUT)))
    assert [r["losses"] for r in checked] == [r["losses"] for r in plain]
    stored = state_of(str(tmp_path / "run"), 6)["forward_pass"]
    assert stored["tokens"] == 16
    # Independent of the engine: the model of the inference side, on the same numbers.
    reader = open_checkpoint(tmp_path / "run")
    model = build_model(ModelSpec.from_dict(reader.state["model_spec"]), seed=0)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(reader.read(name))
    text = torch.randint(model.spec.vocab_size, (17,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model.eval()(text[None, :-1])
    logits = torch.nn.functional.linear(hidden, model.output_weight.detach())[0, :, : model.spec.vocab_size]
    assert stored["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, text[1:])), rel=1e-6)

    def told(world_size: int, breaks: bool = False, **changes: Any) -> dict[str, Any]:
        return ranks(told_run, world_size, str(write_config(tmp_path, **key, **changes)), breaks)[0]

    assert "after loading: identical" in told(2, **DROPOUT)["said"]
    across = {"model_parallel_size": 2, "pipe_parallel_size": 2, "precision": "bfloat16"}
    assert "which is rounding" in told(4, **across)["said"]
    for layout in ({}, across):
        refusal = told(4 if layout else 1, breaks=True, **layout)["error"]
        assert "off by" in refusal
        assert "no version of a library has changed" in refusal
    assert "saved without checkpoint_validation" in told(2, load=str(tmp_path / "plain"))["said"]


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.full), 3])
def test_finetuning_goes_on_without_a_jump(ranks: Ranks, tmp_path: Path, stage: int) -> None:
    """After loading, the fp32 masters follow the weights, at every ZeRO stage and precision.

    Step 0 shows the loaded weights, step 1 what the optimizer made of the masters: were they the initial ones, it
    would be the loss of a fresh model. Fresh Adam moves by lr at most, whatever the masters' past.
    """
    base = str(write_config(tmp_path, "base", checkpoint_factor=6))
    trained = ranks(train_run, 1, base)[0]["losses"]
    gentle = {"type": "Adam", "params": {**BASE["optimizer"]["params"], "lr": 0.001}}
    losses = {}
    for precision in ("fp32", "bfloat16", "fp16"):
        config = write_config(
            tmp_path,
            precision,
            load=str(tmp_path / "base"),
            finetune=True,
            train_iters=3,
            optimizer=gentle,
            precision=precision,
            zero_optimization={"stage": stage},
        )
        losses[precision] = ranks(train_run, 2, str(config))[0]["losses"]
    # A fresh model's loss is ln(vocabulary) or so: half a nat above everything here.
    assert max(itertools.chain(*losses.values())) < trained[0] - 0.3
    for precision, rounding in (("bfloat16", 1e-2), ("fp16", 2e-3)):
        assert losses[precision] == pytest.approx(losses["fp32"], rel=rounding)


def test_precision_changes_between_save_and_load(ranks: Ranks, tmp_path: Path) -> None:
    """Masters and moments are fp32 in all of them. That they arrive bitwise: tests/distributed."""
    whole = ranks(train_run, 1, str(write_config(tmp_path, "whole", eval_iters=0)))[0]["losses"]
    losses = []
    for leg, precision in enumerate(("fp16", "fp32", "bfloat16", "fp32", "fp16", "bfloat16")):
        loss_scale = {"initial_scale_power": 10} if precision == "fp16" else None
        keys = {"fp16": loss_scale, "eval_iters": 0, "checkpoint_factor": 1, "exit_interval": leg + 1}
        losses += ranks(train_run, 2, str(write_config(tmp_path, precision=precision, **keys)))[0]["losses"]
    assert losses == pytest.approx(whole, rel=1e-2)
