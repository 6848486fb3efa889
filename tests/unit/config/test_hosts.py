"""Hostfiles and the filters on them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.config.hosts import HostfileError, read_hosts


@pytest.fixture
def hostfile(tmp_path: Path) -> str:
    path = tmp_path / "hosts"
    path.write_text("# cluster\na slots=2\n\nb slots = 3 # slow\nc slots=1\n")
    return str(path)


@pytest.mark.parametrize(
    ("include", "exclude", "num_nodes", "expected"),
    [
        (None, None, -1, {"a": 2, "b": 3, "c": 1}),
        (None, None, 2, {"a": 2, "b": 3}),
        ("b:0,2@c", None, -1, {"b": 2, "c": 1}),
        (None, "a@b:1", -1, {"b": 2, "c": 1}),
        (None, "c:0", -1, {"a": 2, "b": 3}),
    ],
)
def test_filters(
    hostfile: str, include: str | None, exclude: str | None, num_nodes: int, expected: dict[str, int]
) -> None:
    assert read_hosts(hostfile, include, exclude, num_nodes) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=2\na slots=3\n", ":2: host a is named twice"),
        ("a 4\n", ":1: `a 4` is not of the form"),
        ("# none\n", "names no host"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(HostfileError, match=message):
        read_hosts(str(path))


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [("z", None, "host z"), ("a:5", None, "no slot 5"), ("a:x", None, "not of the form"), ("a", "b", "cannot both")],
)
def test_wrong_filters(hostfile: str, include: str | None, exclude: str | None, message: str) -> None:
    with pytest.raises(HostfileError, match=message):
        read_hosts(hostfile, include, exclude)


def test_missing_file() -> None:
    with pytest.raises(HostfileError, match="cannot be read"):
        read_hosts("no/such/file")
