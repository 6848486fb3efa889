"""A whole evaluation of the shipped tasks over small local data."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.evaluation import results as result_views
from megatron.evaluation.run import evaluate_tasks, load_tasks
from megatron.model.build import Transformer
from megatron.model.spec import SoftPrompt
from megatron.parallel.process_groups import ProcessGroups
from megatron.parallel.topology import Topology
from tests.unit.evaluation import cases, tiny

Ranks = Callable[..., list[Any]]


def evaluate(model: Transformer, tokenizer_file: Path, data_dir: Path, **options: Any) -> dict[str, Any]:
    tasks = load_tasks(["stdlib_completion"], model.groups, torch.device("cpu"), str(data_dir))
    results = evaluate_tasks(model, tiny.tokenizer(tokenizer_file), tasks, batch_size=3, is_quiet=True, **options)
    assert results is not None
    return results


@pytest.fixture(scope="module")
def alone(tokenizer_file: Path, data_dir: Path) -> dict[str, Any]:
    return evaluate(tiny.model(), tokenizer_file, data_dir, info={"step": 7})


def logprob(model: Transformer, tokenizer_file: Path, context: str, continuation: str) -> float:
    tokenizer = tiny.tokenizer(tokenizer_file)
    before, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
    total, start = 0.0, len(before)
    with torch.no_grad():
        for index in range(start, len(whole)):
            hidden = model(torch.tensor([whole[max(0, len(whole) - 33) : index]]))
            total += float(torch.log_softmax(model.logits(hidden[0, -1]), -1)[whole[index]])
    return total


def test_accuracy_is_that_of_scores_computed_one_by_one(
    alone: dict[str, Any], tokenizer_file: Path, data_dir: Path
) -> None:
    model, hits, normed_hits = tiny.model(), [], []
    for line in (data_dir / "stdlib/stdlib_completion.jsonl").read_text().splitlines():
        row = json.loads(line)
        # lm-eval moves the spaces at the end of a context into the continuation.
        context = row["context"].rstrip()
        seam = row["context"][len(context) :]
        scores = [logprob(model, tokenizer_file, context, seam + choice) for choice in row["choices"]]
        normed = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        hits.append(scores.index(max(scores)) == row["answer"])
        normed_hits.append(normed.index(max(normed)) == row["answer"])
    scored = alone["results"]["stdlib_completion_choice"]
    assert scored["acc,none"] == pytest.approx(np.mean(hits))
    assert scored["acc_norm,none"] == pytest.approx(np.mean(normed_hits))
    assert 0 < np.mean(hits) < 1


def test_perplexities_agree_with_each_other_and_with_the_text(alone: dict[str, Any], data_dir: Path) -> None:
    texts = [json.loads(line)["text"] for line in (data_dir / "stdlib/stdlib_heldout.jsonl").open()]
    num_bytes = sum(len(text.encode()) for text in texts)
    num_words = sum(len(re.split(r"\s+", text)) for text in texts)
    scored = alone["results"]["stdlib_perplexity"]
    bits = scored["bits_per_byte,none"]
    assert scored["byte_perplexity,none"] == pytest.approx(2**bits)
    assert scored["word_perplexity,none"] == pytest.approx(math.exp(bits * math.log(2) * num_bytes / num_words))


@pytest.mark.parametrize(("world_size", "tp_size"), [(2, 1), (2, 2), (4, 2), (4, 1)])
def test_scores_do_not_depend_on_the_number_of_ranks(
    ranks: Ranks, alone: dict[str, Any], tokenizer_file: Path, data_dir: Path, world_size: int, tp_size: int
) -> None:
    first, *others = ranks(
        cases.evaluate, world_size, tp_size, str(tokenizer_file), str(data_dir), ["stdlib_completion"]
    )
    assert others == [None] * (world_size - 1)
    for task, scores in alone["results"].items():
        expected = {key: value for key, value in scores.items() if isinstance(value, float)}
        got = {key: first[task][key] for key in expected}
        # Replicas compute with the same shapes, hence the same bits; tensor-parallel sums are rounded in another order.
        assert got == (expected if tp_size == 1 else pytest.approx(expected, rel=1e-5))


def test_more_ranks_than_documents(ranks: Ranks, tokenizer_file: Path, data_dir: Path) -> None:
    first, *_ = ranks(cases.evaluate, 2, 1, str(tokenizer_file), str(data_dir), ["stdlib_perplexity"], 1)
    assert first["stdlib_perplexity"]["sample_len"] == 1


def test_training_is_not_disturbed(alone: dict[str, Any], tokenizer_file: Path, data_dir: Path) -> None:
    model = tiny.model(dropout=0.5).train()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    results = evaluate(model, tokenizer_file, data_dir)
    assert results["results"] == alone["results"], "no dropout in the middle of training"
    assert model.training
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    loss = model(torch.tensor([[1, 2, 3]])).sum()
    loss.backward()


def test_loaded_tasks_serve_again_and_again(
    alone: dict[str, Any], tokenizer_file: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in training, where the same tasks are run at each validation, by name with the data found by DATA_DIR."""
    model, tokenizer = tiny.model(), tiny.tokenizer(tokenizer_file)
    monkeypatch.setenv("DATA_DIR", str(data_dir))
    tasks = load_tasks(["stdlib_perplexity"], model.groups, torch.device("cpu"))
    for chosen in (tasks, tasks, ["stdlib_perplexity"]):
        results = evaluate_tasks(model, tokenizer, chosen, batch_size=3, is_quiet=True)
        assert results is not None
        assert results["results"]["stdlib_perplexity"] == alone["results"]["stdlib_perplexity"]


