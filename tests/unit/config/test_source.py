"""Files into values with lines: numbers as people write them, duplicates refused, JSON too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.common.errors import ConfigError
from megatron.config.source import parse_source, parse_value, read_source


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5e4", 5e4),
        ("0.97e-4", 0.97e-4),
        ("1.", 1.0),
        (".5", 0.5),
        ("-3", -3),
        ("1_000", 1000),
        ("0x10", 16),
        ("True", True),
        ("no", False),
        ("null", None),
        ("~", None),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("969,30,1", "969,30,1"),
        ("'1e-4'", "1e-4"),
        ('"true"', "true"),
        ("[1, 2,]", [1, 2]),
        ("{a: 1e3,}", {"a": 1e3}),
        ('[[["flash"], "all"]]', [[["flash"], "all"]]),
    ],
)
def test_value(text: str, value: object) -> None:
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_lines_of_nested_keys_in_upstream_style() -> None:
    text = '# top\n{\n  "num-layers": 2,\n  "optimizer": {\n    "type": "Adam",\n    "params": {\n'
    text += '      "lr": 1e-4,\n    }\n  },\n}\n'
    source = parse_source("my.yml", text)
    assert source.values == {"num_layers": 2, "optimizer": {"type": "Adam", "params": {"lr": 1e-4}}}
    assert source.lines["num_layers"] == 3
    assert source.lines["optimizer.params.lr"] == 7
    assert source.problems == []


def test_duplicates_in_one_file_name_both_lines_and_spellings() -> None:
    source = parse_source(
        "my.yml", "num-layers: 2\nseq_length: 4\nnum_layers: 3\nfp16:\n  enabled: true\n  enabled: false\n"
    )
    assert source.values["num_layers"] == 2
    assert [problem.split(":")[1] for problem in source.problems] == ["3", "6"]
    assert "num-layers" in source.problems[0]
    assert "line 1" in source.problems[0]


def test_merge_key_fills_in_what_is_not_said() -> None:
    source = parse_source("my.yml", "base: &b {lr: 1, eps: 2}\nfp16:\n  <<: *b\n  lr: 3\n")
    assert source.values["fp16"] == {"lr": 3, "eps": 2}


def test_json_with_tabs(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{\n\t"hidden-size":\t64,\n\t"betas": [0.9, 1e-1]\n}\n')
    assert read_source(path).values == {"hidden_size": 64, "betas": [0.9, 0.1]}


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(-1e6, 1e6)
    | st.text("abc xyz:#-{}'", max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc_", min_size=1, max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.text("abc_", min_size=1, max_size=4), JSON, max_size=4))
def test_any_json_reads_as_json_does(content: dict[str, object]) -> None:
    assert parse_source("a.json", json.dumps(content)).values == content


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- 1\n- 2\n", "my.yml:1: holds a list"),
        ("hello", "my.yml:1: holds a single value"),
        ("a: [1, 2\nb: 3\n", "my.yml:1: not valid YAML"),
        ("a:\n\tb: 1\n- c\n", "The line holds a tab"),
    ],
)
def test_what_is_not_a_mapping_is_refused_with_its_line(text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=r"my\.yml") as caught:
        parse_source("my.yml", text)
    assert expected in str(caught.value)


def test_empty_file_holds_nothing() -> None:
    assert parse_source("my.yml", "# nothing\n").values == {}


def test_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yml"
    path.write_bytes(b"a: \xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_source(path)
