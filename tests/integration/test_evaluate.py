"""evaluate.py from the outside: a checkpoint, a YAML file and local data become a table, a result file and metrics."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron.cli.evaluate import main
from megatron.common.errors import CheckpointError, ConfigError, DataError, MegatronError, Stopped
from megatron.model.build import Transformer
from tests.unit.convert.small_models import save_model
from tests.unit.evaluation import tiny

ROOT = Path(__file__).parents[2]
SCORES = {
    "stdlib_completion_choice": ["acc,none", "acc_norm,none"],
    "stdlib_perplexity": ["word_perplexity,none", "byte_perplexity,none", "bits_per_byte,none"],
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with run.yml, tokenizer.json, checkpoints/ and data/, as training leaves it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA_DIR", "data")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    tokenizer = tiny.tokenizer(tiny.write_tokenizer(tmp_path))
    tiny.write_data(tmp_path / "data")
    save_model(tmp_path / "checkpoints", tiny.model(), step=5, tp_size=2, facts={"tokenizer": tokenizer.fingerprint})
    write_config(tmp_path)
    return tmp_path


def write_config(folder: Path, **changes: Any) -> None:
    values = {
        "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": tiny.MAX_POSITIONS,
        "seq_length": tiny.MAX_POSITIONS, "pos_emb": "rotary", "rotary_pct": 0.25, "gpt_j_residual": True,
        "no_weight_tying": True, "train_micro_batch_size_per_gpu": 3, "tokenizer_type": "HFTokenizer",
        "vocab_file": "tokenizer.json", "load": "checkpoints", "device": "cpu", "log_dir": "logs", "use_wandb": False,
    }  # fmt: skip
    (folder / "run.yml").write_text(json.dumps(values | changes))


def scores(path: Path) -> dict[str, float]:
    found = json.loads(path.read_text())["results"]
    return {f"{task} {key}": found[task][key] for task, keys in SCORES.items() for key in keys}


def test_every_layout_gives_the_same_scores(run: Path) -> None:
    layouts: dict[str, dict[str, Any]] = {
        "alone": {"cpu_processes": 1},
        "replicas": {"cpu_processes": 2},
        "tensor": {"cpu_processes": 2, "model_parallel_size": 2},
        "stages": {"cpu_processes": 2, "pipe_parallel_size": 2},
    }
    found = {}
    for name, layout in layouts.items():
        write_config(run, **layout)
        command = [sys.executable, str(ROOT / "deepy.py"), str(ROOT / "evaluate.py"), "run.yml"]
        command += ["--eval_tasks", "stdlib_completion", "--eval_results_prefix", name]
        done = subprocess.run(command, cwd=run, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
        (file,) = run.glob(f"{name}_eval_results_*.json")
        found[name] = scores(file)
        assert done.stdout.count("bits_per_byte") == 1, "one rank speaks"
        assert f"written: {file.name}" in done.stdout
    assert found["replicas"] == found["stages"] == found["alone"]
    assert found["tensor"] == pytest.approx(found["alone"], rel=1e-5)
    lines = [json.loads(line) for line in (run / "logs/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5] * len(layouts)
    assert lines[0]["eval/stdlib_completion_choice_acc"] == found["alone"]["stdlib_completion_choice acc,none"]


def test_result_file_says_what_was_evaluated(run: Path) -> None:
    assert main(["run.yml", "--eval_tasks", "stdlib_perplexity", "--iteration", "5"]) == 0
    (file,) = run.glob("eval_results_*.json")
    config = json.loads(file.read_text())["config"]
    assert config["model_args"]["checkpoint"] == "checkpoints/global_step5"
    assert config["model_args"]["step"] == 5
    assert config["model_args"]["model_num_parameters"] == sum(p.numel() for p in tiny.model().parameters())
    assert config["batch_size"] == 3


@pytest.mark.parametrize(
    ("changes", "arguments", "kind", "message"),
    [
        ({}, [], ConfigError, r"eval_tasks is not set.*--eval_tasks stdlib_completion"),
        ({}, ["--eval_tasks", "stdlib_compltion"], ConfigError, r"Did you mean stdlib_completion"),
        ({"load": "elsewhere"}, ["--eval_tasks", "stdlib_completion"], CheckpointError, r"elsewhere does not exist"),
        ({"load": None}, ["--eval_tasks", "stdlib_completion"], ConfigError, r"neither load nor save is set"),
        ({}, ["--eval_tasks", "stdlib_completion", "--iteration", "6"], CheckpointError, r"no checkpoint of step 6"),
        ({"vocab_file": "none.json"}, ["--eval_tasks", "stdlib_completion"], DataError, r"none\.json"),
    ],
)
def test_bad_input_is_one_message(
    run: Path, changes: dict[str, Any], arguments: list[str], kind: type[MegatronError], message: str
) -> None:
    write_config(run, **changes)
    before = sorted(run.rglob("*"))
    with pytest.raises(kind, match=message):
        main(["run.yml", *arguments])
    assert sorted(run.rglob("*")) == before


def test_missing_data_is_said_before_the_model_is_loaded(run: Path) -> None:
    (run / "data/stdlib/stdlib_heldout.jsonl").unlink()
    command = [sys.executable, str(ROOT / "evaluate.py"), "run.yml", "--eval_tasks", "stdlib_completion"]
    done = subprocess.run(command, cwd=run, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 4
    assert "prepare_data.py stdlib" in done.stderr
    assert "Traceback" not in done.stderr
    assert "global_step5" not in done.stdout


def test_a_signal_ends_it_after_the_batch_and_nothing_is_written(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    forward, calls = Transformer.forward, list[int]()

    def watched(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(*args, **kwargs)

    monkeypatch.setattr(Transformer, "forward", watched)
    with pytest.raises(Stopped) as stop:
        main(["run.yml", "--eval_tasks", "stdlib_completion"])
    assert (stop.value.exit_code, len(calls)) == (143, 2)
    assert not list(run.glob("*eval_results*"))
    assert capfd.readouterr().err.count("SIGTERM: stopping after this batch; there will be no results") == 1


def test_another_tokenizer_than_in_training_is_refused(run: Path) -> None:
    path = run / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="was trained with another tokenizer"):
        main(["run.yml", "--eval_tasks", "stdlib_completion"])
