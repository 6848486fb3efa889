"""deepy.py --plan: its flags, what fits and what does not, layouts, and the same for scripts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.cli.deepy import main
from megatron.cli.plan import parse_size
from megatron.common.errors import ConfigError
from megatron.data.indexed_writer import IndexedWriter

ROOT = Path(__file__).resolve().parents[3]
MODEL = """
num_layers: 4
hidden_size: 64
num_attention_heads: 4
seq_length: 32
tokenizer_type: CharLevelTokenizer
train_iters: 100
train_batch_size: 16
precision: bfloat16
optimizer: {type: Adam, params: {lr: 1.0e-3}}
"""
Plan = Callable[..., str]


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Plan:
    """What `deepy.py --plan FLAGS train.py FILE` prints; `more` is added to the small model's file."""
    monkeypatch.chdir(tmp_path)

    def run(*flags: str, more: str = "", file: str = "my.yml", script: str = "train.py") -> str:
        given = {line.partition(":")[0] for line in more.splitlines()}
        kept = [line for line in MODEL.splitlines() if line.partition(":")[0] not in given]
        Path("my.yml").write_text("\n".join([*kept, more]))
        Path(script).write_text("")
        assert main(["--plan", *flags, script, file]) == 0
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80e9), ("80 gib", 80 * 2**30), ("40", 40e9), ("0.5TB", 5e11), ("900 MB", 9e8)]
)
def test_sizes(text: str, size: float) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "80XB", "-1GB", "0", "eighty"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="a size such as 80GB"):
        parse_size(text)


@pytest.mark.parametrize("flag", [["--gpu-memory", "80GB"], ["--peak-tflops", "312"], ["--json"], ["--gpus", "2"]])
def test_flags_that_need_plan(plan: Plan, flag: list[str]) -> None:
    plan()
    with pytest.raises(ConfigError, match="needs --plan"):
        main([*flag, "train.py", "my.yml"])


@pytest.mark.parametrize("flag", ["--gpus", "--gpus-per-node", "--peak-tflops"])
def test_numbers_above_zero(plan: Plan, flag: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag} 0: a number above 0"):
        plan(flag, "0")


def test_it_says_what_fits_and_what_does_not(plan: Plan) -> None:
    assert "fits into 80.00 GB" in plan("--gpu-memory", "80GB")
    more = "device: cpu\nnum_layers: 40\ntrain_micro_batch_size_per_gpu: 16\n"
    ways = json.loads(plan("--json", more=more))["memory_bytes"]["by_recomputation"]
    text = plan("--gpu-memory", f"{(ways['none']['total'] + ways['full']['total']) / 2e6:.0f}MB", more=more)
    assert "DOES NOT FIT into" in text
    assert "too much, most of it activations" in text
    assert "It would fit with recomputation: full" in text


def test_time_needs_a_peak(plan: Plan) -> None:
    assert "--peak-tflops" in plan()
    given, configured = plan("--peak-tflops", "100"), plan(more="peak_theoretical_tflops: 100\n")
    assert "40 % of 100 TFLOP/s" in given
    assert given.split("Time\n")[1] == configured.split("Time\n")[1]
    twice = json.loads(plan("--json", "--peak-tflops", "200"))["time_s"]
    assert json.loads(plan("--json", "--peak-tflops", "100"))["time_s"] == pytest.approx(2 * twice)


def test_bubble(plan: Plan) -> None:
    more = "pipe_parallel_size: 4\ntrain_micro_batch_size_per_gpu: 2\n"
    assert "pipeline bubble: 27.3 %" in plan("--gpus", "4", more=more)  # 3 / (8 + 3)
    assert json.loads(plan("--gpus", "4", "--json", more=more))["bubble"] == 3 / 11


def test_layouts_for_a_number_of_gpus(plan: Plan) -> None:
    text = plan("--gpus", "8", "--gpu-memory", "80GB")
    assert "Layouts for 8 GPUs of 80.00 GB" in text
    assert "pipe_parallel_size: 1" in text
    values: dict[str, Any] = json.loads(plan("--gpus", "8", "--gpu-memory", "80GB", "--json"))
    assert values["memory_bytes"]["fits"] is True
    best, own = values["search"]["best"][0], values["search"]["configured"]
    assert 0 < own["relative_speed"] <= 1
    assert own["layout"]["dp"] == 8
    assert "as configured, pp 1, tp 1, dp 8" in text
    assert best["relative_speed"] == 1.0
    assert best["layout"]["dp"] * best["layout"]["tp"] * best["layout"]["stages"] == 8
    assert text == plan("--gpus", "8", "--gpu-memory", "80GB")


