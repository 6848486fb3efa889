"""`load` pointing at an upstream GPT-NeoX checkpoint: fine-tuning, generation and export start from it as it lies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint import open_checkpoint
from megatron.cli.convert_neox_to_hf import main as convert_neox_to_hf
from megatron.cli.export_to_gpt_neox import main as export_to_gpt_neox
from megatron.cli.generate import main as generate
from megatron.common.errors import CheckpointError
from megatron.config import load
from megatron.convert.export import export_checkpoint
from megatron.convert.neox_export import export_neox
from megatron.model.from_config import model_spec
from tests.integration.run_cases import checkpoint_tensors, train_run, write_config
from tests.pool import RankFailure

Ranks = Callable[..., list[Any]]


def _trained(ranks: Ranks, folder: Path, tp_size: int, with_layer_files: bool) -> Path:
    """A short run's checkpoint in upstream's layout, under `folder`/upstream."""
    config = write_config(folder, "native", train_iters=4)
    ranks(train_run, 1, str(config))
    reader, spec = open_checkpoint(folder / "native"), model_spec(load([config]))
    export_neox(
        reader,
        spec,
        folder / "upstream",
        dtype=torch.float32,
        tp_size=tp_size,
        with_layer_files=with_layer_files,
    )
    return folder / "upstream"


@pytest.mark.parametrize(
    ("world_size", "with_layer_files", "layout"),
    [
        (1, True, {}),
        (2, False, {"model_parallel_size": 2}),
        (4, True, {"model_parallel_size": 2, "pipe_parallel_size": 2, "precision": "bfloat16"}),
        (2, True, {"zero_optimization": {"stage": 3}}),
    ],
    ids=["one", "tp2", "tp2-pp2-bf16", "zero3"],
)
def test_fine_tuning_from_upstream_is_fine_tuning_from_the_native_checkpoint(
    ranks: Ranks, tmp_path: Path, world_size: int, with_layer_files: bool, layout: dict[str, Any]
) -> None:
    upstream = _trained(ranks, tmp_path, 2, with_layer_files)
    runs = {}
    for name, source in (("from_native", tmp_path / "native"), ("from_upstream", upstream)):
        changes = {"load": str(source), "finetune": True, "train_iters": 3, "checkpoint_factor": 3, **layout}
        config = write_config(tmp_path, name, **changes)
        runs[name] = ranks(train_run, world_size, str(config))[0]
    assert runs["from_upstream"]["start"] == 0
    assert runs["from_upstream"]["losses"] == runs["from_native"]["losses"]
    left, right = (checkpoint_tensors(tmp_path / name) for name in runs)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_fine_tuning_from_a_hugging_face_folder(ranks: Ranks, tmp_path: Path) -> None:
    ranks(train_run, 1, str(write_config(tmp_path, "native", train_iters=2)))
    export_checkpoint(open_checkpoint(tmp_path / "native"), tmp_path / "hf", "fp32")
    layout = {"model_parallel_size": 2, "pipe_parallel_size": 2}
    changes = {"finetune": True, "train_iters": 2, **layout}
    runs = [
        ranks(train_run, 4, str(write_config(tmp_path, name, load=str(tmp_path / source), **changes)))[0]["losses"]
        for name, source in (("from_native", "native"), ("from_hf", "hf"))
    ]
    assert runs[0] == runs[1]
    other = write_config(tmp_path, "other", load=str(tmp_path / "hf"), finetune=True, rotary_pct=1.0)
    with pytest.raises(RankFailure, match=r"rotary_dims: config\.json 4, config 8"):
        ranks(train_run, 1, str(other))


def test_what_upstream_cannot_give_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    upstream = _trained(ranks, tmp_path, 1, True)
    with pytest.raises(RankFailure, match="Set finetune: true"):
        ranks(train_run, 1, str(write_config(tmp_path, "go_on", load=str(upstream))))
    with pytest.raises(RankFailure, match="num_layers = 1"):
        ranks(train_run, 1, str(write_config(tmp_path, "other", load=str(upstream), finetune=True, num_layers=1)))


def test_generation_and_conversion(ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upstream = _trained(ranks, tmp_path, 2, True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("abc\nx\n")
    texts = {}
    for name, source in (("native", tmp_path / "native"), ("upstream", upstream)):
        config = write_config(
            tmp_path,
            f"generate_{name}",
            load=str(source),
            sample_input_file="prompts.txt",
            sample_output_file=f"{name}.jsonl",
            maximum_tokens=5,
        )
        assert generate([str(config)]) == 0
        texts[name] = [line.split('"duration')[0] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    assert texts["native"] == texts["upstream"]
    common = ["--input_dir", str(upstream), "--config_file", str(tmp_path / "native.yml")]
    assert export_to_gpt_neox([*common, "--output_dir", str(tmp_path / "merged"), "--no-pipeline"]) == 0
    assert [path.name for path in (tmp_path / "merged" / "global_step4").glob("*.pt")] == ["mp_rank_00_model_states.pt"]
    assert (tmp_path / "merged" / "global_step4" / "configs" / "native.yml").is_file()
    # That folder says itself what it is.
    own = ["--input_dir", str(tmp_path / "merged")]
    assert export_to_gpt_neox([*own, "--output_dir", str(tmp_path / "divided"), "--tp", "2"]) == 0
    for rank in range(2):
        name = f"global_step4/layer_02-model_{rank:02d}-model_states.pt"
        again, first = (torch.load(folder / name) for folder in (tmp_path / "divided", upstream))
        assert again.keys() == first.keys()
        assert all(torch.equal(again[key], first[key]) for key in first)
    hf = ["--output_dir", str(tmp_path / "hf"), "--precision", "fp32", "--no_save_tokenizer"]
    assert convert_neox_to_hf([*own, *hf]) == 0
    with pytest.raises(CheckpointError, match="does not say its model"):
        export_to_gpt_neox(["--input_dir", str(upstream), "--output_dir", str(tmp_path / "else")])
    assert not (tmp_path / "else").exists()
