"""Token files: upstream's exact bytes, round trips, and damage noticed at opening."""

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from megatron.common.errors import DataError
from megatron.data.indexed import IndexedDataset, bin_path, idx_path, token_dtype
from megatron.data.indexed_writer import IndexedWriter

GOLDEN_IDX = (
    "4d4d4944494458000001000000000000000803000000000000000400000000000000030000000200000004000000000000000000000006000000"
    "000000000a000000000000000000000000000000010000000000000002000000000000000300000000000000"
)
GOLDEN_BIN = "010002000300040005000600070008000900"
GOLDEN_DOCUMENTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]


def write(prefix: Path, documents: list[list[int]], dtype: str = "u2") -> Path:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_documents(np.array(document, dtype), np.array([len(document)]))
    return prefix


def test_writes_the_golden_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a", GOLDEN_DOCUMENTS, token_dtype(50257).str)
    assert idx_path(tmp_path / "a").read_bytes().hex() == GOLDEN_IDX
    assert bin_path(tmp_path / "a").read_bytes().hex() == GOLDEN_BIN


def test_reads_the_golden_bytes(tmp_path: Path) -> None:
    idx_path(tmp_path / "a").write_bytes(bytes.fromhex(GOLDEN_IDX))
    bin_path(tmp_path / "a").write_bytes(bytes.fromhex(GOLDEN_BIN))
    dataset = IndexedDataset(tmp_path / "a")
    assert [dataset[i].tolist() for i in range(len(dataset))] == GOLDEN_DOCUMENTS
    assert dataset.get(2, 1, 2).tolist() == [7, 8]
    assert dataset.document_index.tolist() == [0, 1, 2, 3]
    assert dataset.num_tokens == 9


def test_bulk_and_single_writes_give_the_same_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 60000, size).tolist() for size in (1, 0, 7, 1000, 3)]
    write(tmp_path / "one", documents)
    with IndexedWriter(tmp_path / "bulk", "u2") as writer:
        writer.add_documents(np.concatenate(documents).astype("u2"), np.array([len(d) for d in documents]))
    for path in (bin_path, idx_path):
        assert path(tmp_path / "one").read_bytes() == path(tmp_path / "bulk").read_bytes()
    dataset = IndexedDataset(tmp_path / "one")
    assert [dataset[i].tolist() for i in range(len(dataset))] == documents


@pytest.mark.parametrize(
    ("vocab_size", "name"), [(65499, "uint16"), (65500, "int32"), (2, "uint16"), (200_000, "int32")]
)
def test_token_type_follows_the_vocabulary(vocab_size: int, name: str) -> None:
    assert token_dtype(vocab_size).name == name


def test_reads_the_older_format(tmp_path: Path) -> None:
    sizes, total = [3, 2, 4], 9
    offsets = [0, 3, 5, 9]
    numbers = [*range(4), *offsets, *sizes, 0, 1, 2, 3]
    header = b"TNTIDX\0\0" + struct.pack("<6Q", 1, 4, 4, 3, 3, 4)
    idx_path(tmp_path / "old").write_bytes(header + struct.pack(f"<{len(numbers)}q", *numbers))
    np.arange(1, total + 1, dtype="<i4").tofile(bin_path(tmp_path / "old"))
    dataset = IndexedDataset(tmp_path / "old")
    assert [dataset[i].tolist() for i in range(3)] == GOLDEN_DOCUMENTS
    assert dataset.document_index.tolist() == [0, 1, 2, 3]


def test_merging_keeps_documents_of_several_sequences(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 2], [3]])
    write(tmp_path / "b", [[4], [5, 6], [7]])
    data = bytearray(idx_path(tmp_path / "b").read_bytes())
    # Join the first two sequences of b into one document: boundaries 0, 2, 3.
    data[9 + 1 + 8 + 8 : 9 + 1 + 8 + 16] = struct.pack("<Q", 3)
    idx_path(tmp_path / "b").write_bytes(bytes(data[:-32]) + struct.pack("<3q", 0, 2, 3))
    with IndexedWriter(tmp_path / "c", "u2") as writer:
        for name in "ab":
            writer.add_dataset(IndexedDataset(tmp_path / name))
    merged = IndexedDataset(tmp_path / "c")
    assert [merged[i].tolist() for i in range(5)] == [[1, 2], [3], [4], [5, 6], [7]]
    assert merged.document_index.tolist() == [0, 1, 2, 4, 5]


