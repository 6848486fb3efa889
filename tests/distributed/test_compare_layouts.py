"""tools/compare_layouts.py: sound layouts pass, a mistake is named with tensor and step, the user's run is left
alone."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.cli.compare_layouts import _parse, main, parse_layout, report, resolve
from megatron.common.errors import ConfigError, DataError
from megatron.config import load
from megatron.data.indexed import IndexedDataset
from megatron.training.comparison import NOISE, compare_traces
from megatron.training.scaled_down import Sizes, scaled_down, write_synthetic_data
from tests.distributed.trace_cases import record_trace
from tests.integration.run_cases import write_config

Ranks = Callable[..., list[Any]]

ROOT = Path(__file__).resolve().parents[2]
CHANGES = {
    "seq_length": 8,
    "padded_vocab_size": 512,
    "train_iters": 6,
    "eval_iters": 0,
    "save": None,
    "load": None,
    "gradient_clipping": 0.0,
}
TP2 = {"model_parallel_size": 2, "sequence_parallel": True}


@pytest.fixture(scope="module")
def traces(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with traces of one run: `first` at tp 2 with sequence parallelism, `second` at dp 2, and mistakes."""
    folder = tmp_path_factory.mktemp("traces")
    config = str(write_config(folder, "run", **CHANGES))
    runs: dict[str, tuple[dict[str, Any], bool]] = {
        "first": (TP2, False),
        "second": ({}, False),
        "broken": (TP2, True),
        "reseeded": ({"seed": 5}, False),
    }
    for name, (overrides, is_broken) in runs.items():
        ranks(record_trace, 2, config, overrides, str(folder / name), 3, [1, 3], is_broken)
    return folder


def test_two_sound_layouts_agree(traces: Path) -> None:
    steps = list(compare_traces(traces / "first", traces / "second"))
    assert [findings[0].step for findings in steps] == [0, 1, 2, 3]
    assert not any(finding.is_beyond for findings in steps for finding in findings)
    kinds = {(finding.step, finding.kind) for findings in steps for finding in findings}
    assert {(1, "exp_avg"), (1, "exp_avg_sq"), (3, "weight"), (0, "initial weight"), (2, "")} <= kinds
    # They did run in another order of sums: something differs.
    assert any(finding.difference > 0 for findings in steps for finding in findings)


def test_an_unreduced_norm_is_named_at_the_first_step(traces: Path) -> None:
    steps = list(compare_traces(traces / "broken", traces / "second"))
    beyond = {finding.name for finding in steps[1] if finding.is_beyond}
    norms = {name for name in beyond if "norm" in name}
    assert "layers.0.input_layernorm.weight" in norms
    # Nothing else: with clipping off the norm's own gradient is all that is wrong at the first step.
    assert beyond - norms <= {
        "gradient norm",
        *(name for name in beyond if name.endswith(("dense.bias", "linear2.bias"))),
    }
    assert not any(finding.is_beyond for finding in steps[0])


def test_other_initial_weights_are_seen_before_the_first_step(traces: Path) -> None:
    (findings, *_) = compare_traces(traces / "reseeded", traces / "second")
    assert {finding.kind for finding in findings if finding.is_beyond} == {"initial weight"}


