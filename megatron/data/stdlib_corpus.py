"""The corpus that needs no network: the Python sources of the running interpreter's standard library.

A slice of the files is held out: never trained on, used for evaluation only.
Invariant: for one Python version the written files are the same on every machine and at every run.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import sysconfig
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.common.errors import DataError
from megatron.common.files import atomic_write

HELD_OUT_EVERY = 25
_HELD_OUT_MAX_CHARACTERS = 40_000
COMPLETION_ITEMS = 200
_CONTEXT_LINES = 12
_MINIMUM_BYTES = 1_000_000
_LEFT_OUT_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}
# Character tables and help texts: trained on, but they say little about code.
_TABLE_FOLDERS = ("encodings/", "pydoc_data/")
# Files that a build writes differ between machines.
_LEFT_OUT_STARTS = ("_sysconfigdata", "config-")


@dataclass(frozen=True)
class SourceFile:
    """One module: its path in the library and its text."""

    name: str
    text: str


@dataclass(frozen=True)
class StdlibFiles:
    """Where the corpus lies: for training, held out, and the completion task made from what is held out."""

    train: Path
    held_out: Path
    completion: Path

    @classmethod
    def under(cls, data_dir: Path) -> StdlibFiles:
        folder = data_dir / "stdlib"
        return cls(folder / "stdlib.jsonl", folder / "stdlib_heldout.jsonl", folder / "stdlib_completion.jsonl")

    def all(self) -> list[Path]:
        """The three files."""
        return [self.train, self.held_out, self.completion]


def write_stdlib_corpus(data_dir: Path, force: bool = False) -> StdlibFiles:
    """Write the three files; what is there already is kept unless `force`."""
    files = StdlibFiles.under(data_dir)
    if force or not all(file.is_file() for file in files.all()):
        sources = read_stdlib(Path(sysconfig.get_paths()["stdlib"]))
        held_out = choose_held_out(sources)
        names = {source.name for source in held_out}
        # The training file comes last: while it is missing, a second run starts over.
        _write_lines(files.held_out, [_record(source) for source in held_out])
        _write_lines(files.completion, completion_items(held_out, COMPLETION_ITEMS))
        train = [source for source in sources if source.name not in names]
        _write_lines(files.train, [_record(source) for source in _mixed(train)])
    return files


def choose_held_out(sources: Sequence[SourceFile]) -> list[SourceFile]:
    """Every 25th file of code. A very long one stays in training: alone it would decide the score and its time."""
    code = [source for source in sources if not source.name.startswith(_TABLE_FOLDERS)]
    return [s for s in code[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY] if len(s.text) <= _HELD_OUT_MAX_CHARACTERS]


def _mixed(sources: Sequence[SourceFile]) -> list[SourceFile]:
    """An order without meaning, the same everywhere: a split by position then gives parts that are alike."""
    return sorted(sources, key=lambda source: hashlib.sha256(source.name.encode()).digest())


def read_stdlib(folder: Path) -> list[SourceFile]:
    """The library's modules without its test suites, sorted by name.

    Raises: DataError when the interpreter comes without sources (zipped or compiled only).
    """
    sources = []
    for path in sorted(folder.rglob("*.py"), key=lambda p: p.relative_to(folder).as_posix()):
        relative = path.relative_to(folder)
        if _LEFT_OUT_FOLDERS & set(relative.parts[:-1]) or any(p.startswith(_LEFT_OUT_STARTS) for p in relative.parts):
            continue
        try:
            with tokenize.open(path) as stream:
                text = stream.read()
        except (SyntaxError, UnicodeDecodeError):
            continue  # a module whose declared encoding is wrong on purpose
        if text.strip():
            sources.append(SourceFile(relative.as_posix(), text))
    size = sum(len(source.text) for source in sources)
    if size < _MINIMUM_BYTES:
        raise DataError(
            f"the standard library of {sys.executable} ({folder}) holds {len(sources)} source files with {size:,} "
            f"characters; at least {_MINIMUM_BYTES:,} are required. This Python comes without sources (zipped or "
            "compiled only): run prepare_data.py with another Python 3.11-3.13."
        )
    return sources


def completion_items(sources: Sequence[SourceFile], num_items: int, seed: int = 1234) -> list[dict[str, object]]:
    """Multiple-choice items: some lines of code, and four candidates for the line that follows.

    The wrong ones are lines of other files, moved to the true line's indentation, so that the indentation gives nothing
    away. Fields: context (ends with a newline), choices, answer (index of the true one), text (context and true line).
    """
    rng = random.Random(seed)
    candidates = [_completable_lines(source.text) for source in sources]
    usable = [index for index, lines in enumerate(candidates) if lines]
    items: list[dict[str, object]] = []
    if len(usable) < 2:
        return items
    for turn in range(num_items):
        file = usable[turn % len(usable)]
        lines = sources[file].text.split("\n")
        at = rng.choice(candidates[file])
        true = lines[at]
        indentation = true[: len(true) - len(true.lstrip())]
        choices = [true]
        while len(choices) < 4:
            other = rng.choice([index for index in usable if index != file])
            line = indentation + sources[other].text.split("\n")[rng.choice(candidates[other])].strip()
            if line not in choices:
                choices.append(line)
        rng.shuffle(choices)
        context = "\n".join(lines[at - _CONTEXT_LINES : at]) + "\n"
        items.append({"context": context, "choices": choices, "answer": choices.index(true), "text": context + true})
    return items


def _completable_lines(text: str) -> list[int]:
    lines = text.split("\n")
    return [
        index
        for index in range(_CONTEXT_LINES, len(lines))
        if 10 <= len(lines[index].strip()) <= 100 and lines[index - 1].strip() and lines[index] == lines[index].rstrip()
    ]


def _record(source: SourceFile) -> dict[str, object]:
    return {"text": source.text, "meta": {"file": source.name}}


def _write_lines(path: Path, records: Sequence[dict[str, object]]) -> None:
    with atomic_write(path) as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
