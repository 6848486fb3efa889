"""A checkpoint with one damaged file, whoever opens it: refused by name, and the one before it is taken."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from megatron.checkpoint import find
from megatron.cli import convert_neox_to_hf, generate
from megatron.common.errors import CheckpointError
from tests.integration.damage_cases import continued_from, damages, put_foreign
from tests.integration.resume_cases import told_run
from tests.integration.run_cases import train_run, write_config

Ranks = Callable[..., list[Any]]
CHANGES = {"train_iters": 4, "eval_iters": 0, "device": "cpu", "maximum_tokens": 2}
KINDS = {"header", "weight", "exp_avg", "exp_avg_sq", "rng", "manifest", "config", "cut short", "gone", "foreign"}


@pytest.fixture(scope="module")
def trained(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that two ranks saved at steps 2 and 4."""
    folder = tmp_path_factory.mktemp("damage")
    ranks(train_run, 2, str(write_config(folder, **CHANGES)))
    return folder


@pytest.mark.parametrize("layout", [{}, {"model_parallel_size": 2}], ids=["same", "tp2"])
def test_training_goes_on_from_the_one_before(ranks: Ranks, trained: Path, layout: dict[str, Any]) -> None:
    config = str(write_config(trained, **CHANGES, **layout))
    first, second = ranks(continued_from, 2, config, 4, len(layout), timeout=200)
    assert {result["kind"] for result in first} == KINDS
    assert len({result["path"] for result in first}) == 4, "every file there is"
    instead = f"warning: loading {trained}/run/global_step2 instead\n"
    for result, other in zip(first, second, strict=True):
        assert (result["step"], other["step"]) == (2, 2), result
        # Whichever rank meets it, rank 0 says it.
        assert f"warning: {result['told']}" in result["said"]
        assert instead in result["said"]
        assert "warning" not in other["said"]
        assert "continuing from" in result["said"]
    assert find(trained / "run").step == 4, "all is as it was"


def test_generation_and_export_use_the_one_before(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    root, config = trained / "run", str(write_config(trained, **CHANGES, text_gen_type="unconditional", num_samples=1))
    options = ["--no_save_tokenizer", "--precision", "fp32"]
    assert (
        convert_neox_to_hf.main(["--input_dir", str(root / "global_step2"), "--output_dir", "expected", *options]) == 0
    )
    expected = load_file("expected/model.safetensors")
    for seed, damage in enumerate(damages(root, 4, seed=7)):
        is_noticed = damage.is_weight
        step = 2 if is_noticed else 4
        with damage.done_to(root):
            assert generate.main([config]) == 0
            output = "".join(capsys.readouterr())
            assert f"{root}/global_step{step} (step {step})" in output, damage.kind
            assert (damage.told in output) == is_noticed
            if seed % 3:
                continue
            shutil.rmtree("out", ignore_errors=True)
            assert convert_neox_to_hf.main(["--input_dir", str(root), "--output_dir", "out", *options]) == 0
            output = "".join(capsys.readouterr())
            assert (damage.told in output) == is_noticed
        weights = load_file("out/model.safetensors")
        assert all(weights[name].equal(expected[name]) for name in expected) == is_noticed


def test_a_damaged_pointer_is_said(ranks: Ranks, trained: Path) -> None:
    pointer = trained / "run" / "latest"
    whole = pointer.read_bytes()
    pointer.write_bytes(bytes([whole[0] ^ 64]) + whole[1:])
    (result,) = ranks(told_run, 1, str(write_config(trained, **CHANGES)))
    pointer.write_bytes(whole)
    assert result["start"] == 4
    assert f"warning: {pointer} is damaged: it names no checkpoint" in result["said"]


def test_another_programs_folder_is_passed_over_and_damage_everywhere_refused(
    ranks: Ranks, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    put_foreign(tmp_path / "run" / "global_step4")
    config = str(write_config(tmp_path, **{**CHANGES, "train_iters": 3}))
    (result,) = ranks(told_run, 1, config)
    assert result["start"] == 2, result
    assert "global_step4 holds no manifest.json: it is not a complete checkpoint of this program" in result["said"]
    # What was asked for by its step is not replaced by another; and where nothing is whole, nothing begins anew.
    shutil.rmtree(tmp_path / "run")
    shutil.copytree(trained / "run", tmp_path / "run")
    for step in (2, 4):
        path = tmp_path / "run" / f"global_step{step}" / "manifest.json"
        path.write_bytes(path.read_bytes()[:-2])
        (result,) = ranks(told_run, 1, str(write_config(tmp_path, **CHANGES, iteration=4)))
        assert ("global_step4/manifest.json is damaged" in str(result["error"])) == (step == 4)
    (result,) = ranks(told_run, 1, str(write_config(tmp_path, **CHANGES)))
    assert "holds no complete checkpoint" in result["error"]
    assert "global_step2/manifest.json is damaged" in result["error"]
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        generate.main([config])
