"""One path to a configuration: merging, names, types, overrides, and all problems in one message."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.common.errors import ConfigError, DataError
from megatron.config import Config, load
from tests.unit.config.conftest import TINY

Write = Callable[[str, str], Path]
BASE = "num_layers: 4\nhidden_size: 48\nnum_attention_heads: 6\nseq_length: 32\ntokenizer_type: CharLevelTokenizer\n"


def problems(*files: Path, **overrides: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(files, overrides, devices=1)
    return str(caught.value).split("\n")


def test_all_problems_at_once_each_with_its_line(write: Write) -> None:
    path = write(
        "my.yml",
        "num_layers: 4\nhidden_size: 50\nnum_attention_heads: 6\nnum_kv_heads: 4\nseq_length: 32\n"
        "hiden_dropout: 0.1\nmoe_num_experts: 8\nnorm: batchnorm\ntrain_iters: [3]\nfp16: {enabeld: true}\n",
    )
    found = problems(path)
    expected = {
        2: None,
        3: "num_attention_heads = 6 does not divide hidden_size = 50. Use a divisor of 50 (5 or 10 are nearest), "
        "or set head_dim.",
        4: "num_kv_heads = 4 does not divide num_attention_heads = 6. Use a divisor of 6 (3 or 6 are nearest), "
        "or remove the key for multi-head attention.",
        6: "unknown key hiden_dropout. Did you mean hidden_dropout?",
        7: "moe_num_experts = 8 belongs to mixture of experts, not supported yet. Use a dense model: "
        "moe_num_experts: 1.",
        8: 'norm = "batchnorm" is not one of layernorm, rmsnorm, scalenorm, non_parametric_layernorm, '
        "te_layernorm, te_rmsnorm.",
        9: "train_iters = [3] must be a whole number.",
    }
    for line, text in expected.items():
        if text is not None:
            assert f"{path}:{line}: {text}" in found
    assert any(p.startswith(f"{path}:10: unknown key enabeld in fp16. Did you mean enabled?") for p in found)
    assert len(found) == 7


def test_a_value_that_cannot_be_read_gives_one_message_only(write: Write) -> None:
    assert len(problems(write("my.yml", BASE + "num_kv_heads: many\n"))) == 1


def test_a_key_in_two_files_is_refused_in_either_spelling(write: Write) -> None:
    first, second = write("a.yml", BASE), write("b.yml", "seq-length: 64\n")
    assert problems(first, second) == [f"{second}:1: seq_length is also set in {first}:4. Keep one of the two."]


def test_one_file_given_twice_is_one_mistake(write: Write) -> None:
    path = write("a.yml", BASE)
    assert problems(path, path.parent / "." / "a") == [f"{path}: is given 2 times. Name it once."]


def test_two_files_of_one_name_are_both_kept(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    first, second = tmp_path / "a.yml", tmp_path / "x" / "a.yml"
    first.write_text(BASE)
    second.write_text("seed: 7\n")
    config = load([first, second], devices=1)
    assert [file.text for file in config.files] == [BASE, "seed: 7\n"]
    assert config.training.seed == 7


def test_overrides_win_and_reach_into_blocks(write: Write) -> None:
    path = write("my.yml", BASE + "optimizer:\n  type: Adam\n  params:\n    lr: 1.0e-3\n    eps: 1.0e-6\n")
    config = load([path], {"optimizer.params.lr": 1e-4, "hidden-size": 96}, devices=1)
    assert (config.optimizer.lr, config.optimizer.eps, config.model.hidden_size) == (1e-4, 1e-6, 96)
    assert config.origin("hidden_size") == "command line (hidden-size)"
    assert "command line" in config.origin("optimizer.params.lr")
    assert config.origin("optimizer.params.eps") == f"{path}:10"
    assert config.origin("seed") == "default"
    assert config.origin("ffn_size") == "derived from 4 * hidden_size"


def test_null_means_unset(tiny: Callable[..., Config]) -> None:
    assert tiny(intermediate_size=None, init_method_std=None).model.init_method_std == 0.02


@pytest.mark.parametrize(
    ("key", "given", "value"),
    [
        ("train_iters", 5e4, 50000),
        ("train_iters", "5e4", 50000),
        ("min_lr", "1e-5", 1e-5),
        ("norm", "RMSNorm", "rmsnorm"),
        ("init_method", "Small_Init", "small_init"),
        ("precision", "BF16", "bfloat16"),
        ("precision", "FP16", "fp16"),
        ("communication_data_type", "bfp16", "bf16"),
        ("communication_data_type", "bf16", "bf16"),
        ("wandb_run_name", 17, "17"),
        ("no_weight_tying", 1, True),
        ("extra_save_iters", [0, 1e3], [0, 1000]),
        ("check_replicas", None, 0),
        ("check_replicas", "1e2", 100),
    ],
)
def test_values_are_brought_to_their_type(tiny: Callable[..., Config], key: str, given: object, value: object) -> None:
    assert tiny(**{key: given}).value(key) == value


@pytest.mark.parametrize(
    ("key", "given", "message"),
    [
        ("num_layers", 2.5, "num_layers = 2.5 must be a whole number."),
        ("num_layers", True, "num_layers = true: true is not a whole number."),
        ("num_layers", 0, "num_layers = 0 must be above 0."),
        ("hidden_dropout", 1, "hidden_dropout = 1 must be below 1."),
        ("seed", "abc", 'seed = "abc" must be a whole number.'),
        ("no_weight_tying", 7, "no_weight_tying = 7: 7 is neither true nor false."),
        ("fp16", 3, "fp16 = 3 must be a block of `key: value` lines."),
        (
            "world_size",
            4,
            "world_size is worked out by the program and cannot be set. Set global_num_gpus, num_gpus or",
        ),
        ("lr", 0.1, "lr is worked out by the program and cannot be set. Set optimizer.params.lr instead."),
        ("batch_size", 4, "Set train_micro_batch_size_per_gpu instead."),
    ],
)
def test_wrong_values_are_refused(refused: Callable[..., str], key: str, given: object, message: str) -> None:
    assert message in refused(**{key: given})


def test_file_names(write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write("my.yml", BASE)
    assert load([path.with_suffix("")], devices=1).files[0].path == str(path)
    assert load(["my"], conf_dir=tmp_path, devices=1).model.num_layers == 4
    with pytest.raises(ConfigError, match=r"no such configuration file.*Did you mean my\.yml"):
        load([tmp_path / "myy"])
    (tmp_path / "configs").mkdir()
    path.rename(tmp_path / "configs" / "my.yml")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"Did you mean configs/my\.yml"):
        load(["my"])


def test_missing_files_are_a_data_error_with_all_of_them(write: Write, tmp_path: Path) -> None:
    text = (
        BASE.replace("CharLevelTokenizer", "HFTokenizer") + f"vocab_file: {tmp_path}/t.json\ndata_path: {tmp_path}/d\n"
    )
    path = write("my.yml", text + "padded_vocab_size: 512\n")
    load([path], devices=1)
    with pytest.raises(DataError) as caught:
        load([path], devices=1, require_files=True)
    assert caught.value.exit_code == 4
    assert f"{path}:6: vocab_file = {tmp_path}/t.json" in str(caught.value)
    assert f"{path}:7: data_path = {tmp_path}/d: {tmp_path}/d.bin and {tmp_path}/d.idx not found." in str(caught.value)


def test_inference_takes_one_stage_and_ignores_the_batch() -> None:
    changes = {"pipe_parallel_size": 2, "train_batch_size": 7, "train_micro_batch_size_per_gpu": 7}
    for recomputation in (
        {"checkpoint_activations": True, "checkpoint_num_layers": 2},
        {"recompute_activations": "full"},
    ):
        config = load([], {**TINY, **changes, **recomputation}, devices=3, inference=True)
        assert (config.parallel.num_stages, config.parallel.data_parallel_size) == (1, 3)
        assert (config.training.recompute, config.training.checkpoint_activations) == ("none", False)
        assert not config.warnings


def test_inference_finds_a_step_in_save_as_well(write: Write) -> None:
    for folder in ("save", "load"):
        config = load([], {**TINY, "iteration": 5, folder: "x"}, devices=1, inference=True)
        assert config.checkpoint.iteration == 5
    with pytest.raises(ConfigError, match="iteration = 5 needs load or save"):
        load([], {**TINY, "iteration": 5}, devices=1, inference=True)
    path = write("my.yml", BASE + "iteration: 5\nsave: x\ncheckpoint_factor: 1\n")
    assert "iteration = 5 needs load:" in problems(path)[-1]


def test_inference_scores_tasks_at_any_layout() -> None:
    changes = {"model_parallel_size": 2, "pipe_parallel_size": 2, "sequence_parallel": True, "eval_tasks": ["a"]}
    assert load([], {**TINY, **changes}, devices=2, inference=True).evaluation.eval_tasks == ["a"]


def test_interactive_generation_runs_one_replica() -> None:
    changes = {**TINY, "cpu_processes": 4, "model_parallel_size": 2, "device": "cpu"}
    assert load([], changes, inference=True).parallel.world_size == 4
    assert load([], {**changes, "text_gen_type": "interactive"}, inference=True).parallel.world_size == 2


def test_never_imports_torch() -> None:
    code = (
        "import sys, megatron.config, megatron.config.plan, megatron.cli.deepy, megatron.launch.worker;"
        "sys.exit(','.join(m for m in ('torch', 'numpy', 'deepspeed', 'transformers') if m in sys.modules) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
