"""The network-free corpus: real code, nothing of the held-out files in training, the same at every run."""

import json
from pathlib import Path

import pytest

from megatron.common.errors import DataError
from megatron.data import stdlib_corpus
from megatron.data.stdlib_corpus import SourceFile, StdlibFiles, completion_items, read_stdlib, write_stdlib_corpus


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> StdlibFiles:
    return write_stdlib_corpus(tmp_path_factory.mktemp("data"))


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def names(path: Path) -> list[str]:
    return [record["meta"]["file"] for record in read(path)]  # type: ignore[index]


def test_paths_are_the_documented_ones(files: StdlibFiles) -> None:
    assert [f.name for f in files.all()] == ["stdlib.jsonl", "stdlib_heldout.jsonl", "stdlib_completion.jsonl"]
    assert {f.parent.name for f in files.all()} == {"stdlib"}


def test_corpus_is_megabytes_of_the_library_without_its_tests(files: StdlibFiles) -> None:
    assert files.train.stat().st_size > 3_000_000
    train = names(files.train)
    assert {"argparse.py", "collections/__init__.py", "json/decoder.py"} <= set(train) | set(names(files.held_out))
    assert not [name for name in train if {"test", "tests", "site-packages"} & set(name.split("/")[:-1])]


def test_any_part_of_the_training_file_resembles_the_rest(files: StdlibFiles) -> None:
    """Sorted by name, the last hundredth would be one package, and a split by position would compare unlike things."""
    train = names(files.train)
    assert train != sorted(train)
    packages = {name.split("/")[0] for name in train[-len(train) // 10 :]}
    assert len(packages) > len({name.split("/")[0] for name in train}) / 20


def test_held_out_files_are_not_trained_on(files: StdlibFiles) -> None:
    held_out = names(files.held_out)
    assert len(held_out) >= 10
    assert not set(held_out) & set(names(files.train))
    texts = {record["text"] for record in read(files.train)}
    assert not [record for record in read(files.held_out) if record["text"] in texts]


def test_a_second_run_writes_the_same_bytes(files: StdlibFiles, tmp_path: Path) -> None:
    again = write_stdlib_corpus(tmp_path)
    assert [f.read_bytes() for f in again.all()] == [f.read_bytes() for f in files.all()]


def test_what_is_there_is_kept_unless_forced(files: StdlibFiles, tmp_path: Path) -> None:
    mine = write_stdlib_corpus(tmp_path)
    mine.held_out.write_text("mine")
    write_stdlib_corpus(tmp_path)
    assert mine.held_out.read_text() == "mine"
    write_stdlib_corpus(tmp_path, force=True)
    assert mine.held_out.read_bytes() == files.held_out.read_bytes()


def test_completion_items_are_sound(files: StdlibFiles) -> None:
    items = read(files.completion)
    held_out = [str(record["text"]) for record in read(files.held_out)]
    assert len(items) == 200
    answers = [item["answer"] for item in items]
    assert {answers.count(k) > 20 for k in range(4)} == {True}, "the position gives nothing away"
    for item in items:
        choices, answer = item["choices"], item["answer"]
        assert isinstance(choices, list)
        assert isinstance(answer, int)
        assert len(set(choices)) == 4
        assert item["text"] == str(item["context"]) + choices[answer]
        assert any(str(item["text"]) + "\n" in text for text in held_out)
        assert not any(str(item["context"]) + c + "\n" in t for t in held_out for c in choices if c != choices[answer])
        assert len({len(c) - len(c.lstrip()) for c in choices}) == 1, "neither does the indentation"


def test_completion_needs_two_files_for_its_wrong_lines() -> None:
    lines = "\n".join(f"value_{i} = compute({i})" for i in range(40))
    assert completion_items([SourceFile("a.py", lines)], 5) == []
    assert len(completion_items([SourceFile("a.py", lines), SourceFile("b.py", lines.replace("value", "x"))], 5)) == 5


def test_an_interpreter_without_sources_is_named(tmp_path: Path) -> None:
    (tmp_path / "os.py").write_text("x = 1\n")
    with pytest.raises(DataError, match=r"holds 1 source files.*another Python"):
        read_stdlib(tmp_path)


def test_build_dependent_and_broken_files_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdlib_corpus, "_MINIMUM_BYTES", 0)
    (tmp_path / "test").mkdir()
    for name in ("a.py", "_sysconfigdata__linux.py", "test/test_a.py"):
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe9'\n")
    (tmp_path / "broken.py").write_bytes(b"x = '\xff'\n")
    found = {source.name: source.text for source in read_stdlib(tmp_path)}
    assert sorted(found) == ["a.py", "latin.py"]
    assert "é" in found["latin.py"]
