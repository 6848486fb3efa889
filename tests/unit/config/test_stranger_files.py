"""Files as strangers bring them: other programs' names, other formats, slips that look right, YAML's own traps.

What stands here was written for the test; the habits are those of upstream's users over the years.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.common.errors import ConfigError
from megatron.config import load
from megatron.config.other_names import OTHER_NAMES
from megatron.config.schema import FIELDS
from megatron.config.schema.base import Block
from megatron.config.update_rule import AdamParams
from tests.unit.config.test_hostile_files import BASE, DIALECT

Write = Callable[[str, str], Path]

# What stands after BASE, and what is said of it after `file:`.
MISTAKES = [
    # Other programs' names.
    ("micro_batch_size: 4\n", "6: unknown key micro_batch_size. Here it is train_micro_batch_size_per_gpu."),
    ("learning_rate: 1e-4\n", "6: unknown key learning_rate. Here it is optimizer.params.lr."),
    ("n-head: 4\n", "6: unknown key n_head. Here it is num_attention_heads."),
    ("zero_allow_untested_optimizer: true\n", "6: unknown key zero_allow_untested_optimizer. It is DeepSpeed's, and "),
    ("pipeline: {seed_layers: false}\n", "6: unknown key pipeline. It is DeepSpeed's: write it into "),
    ("optimizer.params.lr: 1e-4\n", "6: unknown key optimizer.params.lr. Dots reach into blocks on the command line"),
    ("training: {train_iters: 3, lr: 1}\n", "6: unknown key training. Keys stand in no sections: write train_iters at"),
    ("Seed: 3\n", "6: unknown key Seed. Did you mean seed?"),
    ("seed : {x: 1}\n'seed ': 2\n", "7: unknown key seed . Did you mean seed?"),
    # Characters that look like others, or like nothing.
    ("s\u0435ed: 3\n", "6: unknown key s\u0435ed. Its name holds U+0435 CYRILLIC SMALL LETTER IE. Did you mean seed?"),
    ("\u201cseed\u201d: 3\n", "Its name holds U+201C LEFT DOUBLE QUOTATION MARK"),
    ("see\u200bd: 3\n", "Its name holds U+200B ZERO WIDTH SPACE. Did you mean seed?"),
    ("seed:\u00a03\n", "6: not valid YAML: could not find expected ':'. The line holds U+00A0 NO-BREAK SPACE"),
    # YAML's traps.
    ("seed: 010\n", "6: seed = 010: a number that begins with 0 is read as octal by some. Write 8 or 10, or quote"),
    ("seed: 09\n", "6: seed = 09: a number that begins with 0 is read as octal by some. Write 9, or quote it"),
    ("wandb_project: no\n", "6: wandb_project = false must be text. YAML takes yes, no, on, off, true and false for"),
    ("<<: 3\n", "6: `<<` takes a block, as in `<<: *name`."),
    ("optimizer: &o\n  type: Adam\n  params: *o\n", "6: optimizer.params holds itself: `*name` stands inside what"),
    ("~: 3\n", "6: a key is missing before the colon."),
    ("'': 3\n", "6: a key is missing before the colon."),
    ("extra_save_iters: " + "[" * 3000 + "]" * 3000, "6: lists and blocks stand inside each other, more than 50"),
    ("optimizer: " + "{a: " * 3000 + "1" + "}" * 3000, "6: lists and blocks stand inside each other, more than 50"),
    (
        "a: &a [1,1,1,1,1,1,1,1,1]\n"
        + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)),
        ": the file holds more than 100,000 values once every `*name` is replaced by what it repeats.",
    ),
    # Values that were meant for something else.
    ("fp16: true\n", "6: fp16 = true must be a block of `key: value` lines. Write precision: fp16, or {enabled: true}"),
    ("zero_optimization: 1\n", "6: zero_optimization = 1 must be a block of `key: value` lines. Write {stage: 1}."),
    ("optimizer: {params: {betas: 0.9}}\n", "6: optimizer.params.betas = 0.9 must be a list. Write [0.9, 0.95]."),
    ("optimizer: {params: {betas: [0.9]}}\n", "6: optimizer.params.betas = [0.9] must hold two numbers, as [0.9, "),
    (
        "optimizer: {params: {lr: auto}}\n",
        '6: optimizer.params.lr = "auto" must be a number. Other programs fill it in',
    ),
    ("train_batch_size: auto\n", '6: train_batch_size = "auto" must be a whole number. Runs are not tuned by trial'),
    ("fp16: {enabled: auto}\n", '6: fp16.enabled = "auto" must be true or false. Other programs fill it in.'),
    ("seed: 3,\n", '6: seed = "3," must be a whole number. Remove the comma: lines outside of braces end without.'),
    (
        'vocab_file: "C:\\data"\n',
        "6: not valid YAML: found unknown escape character. A backslash in double quotes begins",
    ),
    ("seed: 3 // mine\n", '6: seed = "3 // mine" must be a whole number. Comments begin with #.'),
    ("min_lr: 0,0001\n", '6: min_lr = "0,0001" must be a number. Write 0.0001.'),
    ("launcher: torchrun\n", "It starts train.py itself, without deepy.py (docs/clusters.md). Remove the key."),
    ("hostfile: /no/such\n", "6: hostfile = /no/such cannot be read (No such file or directory). Write a line `host"),
    ("train_data_paths: [null]\n", "6: train_data_paths.0 = null must be text."),
    ("data_path: a\ntrain_label_data_paths: [b]\n", "7: train_label_data_paths needs train_data_paths, not data_path"),
    ('finetune: true\nload: ""\n', "6: finetune = true needs load: the folder that holds the checkpoint. Set load."),
]


def messages(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load([path])
    return str(caught.value).split("\n")


@pytest.mark.parametrize(("text", "message"), MISTAKES, ids=lambda text: re.sub(r"\W+", "_", text[:30]))
def test_the_mistake_is_named_and_placed(write: Write, text: str, message: str) -> None:
    path = write("my.yml", BASE + text)
    found = messages(path)
    assert any(message in line for line in found), found
    assert all(line.startswith(f"{path}:") for line in found)


# Whole files, and what is said of each after its name.
OTHER_FILES = [
    ("", ": no model is given: num_layers, hidden_size, num_attention_heads, seq_length are missing. Name a model's"),
    ("# later\n", ": no model is given"),
    ("num_layers = 2\nhidden_size = 64\n", ":1: holds a single value, not `key: value` pairs. Write one `key: value` "),
    ("[model]\nnum_layers: 2\n", ":1: not valid YAML: did not find expected <document start>. Keys stand in no sectio"),
    ("```yaml\nseed: 2\n```\n", ":1: not valid YAML: found character that cannot start any token. This is Markdown."),
    ('{\n "seed": 2,\n}\n"norm": "rmsnorm"\n', ":4: not valid YAML: did not find expected <document start>. The brack"),
    ('{\n "seed": 2,,\n}\n', ":2: not valid YAML: did not find expected node content. A comma is too many."),
    ('{"model_type": "gpt_neox", "architectures": []}', ": is the configuration of a Hugging Face model."),
]


@pytest.mark.parametrize(("text", "message"), OTHER_FILES)
def test_a_file_of_another_kind_is_told_once(write: Write, text: str, message: str) -> None:
    path = write("my.yml", text)
    found = messages(path)
    assert len(found) == 1
    assert found[0].startswith(f"{path}{message}")


def test_slips_of_syntax_do_not_hide_what_stands_behind_them(write: Write) -> None:
    text = BASE + "fp16:\n\tenabled: true\nlog_interval:5\nwarmup = 0.1\nseed: 3 // mine\nsplt: 1,2,3\nmin_lr: 1k\n"
    path = write("my.yml", text)
    found = messages(path)
    assert [line.removeprefix(f"{path}:").partition(":")[0] for line in found] == ["7", "8", "9", "10", "11", "12"]
    braces = (
        '{\n "num_layers": 2\n "hidden_size": 64\n "norm": "rmsnrm",\n "num_attention_heads": 4\n "seq_length": 32\n}'
    )
    found = messages(write("b.yml", braces))
    assert [line.partition("b.yml:")[2][0] for line in found] == ["2", "3", "4", "5"]
    assert "rmsnorm" in found[2]
    # What is not sure ends it, once.
    found = messages(write("c.yml", braces[:-1]))
    assert [line.partition("c.yml:")[2][0] for line in found] == ["2", "3", "1"]
    tabs = write("d.yml", BASE + "optimizer:\n\ttype: Adam\n\tparams:\n\t\tlr: fast\n")
    assert [line.partition("d.yml:")[2][0] for line in messages(tabs)] == ["7", "9"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("seed: 3".encode("utf-16"), ": is UTF-16 text. Save it as UTF-8."),
        (b"\x1f\x8b\x08\x00\x00", ": is a gzip file. Unpack it."),
        (b"\x80\x04\x95\x00", ": is a pickle, not text."),
        (b"seed: 3\nnorm: caf\xe9\n", ":2: is not UTF-8 text (byte 17). Save it as UTF-8."),
    ],
)
def test_bytes_that_are_no_text(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "my.yml"
    path.write_bytes(content)
    assert messages(path)[0].startswith(f"{path}{message}")


def test_names_that_are_nearly_right_give_one_message_each(write: Write) -> None:
    path = write("my.yml", "num_layer: 2\nhiden_size: 64\nnum_heads: 4\nseq_len: 32\n")
    assert [line.rpartition(" ")[2].rstrip("?.") for line in messages(path)] == [
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "seq_length",
    ]


def test_every_other_name_leads_to_a_key() -> None:
    for other, name in OTHER_NAMES.items():
        key, _, inner = name.partition(".")
        assert key in FIELDS, other
        assert other not in {name for name in FIELDS if name != other} or other in ("ffn_dim",), other
        if inner.startswith("params."):
            assert inner.removeprefix("params.") in AdamParams.model_fields
        elif inner:
            block = next(part for part in FIELDS[key].annotation.__args__ if issubclass(part, Block))  # type: ignore[union-attr]
            assert inner in block.model_fields


def test_sizes_that_no_machine_has_are_refused_at_once(write: Write) -> None:
    path = write("my.yml", BASE.replace("num_layers: 2", "num_layers: 100000000"))
    assert messages(path) == [f"{path}:1: num_layers = 100000000 must be at most 10000."]


def test_old_spellings_and_empty_values_load(write: Write) -> None:
    assert load([write("rope.yml", BASE + "pos_emb: rope\n")], devices=1).model.pos_emb == "rotary"
    text = BASE + 'save: out\nsave-interval: 100\nload: ""\nzero_optimization: {stage: null, overlap_comm: true}\n'
    config = load([write("my.yml", text + "optimizer: {type: null, params: {lr: 3e-4, eps: null}}\n")], devices=1)
    assert config.checkpoint.checkpoint_factor == 100
    assert config.checkpoint.load is None
    assert config.optimizer.lr == 3e-4
    assert config.optimizer.eps == 1e-8
    assert any(warning.endswith("optimizer.type is not set; adam is used") for warning in config.warnings)


def test_a_plan_needs_no_hostfile_of_another_machine(write: Write) -> None:
    path = write("my.yml", BASE + "hostfile: /job/elsewhere\nmodel_parallel_size: 2\n")
    config = load([path], planning=True)
    assert config.parallel.world_size == 2
    assert any("hostfile = /job/elsewhere is not here; planning for 2 processes" in line for line in config.warnings)


TOKENS = [
    *"{}[],:-#&*!|>'\"%@`?\t\n ~",
    *("\r\n", "- ", ": ", "<<: ", "&a ", "*a", "!!int ", "!x ", "---\n", "...\n", "null", "true", "0x", "1e", "010"),
    *("\ufeff", "\u00a0", "\u2028", "\x00", "\x85", "é", "num_layers: 3\n", "optimizer: ", '"stage": ', "stage"),
]
MUTATION = st.tuples(st.integers(0, 5000), st.integers(0, 40), st.lists(st.sampled_from(TOKENS), max_size=4))


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from([BASE + "optimizer: &a {type: Adam}\n", DIALECT]), st.lists(MUTATION, min_size=1, max_size=4))
def test_a_changed_file_loads_or_every_message_names_the_file(
    tmp_path_factory: pytest.TempPathFactory, text: str, mutations: list[tuple[int, int, list[str]]]
) -> None:
    """Characters left out, tokens put in, parts doubled: no other exception, and no message without a place."""
    for at, length, tokens in mutations:
        at %= len(text) + 1
        text = text[:at] + "".join(tokens) + text[at + length :]
    path = tmp_path_factory.getbasetemp() / "mutated.yml"
    path.write_bytes(text.encode())
    found = [str(path)]
    try:
        load([path], devices=1)
    except ConfigError as error:
        found = str(error).split("\n")
    assert all(line.startswith(str(path)) for line in found), found