def test_a_layout_that_cannot_run_is_explained_and_replaced(plan: Plan) -> None:
    more = "pipe_parallel_size: 3\nmodel_parallel_size: 2\n"
    text = plan("--gpus", "8", "--gpu-memory", "80GB", more=more)
    assert "As configured, it cannot run on 8 GPUs" in text
    assert "3 * 2 = 6 does not divide the 8 processes" in text
    assert "pipe_parallel_size: 1" in text
    # Without train_batch_size, the batch of the one replica that has room.
    more += "train_batch_size:\ntrain_micro_batch_size_per_gpu: 2\ngradient_accumulation_steps: 12\n"
    assert "train_batch_size: 24\n" in plan("--gpus", "8", "--gpu-memory", "80GB", more=more)
    with pytest.raises(ConfigError, match="does not divide the 8 processes"):
        plan("--gpus", "8", more=more)


def test_other_mistakes_remain_mistakes(plan: Plan) -> None:
    with pytest.raises(ConfigError, match="hiden_size"):
        plan("--gpus", "8", "--gpu-memory", "80GB", more="hiden_size: 3\n")


def test_epochs_of_the_datasets(plan: Plan) -> None:
    def write(prefix: str, documents: int) -> int:
        sizes = np.arange(documents) % 7 + 1
        with IndexedWriter(prefix, np.dtype("<u2")) as writer:
            writer.add_documents(np.ones(sizes.sum(), np.uint16), sizes)
        return int(sizes.sum())

    one, other = write("one", 100), write("other", 31)
    lists = "train_data_paths: [one, other]\nvalid_data_paths: [one]\ntest_data_paths: [one]\n"
    values = json.loads(plan("--json", more=lists + "train_data_weights: [3, 1]\n"))
    tokens = 100 * 16 * 32
    assert [use["tokens"] for use in values["datasets"]] == [one, other]
    assert [use["epochs"] for use in values["datasets"]] == [tokens * 0.75 / one, tokens * 0.25 / other]
    split = json.loads(plan("--json", more='data_path: one\nsplit: "70, 20, 10"\n'))["datasets"][0]
    assert split["documents"] == 70
    assert split["tokens"] == sum(number % 7 + 1 for number in range(70))
    assert "nowhere.idx is not there yet" in plan(more="data_path: nowhere\n")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yml")), ids=lambda path: path.stem)
def test_every_preset_has_a_plan(plan: Plan, path: Path) -> None:
    if path.stem in ("local_setup", "local_setup_wandb", "text_generation"):
        return  # no model of their own
    if path.stem == "quickstart":
        return  # its tokenizer is made first: tests/unit/config/test_presets.py
    text = plan("--gpu-memory", "80GB", "--peak-tflops", "312", file=str(path))
    for words in ("Parameters", "fullest moment", "recompute_activations", "FLOPs per token", "Time", "GB"):
        assert words in text


@pytest.mark.parametrize("script", ["generate.py", "evaluate.py", "eval.py"])
def test_scripts_that_use_a_model_are_planned_without_its_training(plan: Plan, script: str) -> None:
    text = plan("--gpus", "1", "--gpu-memory", "24GB", script=script)
    assert "no optimizer" in text
    assert "optimizer states" not in text
    assert "fits into 24.00 GB" in text
    values = json.loads(plan("--json", script=script))
    assert values["memory_bytes"]["components"]["weights"] == 2 * values["parameters"]["unique"]
    assert "time_s" not in values


def test_a_vocabulary_that_is_not_there_is_assumed(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    more = "tokenizer_type: HFTokenizer\nvocab_file: elsewhere/tokenizer.json\nmodel_parallel_size: 4"
    assert "vocabulary 50,688 rows" in plan("--gpus", "8", "--gpu-memory", "80GB", more=more)
    assert plan("--set", "padded_vocab_size=1024", more=more).count("vocabulary 1,024 rows") == 1
    assert main(["--plan", "train.py", "my.yml"]) == 0
    assert "note: elsewhere/tokenizer.json is not there, which knows the size" in capsys.readouterr().err


def test_the_commands_for_scripts(plan: Plan, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plan(more="device: cpu\ncpu_processes: 2")
    assert main(["--dry-run", "--json", "train.py", "my.yml"]) == 0
    ranks = json.loads(capsys.readouterr().out)["ranks"]
    assert [(one["rank"], one["environment"]["RANK"]) for one in ranks] == [(0, "0"), (1, "1")]
    assert ranks[0]["command"][-4:] == ["-u", "train.py", "--config", "CONFIG.json"]
    with pytest.raises(ConfigError, match="--json needs --plan, or --dry-run without --submit"):
        main(["--json", "train.py", "my.yml"])


def test_the_script_of_a_job_that_would_be_refused_is_shown_with_the_reason(
    plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    plan(more="save: out\ncheckpoint_factor: 10")
    assert main(["--submit", "--dry-run", "--nodes", "2", "--gpus-per-node", "4", "train.py", "my.yml"]) == 0
    shown = capsys.readouterr()
    assert "#SBATCH --nodes=2" in shown.out
    assert "note: the job would be refused: my.yml: no training data." in shown.err
    assert list(Path().glob("logs/jobs/*")) == []