def test_merging_different_types_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1]], "i4")
    with pytest.raises(DataError, match="int32"), IndexedWriter(tmp_path / "c", "u2") as writer:
        writer.add_dataset(IndexedDataset(tmp_path / "a"))
    assert not idx_path(tmp_path / "c").exists()


@pytest.mark.parametrize("cut", [1, 4, 17])
def test_a_truncated_bin_is_refused_with_both_sizes(tmp_path: Path, cut: int) -> None:
    write(tmp_path / "a", GOLDEN_DOCUMENTS)
    bin_path(tmp_path / "a").write_bytes(bytes.fromhex(GOLDEN_BIN)[:-cut])
    with pytest.raises(DataError, match=rf"a\.bin is cut off: {18 - cut} bytes.*18"):
        IndexedDataset(tmp_path / "a")


def test_a_bin_of_another_run_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", GOLDEN_DOCUMENTS)
    bin_path(tmp_path / "a").write_bytes(bytes(20))
    with pytest.raises(DataError, match="longer than its index"):
        IndexedDataset(tmp_path / "a")


@pytest.mark.parametrize("keep", [0, 5, 12, 33, 60, 93])
def test_a_truncated_idx_is_refused(tmp_path: Path, keep: int) -> None:
    write(tmp_path / "a", GOLDEN_DOCUMENTS)
    idx_path(tmp_path / "a").write_bytes(bytes.fromhex(GOLDEN_IDX)[:keep])
    with pytest.raises(DataError, match=r"a\.idx"):
        IndexedDataset(tmp_path / "a")


def test_wrong_magic_and_version_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", GOLDEN_DOCUMENTS)
    good = bytes.fromhex(GOLDEN_IDX)
    idx_path(tmp_path / "a").write_bytes(b"x" + good[1:])
    with pytest.raises(DataError, match="not a token index"):
        IndexedDataset(tmp_path / "a")
    idx_path(tmp_path / "a").write_bytes(good[:9] + b"\x02" + good[10:])
    with pytest.raises(DataError, match="version 2"):
        IndexedDataset(tmp_path / "a")


def test_a_missing_pair_names_what_is_there(tmp_path: Path) -> None:
    write(tmp_path / "near", GOLDEN_DOCUMENTS)
    with pytest.raises(DataError, match=r"far\.idx does not exist.*near"):
        IndexedDataset(tmp_path / "far")
    with pytest.raises(DataError, match="without its ending"):
        IndexedDataset(tmp_path / "near.bin")
    assert DataError.exit_code == 4


def test_a_failing_write_leaves_the_older_pair_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "a", GOLDEN_DOCUMENTS)
    with pytest.raises(ValueError, match="sizes sum to 9"), IndexedWriter(tmp_path / "a", "u2") as writer:
        writer.add_documents(np.array([1], "u2"), np.array([9]))
    assert len(IndexedDataset(tmp_path / "a")) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_tokens_beyond_the_type_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="70000"), IndexedWriter(tmp_path / "a", "u2") as writer:
        writer.add_documents(np.array([70000]), np.array([1]))


def test_an_empty_dataset_can_be_written_and_read(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "a", []))
    assert len(dataset) == 0
    assert dataset.num_tokens == 0


def test_pickling_reopens_the_files(tmp_path: Path) -> None:
    dataset = pickle.loads(pickle.dumps(IndexedDataset(write(tmp_path / "a", GOLDEN_DOCUMENTS))))
    assert dataset[2].tolist() == GOLDEN_DOCUMENTS[2]


def test_the_fingerprint_sees_tokens_and_boundaries(tmp_path: Path) -> None:
    def fingerprint(documents: list[list[int]]) -> str:
        return IndexedDataset(write(tmp_path / "a", documents)).fingerprint

    first = fingerprint([[1, 2, 3], [4, 5]])
    assert first == fingerprint([[1, 2, 3], [4, 5]])
    assert (
        len({first, fingerprint([[1, 2], [3, 4, 5]]), fingerprint([[1, 2, 3], [4, 6]]), fingerprint([[1, 2, 3]])}) == 4
    )
