"""A Hugging Face model, converted by the command: training goes on at its loss, and its checkpoints know where they
came from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

from megatron.checkpoint import Reader, find
from megatron.cli import convert_hf_to_neox, convert_neox_to_hf
from megatron.common.errors import ConfigError
from megatron.config import load
from megatron.convert.foreign import ORIGIN
from megatron.convert.hf_folder import HFWeights
from megatron.engine.distributed import stop_distributed
from megatron.engine.step_guard import accept_finite
from megatron.training import loop
from megatron.training.setup import build_run
from tests.integration.run_cases import write_dataset
from tests.parity.hf_models import MODELS

VOCAB = 512  # CharLevelTokenizer's
# --precision of the conversion -> how near the loss comes to transformers' in fp32, and the key of the run
PRECISIONS = {"fp32": (1e-5, "fp32"), "bf16": (1e-2, "bfloat16"), "fp16": (2e-3, "fp16")}
# ZeRO and tensor-parallel ranks hold the fp32 masters that must follow the loaded weights.
LAYOUTS: list[tuple[str, int, dict[str, Any]]] = [
    ("fp32", 1, {}),
    ("bf16", 1, {}),
    ("fp16", 1, {}),
    ("fp32", 2, {"model_parallel_size": 2}),
    ("bf16", 2, {"model_parallel_size": 2}),
    ("fp16", 2, {"model_parallel_size": 2}),
    ("fp32", 2, {"zero_optimization": {"stage": 1}}),
    ("bf16", 2, {"zero_optimization": {"stage": 1}}),
    ("fp16", 2, {"zero_optimization": {"stage": 1}}),
    ("bf16", 2, {"zero_optimization": {"stage": 2}}),
    ("fp16", 2, {"zero_optimization": {"stage": 2}}),
    ("bf16", 4, {"zero_optimization": {"stage": 1}, "model_parallel_size": 2, "pipe_parallel_size": 1}),
    ("fp32", 2, {"pipe_parallel_size": 2}),
    ("bf16", 2, {"pipe_parallel_size": 2}),
]
QUICK = (LAYOUTS[0], LAYOUTS[1], LAYOUTS[2], LAYOUTS[8], LAYOUTS[11])


def losses_and_batches(config_path: str) -> list[tuple[float, Any, Any]]:
    """Train; loss, tokens [B, S] and labels of every step. In a replica all ranks see the same."""
    run = build_run(load([config_path], devices=int(os.environ["WORLD_SIZE"])))
    step, steps = run.engine.train_step, []

    def watched(batches: Any, learning_rate: float, judge: Any = accept_finite) -> Any:
        result = step(batches, learning_rate, judge)
        steps.append((result.loss, *(torch.cat([getattr(b, key) for b in batches]) for key in ("tokens", "labels"))))
        return result

    run.engine.train_step = watched  # type: ignore[method-assign]
    try:
        loop.train(run)
    finally:
        run.close()
    stop_distributed()
    return steps


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    """A Mistral without a window, which Llama's class computes as well; returned in fp32."""
    import transformers

    keys = {**MODELS["mistral-0.3"][1], "vocab_size": VOCAB, "pad_token_id": 3}
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("mistral", **keys)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter + 0.1 if parameter.dim() == 1 else 8 * parameter)
    model.save_pretrained(tmp_path / "hf")
    return model


def run_file(folder: Path, name: str, model: Path, **changes: Any) -> str:
    """The YAML of the conversion, with what a user adds and changes."""
    values = {
        **yaml.safe_load(model.read_text()), "data_path": str(folder / "text_document"), "split": "8,1,1",
        "tokenizer_type": "CharLevelTokenizer", "save": str(folder / name), "log_dir": str(folder / name),
        "train_batch_size": 4, "train_micro_batch_size_per_gpu": 4, "train_iters": 2, "eval_iters": 0,
        "checkpoint_factor": 2, "lr_decay_style": "constant", "warmup": 0.0, "num_workers": 1,
        "optimizer": {"type": "Adam", "params": {"lr": 1.0e-5}}, **changes,
    }  # fmt: skip
    path = folder / f"{name}.yml"
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return str(path)


