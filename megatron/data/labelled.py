"""From labelled JSON Lines to a token file and a label file that runs in parallel to it.

    sequence_classification   {"text": "...", "label": "spam"}
    token_classification      {"tokens": ["He", "left"], "labels": ["O", "O"]}
    question_answering        {"question": "...", "context": "...", "answers": {"text": ["..."], "answer_start": [7]}}

A label stands one place behind its token, for a model's target at a place is what stands at the next one; each
document therefore ends in one token more, which is never an input. Invariant: no document is longer than
seq_length + 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from megatron.common.documents import find_inputs, read_blocks
from megatron.common.errors import DataError
from megatron.common.files import atomic_write_text
from megatron.data.indexed import token_dtype
from megatron.data.indexed_writer import IndexedWriter
from megatron.data.token_dataset import IGNORED_LABEL

LabelledTask = Literal["sequence_classification", "token_classification", "question_answering"]
TASKS: tuple[LabelledTask, ...] = ("sequence_classification", "token_classification", "question_answering")
# As megatron.objectives.labels reads them.
_START, _END = 1, 2


class Coder(Protocol):
    """The part of a tokenizer that is needed here."""

    vocab_size: int
    eod_id: int | None

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass
class LabelledJob:
    """What to read and where to write: `{output_prefix}_{text,label}_document.{bin,idx}` and `_labels.json`.

    labels: names in the order of their numbers; None numbers those that the data holds, sorted.
    """

    task: LabelledTask
    inputs: Sequence[str]
    output_prefix: str
    seq_length: int
    labels: Sequence[str] | None = None
    report: Callable[[str], None] = print


@dataclass
class LabelledTotals:
    """What was read: documents written, those cut at seq_length, those left out because their answer was cut off."""

    documents: int = 0
    cut: int = 0
    left_out: int = 0
    labels: list[str] = field(default_factory=list)


def preprocess_labelled(job: LabelledJob, tokenizer: Coder) -> LabelledTotals:
    """Write the pair. Raises: DataError for a line that is not what the task needs, with its place."""
    files = find_inputs(job.inputs)
    names = list(job.labels) if job.labels is not None else _names(job.task, files)
    if job.task != "question_answering" and len(names) < 2:
        raise DataError(f"{files[0]}: the data holds {len(names)} label: a classification needs two or more")
    numbers = {name: number for number, name in enumerate(names)}
    totals = LabelledTotals(labels=names)
    ending = tokenizer.eod_id if tokenizer.eod_id is not None else 0
    encode = _ENCODERS[job.task]
    with (
        IndexedWriter(f"{job.output_prefix}_text_document", token_dtype(tokenizer.vocab_size)) as texts,
        IndexedWriter(f"{job.output_prefix}_label_document", np.int32) as targets,
    ):
        for where, record in _records(files):
            try:
                ids, labels = encode(record, tokenizer, numbers)
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise DataError(f"{where}: {_complaint(job.task, error)}") from error
            if not ids:
                totals.left_out += 1
                continue
            ids, labels, is_cut = _cut(job, ids, labels)
            totals.cut += is_cut
            if not any(label > 0 if job.task == "question_answering" else label >= 0 for label in labels):
                totals.left_out += 1
                continue
            size = np.array([len(ids) + 1], np.int32)
            texts.add_documents(np.array([*ids, ending], token_dtype(tokenizer.vocab_size)), size)
            targets.add_documents(np.array([IGNORED_LABEL, *labels], np.int32), size)
            totals.documents += 1
        if not totals.documents:
            raise DataError(f"{files[0]}: no document with a label in {len(files)} file(s): nothing written")
    about = {"task": job.task, "labels": names, "seq_length": job.seq_length}
    atomic_write_text(_names_file(f"{job.output_prefix}_label_document"), json.dumps(about, indent=1) + "\n")
    return totals


def _names_file(label_prefix: str) -> Path:
    return Path(f"{label_prefix.removesuffix('_label_document')}_labels.json")


def require_label_names(
    label_prefixes: Sequence[str], names: Sequence[str], task: str, whose: str = "label_names"
) -> None:
    """All of this labelled data means the same by its numbers, and what `names` says, where it says anything.

    whose: who says so, for the message. Label files without their `_labels.json` (made by another program) are taken as
    they are.
    Raises: DataError that names the two that differ.
    """
    known = (whose, list(names)) if names else None
    for prefix in label_prefixes:
        file = _names_file(prefix)
        if not file.exists():
            continue
        try:
            about = json.loads(file.read_text())
            there, made_for = about["labels"], about["task"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{file} is not what preprocess_labelled.py writes: {error}. Write the data anew."
            ) from error
        if made_for != task:
            raise DataError(f"{prefix} was written for task = {made_for}, the configuration says {task}.")
        if known is not None and known[1] != there:
            raise DataError(
                f"{prefix}: its labels are {_shown(there)} ({file}), those of {known[0]} {_shown(known[1])}: the same "
                "number would mean two things. Write the data anew with --labels and the names in one order for all."
            )
        known = known or (prefix, there)


def _shown(names: Sequence[str]) -> str:
    return ", ".join(f"{number} {name}" for number, name in enumerate(names[:8])) + (", ..." if len(names) > 8 else "")


def _records(files: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in files:
        number = 0
        for block in read_blocks(file):
            for line in block.data.splitlines():
                number += 1
                if not line.strip():
                    continue
                where = f"{file}:{number}"
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{where}: no JSON ({error}). One object per line is needed.") from error
                if not isinstance(record, dict):
                    raise DataError(f"{where}: a {type(record).__name__}; one JSON object per line is needed")
                yield where, record


def _names(task: LabelledTask, files: Sequence[Path]) -> list[str]:
    """The labels that the data holds; numbers keep their order and their gaps."""
    if task == "question_answering":
        return []
    found: set[Any] = set()
    for where, record in _records(files):
        value = record.get("label" if task == "sequence_classification" else "labels")
        values = value if isinstance(value, list) else [value]
        if value is None or not all(isinstance(one, str | int) for one in values):
            raise DataError(f"{where}: {_complaint(task, KeyError('label'))}")
        found.update(values)
    if all(isinstance(one, int) for one in found):
        if min(found, default=0) < 0:
            raise DataError(f"{files[0]}: label {min(found)} is negative; number labels from 0, or use names")
        return [str(number) for number in range(max(found, default=-1) + 1)]
    return sorted(map(str, found))


def _of_sequence(record: dict[str, Any], tokenizer: Coder, numbers: dict[str, int]) -> tuple[list[int], list[int]]:
    ids = tokenizer.encode(_text(record["text"]))
    return ids, [IGNORED_LABEL] * (len(ids) - 1) + [_number(record["label"], numbers)] if ids else []


def _of_tokens(record: dict[str, Any], tokenizer: Coder, numbers: dict[str, int]) -> tuple[list[int], list[int]]:
    """The last piece of each word has the word's label: a causal model has not seen the whole word before."""
    words, names = record["tokens"], record["labels"]
    if len(words) != len(names):
        raise ValueError(f"{len(words)} tokens and {len(names)} labels")
    ids, labels = list[int](), list[int]()
    for place, (word, name) in enumerate(zip(words, names, strict=True)):
        pieces = tokenizer.encode(f" {_text(word)}" if place else _text(word))
        ids += pieces
        labels += [*[IGNORED_LABEL] * (len(pieces) - 1), _number(name, numbers)][: len(pieces)]
    return ids, labels


