"""Models that predict labels, from labelled JSON Lines to scores: as a user's files and YAML ask for it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint import open_checkpoint
from megatron.cli.evaluate import main as evaluate
from megatron.cli.generate import main as generate
from megatron.cli.preprocess_labelled import main as preprocess
from megatron.common.errors import ConfigError, DataError
from megatron.config import load
from megatron.convert.export import export_checkpoint
from megatron.convert.neox_export import export_neox
from megatron.model.from_config import model_spec
from tests.integration.run_cases import train_run, write_config
from tests.pool import RankFailure

Ranks = Callable[..., list[Any]]

# All learns with the prompt: the base has learnt nothing yet.
PROMPT = {"soft_prompt_tuning": {"num_tokens": 4}, "train_parameters": ["*"]}
CHECKED = {"checkpoint_validation_with_forward_pass": True}


def _word(draw: random.Random) -> str:
    return "".join(draw.choice("abcdefgh") for _ in range(draw.randint(2, 7)))


def _records(task: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Tasks that a small model learns within a hundred steps: it must look at a letter, or find a capital."""
    draw = random.Random(seed)
    records: list[dict[str, Any]] = []
    for _ in range(count):
        if task == "sequence_classification":
            text = _word(draw)
            records.append({"text": text, "label": "low" if text[-1] in "abcd" else "high"})
        elif task == "token_classification":
            words = [_word(draw)[:1] for _ in range(3)]
            records.append({"tokens": words, "labels": ["low" if word in "abcd" else "high" for word in words]})
        else:
            before, after, answer = _word(draw)[:3], _word(draw)[:2], draw.choice("XYZ")
            context = before + answer + after
            answers = {"text": [answer], "answer_start": [len(before)]}
            records.append({"question": "?", "context": context, "answers": answers})
    return records


def _prepare(folder: Path, task: str, names: str = "high,low") -> dict[str, Any]:
    """The data of a task, and the keys that name it. names: of the labels, in order."""
    keys: dict[str, Any] = {"task": task, "pack_impl": "unpacked"}
    for part, count, seed in (("train", 200, 1), ("valid", 40, 2), ("test", 50, 3)):
        source = folder / f"{part}.jsonl"
        source.write_text("".join(json.dumps(record) + "\n" for record in _records(task, count, seed)))
        arguments = ["--task", task, "--input", str(source), "--output-prefix", str(folder / part)]
        arguments += [] if task == "question_answering" else ["--labels", names]
        preprocess([*arguments, "--seq-length", "9", "--tokenizer-type", "CharLevelTokenizer"])
        keys[f"{part}_data_paths"] = [str(folder / f"{part}_text_document")]
        keys[f"{part}_label_data_paths"] = [str(folder / f"{part}_label_document")]
    if task != "question_answering":
        keys["label_names"] = names.split(",")
    return keys


@pytest.mark.parametrize(
    ("task", "metric", "world_size", "layout"),
    [
        ("sequence_classification", "accuracy", 1, {}),
        ("token_classification", "macro_f1", 2, {"model_parallel_size": 2, **PROMPT}),
        ("question_answering", "exact_match", 2, {"pipe_parallel_size": 2, "precision": "bfloat16"}),
    ],
)
def test_a_task_is_learnt_and_scored(
    ranks: Ranks,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    task: str,
    metric: str,
    world_size: int,
    layout: dict[str, Any],
) -> None:
    ranks(train_run, 1, str(write_config(tmp_path, "base", train_iters=2, **CHECKED)))
    keys = {**_prepare(tmp_path, task), "data_path": None, "split": None}
    steps = {"train_iters": 100, "checkpoint_factor": 100, "eval_interval": 50, "log_interval": 50}
    load = {"load": str(tmp_path / "base"), "finetune": True, "allow_fresh_start": None, **CHECKED}
    losses = ranks(train_run, world_size, str(write_config(tmp_path, "tuned", **keys, **steps, **load, **layout)))[0]
    assert losses["losses"][-1] < 0.2 * losses["losses"][0]
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path, "score", **keys, load=str(tmp_path / "tuned"), save=None)
    assert evaluate([str(config)]) == 0
    (path,) = tmp_path.glob("eval_results_*.json")
    results = json.loads(path.read_text())
    prefix = str(tmp_path / "test_text_document")
    assert results["results"][prefix][f"{metric},none"] > 0.9
    assert results["n-samples"][prefix]["effective"] == (150 if task == "token_classification" else 50)
    with pytest.raises(ConfigError, match="predicts labels, not text"):
        generate([str(config)])
    if task == "sequence_classification":
        _check_names(ranks, tmp_path, keys)