def test_a_soft_prompt_takes_positions_from_the_text(
    alone: dict[str, Any], tokenizer_file: Path, data_dir: Path
) -> None:
    model = tiny.model(prompt=SoftPrompt(9))
    tuned = evaluate(model, tokenizer_file, data_dir)
    assert tuned["config"]["max_length"] == tiny.MAX_POSITIONS - 9
    assert tuned["results"] != alone["results"]
    plain = evaluate(tiny.model(), tokenizer_file, data_dir, max_length=tiny.MAX_POSITIONS - 9)
    assert tuned["results"] != plain["results"]


def test_max_length_bounds_the_rows(alone: dict[str, Any], tokenizer_file: Path, data_dir: Path) -> None:
    short = evaluate(tiny.model(), tokenizer_file, data_dir, max_length=16)
    key = "bits_per_byte,none"
    assert short["config"]["max_length"] == 16
    assert short["results"]["stdlib_perplexity"][key] != alone["results"]["stdlib_perplexity"][key]


def test_pipeline_stages_are_refused(tokenizer_file: Path) -> None:
    model = tiny.model()
    model.groups = ProcessGroups(Topology(2, 1, 1), 0)
    with pytest.raises(ValueError, match="without pipeline stages"):
        evaluate_tasks(model, tiny.tokenizer(tokenizer_file), ["stdlib_completion"], batch_size=1)


def test_limit_and_facts_are_in_the_results(alone: dict[str, Any], tokenizer_file: Path, data_dir: Path) -> None:
    limited = evaluate(tiny.model(), tokenizer_file, data_dir, limit=2)
    assert limited["n-samples"]["stdlib_perplexity"] == {"original": 5, "effective": 2}
    assert limited["config"]["limit"] == 2
    assert alone["config"]["limit"] is None
    assert set(alone["n-shot"].values()) == {0}
    assert alone["config"]["model_args"] == {"model_dtype": "torch.float32", "step": 7}
    assert alone["config"]["batch_size"] == 3


def test_nothing_is_shown_but_in_a_terminal(
    tokenizer_file: Path, data_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tiny.model()
    tasks = load_tasks(["stdlib_perplexity"], model.groups, torch.device("cpu"), str(data_dir))
    evaluate_tasks(model, tiny.tokenizer(tokenizer_file), tasks, batch_size=3)
    assert capfd.readouterr() == ("", "")


def test_views_of_the_results(alone: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = result_views.metrics(alone)
    assert set(metrics) == {
        "stdlib_completion_choice_acc",
        "stdlib_completion_choice_acc_norm",
        "stdlib_perplexity_word_perplexity",
        "stdlib_perplexity_byte_perplexity",
        "stdlib_perplexity_bits_per_byte",
    }
    shown = result_views.table(alone)
    assert len(shown.splitlines()) == 1 + len(metrics)
    for value in metrics.values():
        assert f"{value:.4f}" in shown
    monkeypatch.chdir(tmp_path)
    first, second = result_views.write(alone, "run1"), result_views.write(alone, "run1")
    assert first != second
    assert re.fullmatch(r"run1_eval_results_\d\d-\d\d-\d{4}-\d\d-\d\d-\d\d\.json", first.name)
    assert result_views.write(alone).name.startswith("eval_results_")
    assert json.loads(first.read_text()) == alone
