"""tools/ckpts/convert_neox_to_hf.py from the outside."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron.cli.convert_neox_to_hf import main
from megatron.common.errors import CheckpointError, ConfigError
from megatron.tokenizer.build import make_tokenizer
from tests.unit.convert.small_models import save_model, small_model

ROOT = Path(__file__).parents[3]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with run.yml, tokenizer.json and checkpoints/."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|endoftext|>", "<|padding|>"]
    library.train_from_iterator([""], trainers.BpeTrainer(special_tokens=specials, initial_alphabet=alphabet))
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "run.yml").write_text(
        "num_layers: 3\nhidden_size: 48\nnum_attention_heads: 4\nseq_length: 40\nmax_position_embeddings: 40\n"
        f"train_micro_batch_size_per_gpu: 1\nbf16: {{enabled: true}}\ntokenizer_type: HFTokenizer\n"
        f"vocab_file: {tmp_path / 'tokenizer.json'}\ntrain_iters: 1\npos_emb: rotary\n"
    )
    fingerprint = make_tokenizer("HFTokenizer", str(tmp_path / "tokenizer.json")).fingerprint
    model = small_model(vocab_size=258, padded_vocab_size=384)
    save_model(tmp_path / "checkpoints", model, step=5, facts={"tokenizer": fingerprint})
    return tmp_path


def arguments(run: Path, *more: str) -> list[str]:
    own = ["--input_dir", str(run / "checkpoints"), "--output_dir", str(run / "hf")]
    return [*own, "--config_file", str(run / "run.yml"), *more]


def test_the_command_writes_what_transformers_loads(run: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/ckpts/convert_neox_to_hf.py"), *arguments(run)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=run, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert "checked: transformers' logits equal the native ones" in done.stdout
    assert AutoModelForCausalLM.from_pretrained(run / "hf").dtype == torch.bfloat16, "auto follows the config"
    assert AutoTokenizer.from_pretrained(run / "hf").encode("a<|endoftext|>")[-1] == 0
    done = subprocess.run(command, cwd=run, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == CheckpointError.exit_code
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_without_a_tokenizer_and_by_step(run: Path) -> None:
    save_model(run / "checkpoints", small_model(seed=2), step=9)
    options = ["--no_save_tokenizer", "--precision", "fp32", "--iteration", "5", "--pad-token-id", "7"]
    assert main(arguments(run, *options)) == 0
    model = AutoModelForCausalLM.from_pretrained(run / "hf")
    assert (model.dtype, model.config.vocab_size, model.config.pad_token_id) == (torch.float32, 258, 7)
    assert not (run / "hf" / "tokenizer.json").exists()


def test_bad_input(run: Path) -> None:
    with pytest.raises(ConfigError, match="--config_file is missing"):
        main(arguments(run)[:4])
    with pytest.raises(CheckpointError, match="no checkpoint of step 6; those there: 5"):
        main(arguments(run, "--iteration", "6"))
    text = (run / "tokenizer.json").read_text()
    assert "<|padding|>" in text
    (run / "tokenizer.json").write_text(text.replace("<|padding|>", "<|fill|>"))
    with pytest.raises(CheckpointError, match="not the one that the model was trained with"):
        main(arguments(run))
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="does not exist"):
        main(arguments(run))
    assert not (run / "hf").exists()
