"""Labelled JSON Lines to token and label files: places of labels, cuts, numbers of names, and each bad line's message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.cli.preprocess_labelled import main
from megatron.common.errors import DataError
from megatron.data.indexed import IndexedDataset
from megatron.data.labelled import LabelledJob, preprocess_labelled, token_at
from megatron.data.token_dataset import open_labels
from megatron.tokenizer.build import make_tokenizer

CHARACTERS = make_tokenizer("CharLevelTokenizer", None, None)


def written(tmp_path: Path, task: Any, records: list[Any], **options: Any) -> list[tuple[str, list[int]]]:
    """(text, labels) of each document, as the loader would align them: inputs and targets."""
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    job = LabelledJob(**{"task": task, "inputs": [str(source)], "output_prefix": str(tmp_path / "out"),
                         "seq_length": 100, **options})  # fmt: skip
    preprocess_labelled(job, CHARACTERS)
    tokens = IndexedDataset(tmp_path / "out_text_document")
    labels = open_labels(tmp_path / "out_label_document", tokens)
    return [
        (CHARACTERS.decode(tokens[i][:-1].tolist()), labels[i][1:].astype(int).tolist()) for i in range(len(tokens))
    ]


def test_sequences_have_their_label_at_the_last_token(tmp_path: Path) -> None:
    records = [{"text": "good", "label": "yes"}, {"text": "bad\n", "label": "no"}, {"text": "longer", "label": "no"}]
    found = written(tmp_path, "sequence_classification", records, seq_length=4)
    assert found == [
        ("good", [-100, -100, -100, 1]),
        ("bad\n", [-100, -100, -100, 0]),
        ("long", [-100, -100, -100, 0]),
    ]
    assert json.loads((tmp_path / "out_labels.json").read_text())["labels"] == ["no", "yes"]


def test_numbers_stay_what_they_are(tmp_path: Path) -> None:
    found = written(tmp_path, "sequence_classification", [{"text": "a", "label": 0}, {"text": "b", "label": 10}])
    assert [labels[-1] for _, labels in found] == [0, 10]
    assert len(json.loads((tmp_path / "out_labels.json").read_text())["labels"]) == 11


def test_words_have_their_label_at_the_last_piece(tmp_path: Path) -> None:
    record = {"tokens": ["He", "left"], "labels": ["P", "O"]}
    found = written(tmp_path, "token_classification", [record], labels=["O", "P"])
    assert found == [("He left", [-100, 1, -100, -100, -100, -100, 0])]


def test_answers_are_bits_at_their_first_and_last_token(tmp_path: Path) -> None:
    def record(start: int, text: str) -> dict[str, Any]:
        return {"question": "q?", "context": "abcdef", "answers": {"text": [text], "answer_start": [start]}}

    found = written(tmp_path, "question_answering", [record(2, "cd"), record(0, "a")])
    assert found == [("q?\nabcdef", [0, 0, 0, 0, 0, 1, 2, 0, 0]), ("q?\nabcdef", [0, 0, 0, 3, 0, 0, 0, 0, 0])]
    cut = written(tmp_path, "question_answering", [record(2, "cd"), record(0, "a")], seq_length=6)
    assert [text for text, _ in cut] == ["q?\nabc"], "half an answer is none"


def test_places_in_text_with_a_merging_tokenizer() -> None:
    class Pairs:
        def decode(self, ids: list[int]) -> str:
            return "".join(["ab", "c", "def", "g"][i] for i in ids)

    places = [token_at([0, 1, 2, 3], character, Pairs()) for character in range(7)]  # type: ignore[arg-type]
    assert places == [0, 0, 1, 2, 2, 2, 3]


@pytest.mark.parametrize(("task", "records", "message"), [
    ("sequence_classification", [{"text": "a", "label": 0}, {"text": "b"}], r"in\.jsonl:2: 'label' is missing"),
    ("sequence_classification", [{"text": "a", "label": 0}], "holds 1 label"),
    ("sequence_classification", [{"text": 3, "label": 0}, {"text": "a", "label": 1}], "3 is no text"),
    ("sequence_classification", [{"text": "a", "label": -1}, {"text": "b", "label": 1}], "negative"),
    ("token_classification", [{"tokens": ["a"], "labels": ["A", "B"]}], "1 tokens and 2 labels"),
    ("question_answering", [{"question": "q", "context": "abc", "answers": {"text": ["x"], "answer_start": [0]}}],
     "does not stand at character 0"),
    ("question_answering", [[1]], "one JSON object per line"),
])  # fmt: skip
def test_bad_lines_are_named(tmp_path: Path, task: str, records: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        written(tmp_path, task, records)
    assert not list(tmp_path.glob("out_*.bin"))


def test_the_command_prints_the_lines_of_the_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a", "label": "x"}\n\n{"text": "b", "label": "y"}\n')
    arguments = ["--task", "sequence_classification", "--input", str(tmp_path / "in.jsonl"), "--seq-length", "8"]
    arguments += ["--output-prefix", str(tmp_path / "new" / "p"), "--tokenizer-type", "CharLevelTokenizer"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "2 documents" in said
    assert 'label_names: ["x", "y"]' in said
    np.testing.assert_array_equal(IndexedDataset(tmp_path / "new" / "p_label_document").sizes, [2, 2])