def test_the_report_tells_where_it_begins(traces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layouts = [parse_layout("tp=2,sp=1"), parse_layout("dp=2")]
    assert report(traces, layouts) == 0
    assert "tp=2,sp=1 and dp=2 train the same model" in capsys.readouterr().out
    (tmp_path / "first").symlink_to(traces / "broken")
    (tmp_path / "second").symlink_to(traces / "second")
    assert report(tmp_path, layouts) == 1
    out = capsys.readouterr().out
    assert "tp=2,sp=1 and dp=2 part at step 1." in out
    listed = out.split("from the loss backwards:")[1]
    assert listed.index("final_norm.weight (exp_avg)") < listed.index("layers.1.")


def test_layouts_are_read() -> None:
    layout = parse_layout("tp=2,pp=4,zero=1,sp=1")
    assert layout.num_processes == 8
    assert layout.overrides() == {
        "model_parallel_size": 2,
        "pipe_parallel_size": 4,
        "zero_optimization.stage": 1,
        "sequence_parallel": True,
    }
    assert parse_layout("dp=3").overrides()["sequence_parallel"] is False


@pytest.mark.parametrize("text", ["tp", "tp=0", "tp=2,tp=4", "ep=2", "tp=two", "", "dp=-1"])
def test_a_layout_that_is_not_one_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not understood"):
        parse_layout(text)


def test_two_layouts_are_needed() -> None:
    with pytest.raises(ConfigError, match="--layout is given 1 times"):
        main(["configs/quickstart.yml", "--layout", "tp=2"])


@pytest.mark.parametrize(
    ("sizes", "tp", "pp", "dp"),
    [
        (Sizes(44, 6144, 64, 64, 24576, 2048, 4), 8, 4, 2),
        (Sizes(32, 4096, 32, 8, 11008, 4096, 1), 2, 4, 1),
        (Sizes(32, 4096, 32, 8, 11008, 4096, 1), 16, 1, 4),
        (Sizes(13, 768, 12, 1, 3072, 100, 7), 4, 3, 5),
        (Sizes(2, 16, 2, 2, 64, 8, 2), 2, 1, 2),
        (Sizes(32, 4096, 32, 8, 11008, 4096, 1, num_virtual_tokens=21), 8, 1, 1),
    ],
)
def test_a_small_model_divides_as_the_large_one(sizes: Sizes, tp: int, pp: int, dp: int) -> None:
    small = scaled_down(sizes, tp, pp, dp)
    heads, kv_heads = small["num_attention_heads"], small["num_kv_heads"]
    assert heads % tp == 0
    assert heads // kv_heads == sizes.num_attention_heads // sizes.num_kv_heads
    assert kv_heads % tp == 0 or tp % kv_heads == 0
    assert kv_heads <= sizes.num_kv_heads
    # More kv heads than ranks, or fewer: as in the large model.
    assert (kv_heads < tp) == (sizes.num_kv_heads < tp)
    assert small["num_layers"] % pp == sizes.num_layers % pp
    assert pp <= small["num_layers"] <= sizes.num_layers
    assert small["intermediate_size"] % tp == 0
    positions = small["max_position_embeddings"]
    assert positions == small["seq_length"] + sizes.num_virtual_tokens
    assert positions % tp == 0 or small["seq_length"] == sizes.seq_length
    assert small["train_batch_size"] % (small["train_micro_batch_size_per_gpu"] * dp) == 0
    assert small["hidden_size"] <= sizes.hidden_size


def test_made_up_data_suffices_and_is_printable(tmp_path: Path) -> None:
    dataset = IndexedDataset(write_synthetic_data(tmp_path, 10, 16))
    tokens = np.concatenate([dataset[index] for index in range(len(dataset))])
    assert tokens.size >= 10 * 17
    assert tokens.min() >= 32
    assert tokens.max() < 127
    assert len(np.unique(tokens)) > 40


def test_both_runs_differ_in_the_layout_alone_and_leave_the_users_files(tmp_path: Path) -> None:
    config = write_config(tmp_path, "run", hidden_dropout=0.1, checkpoint_factor=2)
    options = _parse([str(config), "--layout", "tp=2", "--layout", "dp=4", "--steps", "3", "--device", "cpu"])
    one, other = resolve(options, [parse_layout("tp=2"), parse_layout("dp=4")], tmp_path)
    assert {key for key in _flat(one) if _flat(one)[key] != _flat(other)[key]} == {
        "model_parallel_size",
        "data_parallel_size",
        "world_size",
        "gradient_accumulation_steps",
    }
    assert one.checkpoint.save is one.checkpoint.load is None
    assert one.model.hidden_dropout == 0.0
    assert one.data.data_path == load([str(config)]).data.data_path


def test_micro_batches_are_alike_where_the_configuration_leaves_them_open(tmp_path: Path) -> None:
    """One replica would take all 24 sequences at once, and four cannot."""
    config = write_config(tmp_path, "run", train_micro_batch_size_per_gpu=None, train_batch_size=24)
    texts = ["tp=2", "dp=4"]
    options = _parse([str(config), "--layout", texts[0], "--layout", texts[1], "--device", "cpu"])
    batches = [config.batch for config in resolve(options, [parse_layout(text) for text in texts], tmp_path)]
    assert [batch.train_micro_batch_size_per_gpu for batch in batches] == [6, 6]
    assert [batch.gradient_accumulation_steps for batch in batches] == [4, 1]


@pytest.mark.parametrize("name", ["quickstart", "1-3B", "20B"])
def test_presets_are_scaled_down_without_their_files(tmp_path: Path, name: str) -> None:
    if not (ROOT / "configs" / f"{name}.yml").is_file():
        pytest.fail(f"configs/{name}.yml is gone: take another preset")
    arguments = [str(ROOT / "configs" / name), "--layout", "tp=2,pp=2", "--layout", "dp=2", "--device", "cpu"]
    configs = resolve(_parse([*arguments, "--scale-down"]), [parse_layout("tp=2,pp=2"), parse_layout("dp=2")], tmp_path)
    assert all(config.model.hidden_size <= 128 and config.training.train_iters == 20 for config in configs)


def test_missing_data_without_scaling_down_is_said_before_anything_starts(tmp_path: Path) -> None:
    config = write_config(tmp_path, "run", data_path=str(tmp_path / "nothing"))
    with pytest.raises(DataError, match=r"(?s)nothing.*--scale-down"):
        main([str(config), "--layout", "tp=2", "--layout", "dp=2", "--device", "cpu"])


def test_the_command_from_outside(tmp_path: Path) -> None:
    """Processes through the ordinary launcher, on data and vocabulary of its own."""
    command = [sys.executable, "tools/compare_layouts.py", "configs/quickstart.yml", "--scale-down", "--steps", "2"]
    kept = tmp_path / "kept"
    done = subprocess.run(
        [*command, "--layout", "tp=2", "--layout", "dp=1", "--device", "cpu", "--keep", str(kept)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tp=2 and dp=1 train the same model" in done.stdout
    assert (kept / "first" / "trace.json").is_file()
    assert not list(tmp_path.glob("compare-layouts-*"))


def _flat(config: Any) -> dict[str, Any]:
    return {key: str(value) for key, value in config.to_upstream_dict().items()}


def test_every_pair_of_axes_has_a_key() -> None:
    for first, second in itertools.permutations(["tp", "pp", "dp"], 2):
        assert parse_layout(f"{first}=2,{second}=3").num_processes == 6


def test_the_document_states_the_bounds_that_are_used() -> None:
    text = (ROOT / "docs" / "parallel_equivalence.md").read_text()
    for row, precision in (("fp32", "fp32"), ("bf16", "bfloat16"), ("fp16", "fp16")):
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {row} |")]
        noise = NOISE[precision]
        assert [float(word) for word in line.split("|")[2:6]] == [noise.loss, noise.norm, noise.moment, noise.weight]