def _check_names(ranks: Ranks, folder: Path, keys: dict[str, Any]) -> None:
    """What the labels stand for travels with the model, and cannot be exchanged in silence."""
    export_checkpoint(open_checkpoint(folder / "tuned"), folder / "exported", "fp32")
    published = json.loads((folder / "exported" / "config.json").read_text())
    assert published["id2label"] == {"0": "high", "1": "low"}
    assert published["label2id"] == {"high": 0, "low": 1}
    exchanged = {**keys, "label_names": ["low", "high"]}
    config = write_config(folder, "exchanged", **exchanged, load=str(folder / "tuned"), save=None)
    with pytest.raises(DataError, match="those of label_names 0 low, 1 high"):
        evaluate([str(config)])
    # Data of another order, in the place of the old.
    exchanged = {**_prepare(folder, "sequence_classification", "low,high"), "data_path": None, "split": None}
    config = write_config(folder, "on", **exchanged, load=str(folder / "tuned"), train_iters=102, **CHECKED)
    with pytest.raises(RankFailure, match=r"label_names: checkpoint \('high', 'low'\), config \('low', 'high'\)"):
        ranks(train_run, 1, str(config))
    unnamed = {key: value for key, value in exchanged.items() if key != "label_names"} | {"num_labels": 2}
    config = write_config(folder, "other", **unnamed, load=str(folder / "tuned"), save=None)
    with pytest.raises(DataError, match=r"its labels are 0 low, 1 high .*the same number would mean two things"):
        evaluate([str(config)])


@pytest.mark.parametrize("is_untied", [False, True])
def test_foreign_language_models_are_given_the_head(ranks: Ranks, tmp_path: Path, is_untied: bool) -> None:
    """Hugging Face's folder and upstream's, as they lie: whether their heads are tied is no matter here."""
    base = write_config(tmp_path, "base", train_iters=2, no_weight_tying=is_untied)
    ranks(train_run, 1, str(base))
    reader = open_checkpoint(tmp_path / "base")
    export_checkpoint(reader, tmp_path / "hf", "fp32")
    export_neox(reader, model_spec(load([base])), tmp_path / "upstream", dtype=torch.float32)
    keys = {**_prepare(tmp_path, "token_classification"), "data_path": None, "split": None, "train_iters": 3}
    keys |= {"no_weight_tying": is_untied, "finetune": True, "allow_fresh_start": None}
    found = [
        ranks(train_run, 1, str(write_config(tmp_path, f"from_{source}", **keys, load=str(tmp_path / source))))[0]
        for source in ("base", "hf", "upstream")
    ]
    assert len(found[0]["losses"]) == 3
    assert found[0]["losses"] == found[1]["losses"] == found[2]["losses"]


def test_mistakes(ranks: Ranks, tmp_path: Path) -> None:
    keys = {**_prepare(tmp_path, "sequence_classification"), "data_path": None, "split": None, "train_iters": 2}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"label_names": None}, "needs label_names, or num_labels"),
        ({"label_names": ["low", "high"]}, "the same number would mean two things"),
        ({"num_labels": 3}, "label_names are 2, num_labels is 3"),
        ({"label_names": ["low", "low"]}, "has low more than once"),
        ({"pack_impl": "packed"}, "needs one document per sequence"),
        ({"task": "causal_lm"}, "label_names does nothing"),
        ({f"{part}_label_data_paths": None for part in ("train", "valid", "test")}, "learns from labels"),
    ]
    for number, (changes, message) in enumerate(wrong):
        with pytest.raises(RankFailure) as failure:
            ranks(train_run, 1, str(write_config(tmp_path, f"wrong{number}", **{**keys, **changes})))
        assert message in str(failure.value)
    high = [{"text": "abc", "label": 0}, {"text": "b", "label": 4}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in high))
    arguments = ["--task", "sequence_classification", "--input", str(tmp_path / "train.jsonl"), "--seq-length", "9"]
    preprocess([*arguments, "--output-prefix", str(tmp_path / "train"), "--tokenizer-type", "CharLevelTokenizer"])
    with pytest.raises(RankFailure, match="its labels are 0 0, 1 1, 2 2, 3 3, 4 4"):
        ranks(train_run, 1, str(write_config(tmp_path, "high", **keys)))
    # Data of another program has no file of names.
    (tmp_path / "train_labels.json").unlink()
    with pytest.raises(RankFailure, match="has label 4; num_labels = 2"):
        ranks(train_run, 1, str(write_config(tmp_path, "high", **keys)))