def _of_question(record: dict[str, Any], tokenizer: Coder, numbers: dict[str, int]) -> tuple[list[int], list[int]]:
    """The tokens that hold the first and the last character of the (first) answer."""
    text, start = _text(record["answers"]["text"][0]), int(record["answers"]["answer_start"][0])
    question, context = _text(record["question"]), _text(record["context"])
    if not text or context[start : start + len(text)] != text:
        raise ValueError(f"the answer {text!r} does not stand at character {start} of the context")
    whole = f"{question}\n{context}"
    ids = tokenizer.encode(whole)
    if tokenizer.decode(ids) != whole:
        raise ValueError("the tokenizer does not give the text back as it was, so places in it mean nothing")
    begin = len(question) + 1 + start
    labels = [0] * len(ids)
    labels[token_at(ids, begin, tokenizer)] |= _START
    labels[token_at(ids, begin + len(text) - 1, tokenizer)] |= _END
    return ids, labels


_ENCODERS: dict[str, Callable[[dict[str, Any], Coder, dict[str, int]], tuple[list[int], list[int]]]] = {
    "sequence_classification": _of_sequence,
    "token_classification": _of_tokens,
    "question_answering": _of_question,
}


def token_at(ids: Sequence[int], character: int, tokenizer: Coder) -> int:
    """The first token whose text reaches beyond `character`: the one that holds it. By bisection over prefixes."""
    low, high = 0, len(ids) - 1
    while low < high:
        middle = (low + high) // 2
        if len(tokenizer.decode(ids[: middle + 1])) > character:
            high = middle
        else:
            low = middle + 1
    return low


def _cut(job: LabelledJob, ids: list[int], labels: list[int]) -> tuple[list[int], list[int], bool]:
    if len(ids) <= job.seq_length:
        return ids, labels, False
    cut = labels[: job.seq_length]
    if job.task == "sequence_classification":
        cut[-1] = labels[-1]
    elif job.task == "question_answering" and any(labels[job.seq_length :]):
        cut = [0] * job.seq_length  # half an answer is none
    return ids[: job.seq_length], cut, True


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _number(name: Any, numbers: dict[str, int]) -> int:
    if str(name) not in numbers:
        raise ValueError(f"label {name!r} is not among {', '.join(numbers)}")
    return numbers[str(name)]


def _complaint(task: str, error: Exception) -> str:
    needs = {
        "sequence_classification": '"text" and "label" (a name or a number)',
        "token_classification": '"tokens" and "labels", lists of one length',
        "question_answering": '"question", "context" and "answers": {"text": [...], "answer_start": [...]}',
    }
    said = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
    return f"{said}. {task} needs {needs[task]}."
