"""Our adapter against lm-eval's own for transformers, which holds the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerFast

from megatron.common.errors import ConfigError, DataError
from megatron.evaluation.generation import generate_batch
from megatron.evaluation.harness import HarnessModel
from megatron.evaluation.scoring import score_batch
from megatron.evaluation.team import Team
from tests.unit.evaluation import tiny

PAIRS = [
    ("def add(first,", " second):"),
    ("def add(first,", " index):\n    print(index)"),
    ("def add(first, ", "second"),
    ("", "import os\n"),
    ("import", " sys"),
    ("for index in range(10):\n    print(index, index * index)\n" * 2, "import os"),
    ("class Point:\n", "    def __init__(self, x, y):\n        self.x = x\n"),
    ("print", "print(print(print"),
    ("print", "print(print(print("),
]
DOCUMENTS = ["x", "", *tiny.TEXTS, "".join(tiny.TEXTS) * 2, "print(" * 31]


def ours(tokenizer_file: Path, batch_size: int) -> HarnessModel:
    model, tokenizer = tiny.model(), tiny.tokenizer(tokenizer_file)
    work = {
        "score": lambda rows: score_batch(model, rows),
        "generate": lambda requests: generate_batch(model, tokenizer, requests),
    }
    device = torch.device("cpu")
    team = Team(model.groups, work, device)
    return HarnessModel(team.map, tokenizer, max_length=tiny.MAX_POSITIONS, batch_size=batch_size, device=device)


@pytest.fixture(scope="module")
def theirs(tokenizer_file: Path) -> HFLM:
    fast = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file), eos_token="<|endoftext|>", pad_token="<|padding|>"
    )
    # With its cache of logits HFLM mixes up requests that share context + continuation[:-1].
    return HFLM(
        pretrained=tiny.twin(tiny.model()),
        tokenizer=fast,
        max_length=tiny.MAX_POSITIONS,
        batch_size=3,
        logits_cache=False,
        device="cpu",
    )


def requests(kind: str, arguments: list[Any]) -> list[Instance]:
    return [Instance(kind, {}, each if isinstance(each, tuple) else (each,), i) for i, each in enumerate(arguments)]


@pytest.mark.parametrize("batch_size", [1, 4, 8])
def test_loglikelihood_equals_hflm(tokenizer_file: Path, theirs: HFLM, batch_size: int) -> None:
    got = ours(tokenizer_file, batch_size).loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    expected = theirs.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    assert [score for score, _ in got] == pytest.approx([score for score, _ in expected], rel=1e-5)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]


def test_greedy_flag_is_true_for_the_models_own_choice_only(tokenizer_file: Path) -> None:
    lm, model = ours(tokenizer_file, 4), tiny.model()
    context = lm.tok_encode("def add(first,")
    choice: list[int] = []
    for _ in range(3):
        hidden = model(torch.tensor([context + choice]))
        choice.append(int(model.logits(hidden[0, -1]).argmax()))
    wrong = [(choice[0] + 1) % 300, *choice[1:]]
    scores = lm._loglikelihood_tokens([(None, context, choice), (None, context, wrong)])
    assert [greedy for _, greedy in scores] == [True, False]


def test_rolling_equals_hflm(tokenizer_file: Path, theirs: HFLM) -> None:
    got = ours(tokenizer_file, 5).loglikelihood_rolling(requests("loglikelihood_rolling", DOCUMENTS))
    expected = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", DOCUMENTS), disable_tqdm=True)
    assert got == pytest.approx(expected, rel=1e-5)
    assert got[1] == 0.0


@pytest.mark.parametrize("until", [["\n"], ["e", "zzz"], []])
def test_greedy_generation_equals_hflm(tokenizer_file: Path, theirs: HFLM, until: list[str]) -> None:
    arguments = [(context, {"until": list(until), "max_gen_toks": 12}) for context in tiny.TEXTS]
    arguments.append((tiny.TEXTS[0], {"until": list(until), "max_gen_toks": 5}))
    got = ours(tokenizer_file, 2).generate_until(requests("generate_until", arguments))
    expected = theirs.generate_until(requests("generate_until", arguments), disable_tqdm=True)
    assert got == expected
    assert any(got)


def test_sampled_texts_do_not_depend_on_the_batch(tokenizer_file: Path) -> None:
    kwargs = {"until": [], "do_sample": True, "temperature": 1.5, "top_k": 50, "max_gen_toks": 6}
    arguments = [(tiny.TEXTS[0], kwargs)] * 3 + [(tiny.TEXTS[2], kwargs)]
    alone, together = (ours(tokenizer_file, size).generate_until(requests("", arguments)) for size in (1, 4))
    assert alone == together
    assert len(set(alone)) > 2, "each request has a random stream of its own"


def test_token_that_reaches_over_the_seam(tokenizer_file: Path) -> None:
    lm = ours(tokenizer_file, 1)
    together, context = lm.tok_encode("print"), lm.tok_encode("prin")
    assert len(together) <= len(context), "the case that is tested here"
    assert lm._encode_pair("prin", "t") == (context, lm.tok_encode("t"))


def test_what_cannot_be_done_is_refused(tokenizer_file: Path) -> None:
    lm = ours(tokenizer_file, 1)
    with pytest.raises(DataError, match=r"33 tokens is longer than the longest row of 32"):
        lm._loglikelihood_tokens([(None, [0], [5] * 33)])
    with pytest.raises(DataError, match="asks for 32 new tokens"):
        lm.generate_until(requests("generate_until", [("x", {"until": [], "max_gen_toks": 32})]))
    with pytest.raises(ConfigError, match="num_beams"):
        lm.generate_until(requests("generate_until", [("x", {"until": [], "num_beams": 3})]))


def test_a_cut_context_is_said_once(tokenizer_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours(tokenizer_file, 2)._loglikelihood_tokens([(None, [5] * 40, [6]), (None, [5], [6]), (None, [5] * 32, [6, 7])])
    assert "2 of 3 requests are longer than 32 tokens" in capsys.readouterr().err