@pytest.mark.parametrize(
    ("precision", "world_size", "layout"),
    [pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.full]) for case in LAYOUTS],
)
def test_training_goes_on_at_the_old_loss(
    ranks: Callable[..., list[Any]],
    tmp_path: Path,
    folder: Any,
    precision: str,
    world_size: int,
    layout: dict[str, Any],
) -> None:
    write_dataset(tmp_path)
    tolerance, word = PRECISIONS[precision]
    native, model = tmp_path / "native", tmp_path / "model.yml"
    command = ["--hf-input", str(tmp_path / "hf"), "--output", str(native), "--precision", precision]
    assert convert_hf_to_neox.main([*command, "--config-out", str(model)]) == 0
    assert f"precision: {word} " in model.read_text()
    changes = {"fp16": {"initial_scale_power": 10}} if precision == "fp16" else {}
    replicas = world_size // layout.get("model_parallel_size", 1) // layout.get("pipe_parallel_size", 1)
    batch = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 4 // replicas}
    per_rank = ranks(losses_and_batches, world_size, run_file(tmp_path, "run", model, **changes, **batch, **layout))
    for step, moved in enumerate((0.0, 1e-3)):
        # Rank 0's loss is that of all replicas; the second step's comes after one small update.
        seen = [steps[step][1:] for steps in per_rank[:: world_size // replicas]]
        tokens, labels = (torch.cat(parts) for parts in zip(*seen, strict=True))
        assert len(tokens) == 4
        with torch.no_grad():
            expected = F.cross_entropy(folder(tokens).logits.flatten(0, 1), labels.flatten()).item()
        assert expected > 6.5, "a flat model's loss would be 6.24 whatever its weights are"
        assert per_rank[0][step][0] == pytest.approx(expected, rel=tolerance + moved)
    assert len(per_rank[0]) == 2


def test_a_continued_model_goes_back_as_what_it_was(
    ranks: Callable[..., list[Any]], tmp_path: Path, folder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert_hf_to_neox.main(["--hf-input", str(tmp_path / "hf"), "--output", str(tmp_path / "native")]) == 0
    write_dataset(tmp_path)
    # From the conversion, then from that run, then from the folder as it lies.
    runs: dict[str, dict[str, Any]] = {
        "first": {},
        "second": {"load": str(tmp_path / "first"), "finetune": False, "train_iters": 4},
        "direct": {"load": str(tmp_path / "hf")},
    }
    for name, changes in runs.items():
        config = run_file(tmp_path, name, tmp_path / "native/config.yml", precision="bfloat16", **changes)
        ranks(losses_and_batches, 1, config)
        reader = Reader(find(tmp_path / name))
        assert reader.state[ORIGIN] == {
            "model_type": "mistral", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
        }  # fmt: skip
        assert reader.dtype("head.weight") == torch.float32
    arguments = ["--input_dir", str(tmp_path / "second"), "--output_dir", str(tmp_path / "back")]
    with pytest.raises(ConfigError, match="--config_file is missing"):
        convert_neox_to_hf.main(arguments)
    assert convert_neox_to_hf.main([*arguments, "--no_save_tokenizer", "--config_file", config]) == 0
    assert "needs transformers 4.43 or later: older ones do not know head_dim" in capsys.readouterr().out
    written = json.loads((tmp_path / "back/config.json").read_text())
    assert written["architectures"] == ["MistralForCausalLM"]
    assert (written["bos_token_id"], written["eos_token_id"], written["pad_token_id"]) == (1, 2, 3)
    # What training made of it, in the type of the run: not the stored fp32 of an untouched import.
    assert HFWeights(tmp_path / "back").dtype("lm_head.weight") == torch.bfloat16
