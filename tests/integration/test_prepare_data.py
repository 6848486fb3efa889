"""The data commands as users type them, in processes of their own: corpus, tokenizer, token files, errors, exit
codes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron.data.indexed import IndexedDataset
from megatron.tokenizer.build import make_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TRAIN_TOKENIZER = "megatron/tokenizer/train_tokenizer.py"
PREPROCESS = "tools/datasets/preprocess_data.py"


def run(*arguments: object, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )
    if check:
        assert result.returncode == 0, result.stderr
    return result


def fails(*arguments: object, code: int = 4, **environment: str) -> str:
    result = run(*arguments, check=False, **environment)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ")
    return result.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make quickstart` does up to the token files."""
    data = tmp_path_factory.mktemp("data")
    folder = data / "stdlib"
    run("prepare_data.py", "stdlib", "-d", data)
    run(
        TRAIN_TOKENIZER, "--json_input_dir", folder, "--tokenizer_output_path", folder / "tokenizer.json",
        "--tokenizer_type", "BPE", "-v", 4096,
    )  # fmt: skip
    result = run(
        PREPROCESS, "--input", folder / "stdlib.jsonl", "--output-prefix", folder / "stdlib",
        "--tokenizer-type", "HFTokenizer", "--vocab-file", folder / "tokenizer.json", "--append-eod", "--workers", 2,
    )  # fmt: skip
    assert "MB/s" in result.stdout
    return data


def test_the_stdlib_corpus_becomes_token_files(data: Path) -> None:
    tokenizer = make_tokenizer("HFTokenizer", str(data / "stdlib" / "tokenizer.json"))
    assert tokenizer.vocab_size == 4096
    dataset = IndexedDataset(data / "stdlib" / "stdlib_text_document")
    records = [json.loads(line) for line in (data / "stdlib" / "stdlib.jsonl").read_text("utf-8").splitlines()]
    assert len(dataset) == len(records)
    for index in (0, 17, len(records) - 1):
        assert tokenizer.decode(dataset[index].tolist()) == records[index]["text"] + "<|endoftext|>"


def test_prepare_data_tokenises_too_and_reuses(data: Path) -> None:
    prefix = data / "stdlib" / "stdlib_text_document"
    before = [Path(f"{prefix}{ending}").read_bytes() for ending in (".bin", ".idx")]
    arguments = ("prepare_data.py", "stdlib", "-v", data / "stdlib" / "tokenizer.json")
    assert "up to date" not in run(*arguments, "-f", DATA_DIR=str(data)).stdout
    assert [Path(f"{prefix}{ending}").read_bytes() for ending in (".bin", ".idx")] == before
    stamp = Path(f"{prefix}.bin").stat().st_mtime_ns
    assert "up to date" in run(*arguments, DATA_DIR=str(data)).stdout
    assert Path(f"{prefix}.bin").stat().st_mtime_ns == stamp


def test_counting_and_merging(data: Path, tmp_path: Path) -> None:
    prefix = data / "stdlib" / "stdlib_text_document"
    tokens = IndexedDataset(prefix).num_tokens
    assert f"{tokens:,} tokens" in run("tools/datasets/dataset_token_count.py", prefix).stdout
    for name in "ab":
        for ending in (".bin", ".idx"):
            (tmp_path / f"{name}{ending}").write_bytes(Path(f"{prefix}{ending}").read_bytes())
    run("tools/datasets/merge_datasets.py", "--input", tmp_path, "--output-prefix", tmp_path / "merged")
    merged = IndexedDataset(tmp_path / "merged")
    assert merged.num_tokens == 2 * tokens
    assert merged[len(merged) // 2].tolist() == IndexedDataset(prefix)[0].tolist()


def test_bad_input_is_one_message_with_exit_code_4(data: Path, tmp_path: Path) -> None:
    tokenizer = ("--tokenizer-type", "HFTokenizer", "--vocab-file", data / "stdlib" / "tokenizer.json")
    output = ("--output-prefix", tmp_path / "out")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    assert "bad.jsonl:2" in fails(PREPROCESS, "--input", tmp_path / "bad.jsonl", *output, *tokenizer)
    assert "no such file" in fails(PREPROCESS, "--input", tmp_path / "no.jsonl", *output, *tokenizer)
    missing = ("--tokenizer-type", "HFTokenizer", "--vocab-file", tmp_path / "tokenizer.json")
    assert "train_tokenizer.py" in fails(PREPROCESS, "--input", tmp_path / "bad.jsonl", *output, *missing)
    assert "cannot be trained from" in fails(
        PREPROCESS, "--input", tmp_path / "bad.jsonl", *output, *tokenizer, "--dataset-impl", "cached"
    )
    assert "does not exist" in fails("tools/datasets/dataset_token_count.py", tmp_path / "none")
    assert "no such file" in fails(
        TRAIN_TOKENIZER, "--json_input_dir", tmp_path / "no", "--tokenizer_output_path", tmp_path / "t.json"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl"]


def test_a_corpus_that_cannot_be_fetched_says_how_to_go_on(tmp_path: Path) -> None:
    closed = "http://127.0.0.1:9"
    message = fails(
        "prepare_data.py", "enwik8", "-d", tmp_path, "-t", "CharLevelTokenizer", http_proxy=closed, https_proxy=closed
    )
    assert "enwik8.zip" in message
    assert "by hand" in message
    assert not (tmp_path / "enwik8" / "enwik8.zip").exists()


def test_a_fetched_corpus_is_tokenised_without_network(tmp_path: Path) -> None:
    """A file put where the message says is taken as it is."""
    (tmp_path / "hackernews").mkdir()
    import io
    import tarfile

    content = json.dumps({"text": "hello"}).encode() + b"\n"
    with tarfile.open(tmp_path / "hackernews" / "hn.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("hn.jsonl")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    run("prepare_data.py", "hackernews", "-d", tmp_path, "-t", "CharLevelTokenizer", "--workers", 1)
    dataset = IndexedDataset(tmp_path / "hackernews" / "hackernews_text_document")
    assert dataset[0].tolist() == [*b"hello", 0]


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_leaves_nothing_half_way(tmp_path: Path, stop: signal.Signals) -> None:
    with open(tmp_path / "in.jsonl", "w") as stream:
        for number in range(400_000):
            stream.write(json.dumps({"text": f"{number} " * 10}) + "\n")
    process = subprocess.Popen(
        [
            sys.executable, PREPROCESS, "--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "out",
            "--tokenizer-type", "CharLevelTokenizer", "--workers", "2",
        ],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}[stop], errors
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
