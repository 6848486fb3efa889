"""Soft prompts as PEFT's prompt tuning has them: logits, the prompt's gradient, generation, heads of labels."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megatron.checkpoint import Reader
from megatron.cli.convert_neox_to_hf import main as convert
from megatron.cli.export_to_gpt_neox import main as to_gpt_neox
from megatron.cli.merge_lora import main as merge_lora
from megatron.common.errors import CheckpointError
from megatron.convert.open import open_weights
from megatron.convert.peft_adapter import export_adapter, export_prompt
from megatron.inference.decode import DecodeSettings, decode
from megatron.inference.load import load_model
from megatron.model.build import Transformer, build_model
from megatron.model.spec import LowRank, SoftPrompt, WidthScaling
from tests.parity.hf_models import MODELS, VOCAB, make
from tests.parity.test_task_heads import QUESTION, SEQUENCE, TOKENS, make_with_head
from tests.unit.convert.small_models import save_model, small_model

NUM = 6


def with_prompt(folder: Path) -> Transformer:
    """The model of a Hugging Face folder with a random prompt before it."""
    base = load_model(open_weights(folder, None))
    model = build_model(dataclasses.replace(base.spec, soft_prompt=SoftPrompt(NUM)), seed=2).eval()
    weights = dict(base.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
    return model


@pytest.mark.parametrize("name", ["neox", "gpt2", "gptj", "llama-3", "mistral", "gemma", "falcon-7b", "opt"])
def test_adapters_as_peft_applies_them(tmp_path: Path, name: str) -> None:
    from peft import PeftModel

    theirs = make(name, tmp_path / "hf")
    model = with_prompt(tmp_path / "hf")
    reader = save_model(tmp_path / "tuned", model, tp_size=1)
    folder = tmp_path / "adapter"
    assert export_prompt(reader, folder, dtype=torch.float32, model_type=MODELS[name][0]) == NUM
    tokens = torch.randint(VOCAB, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        plain = theirs(tokens).logits.clone()
    tuned = PeftModel.from_pretrained(theirs, str(folder)).eval()
    their_prompt = tuned.prompt_encoder["default"].embedding.weight.requires_grad_()
    output = tuned(tokens).logits[:, NUM:]
    logits = model.logits(model(tokens))
    torch.testing.assert_close(logits, output, rtol=1e-4, atol=1e-4)
    assert (plain - output).abs().max() > 0.05
    labels = torch.randint(VOCAB, tokens.shape, generator=torch.Generator().manual_seed(4)).flatten()
    for found in (logits, output):
        F.cross_entropy(found.flatten(0, 1), labels).backward()
    prompt = model.get_parameter("soft_prompt.weight")
    torch.testing.assert_close(prompt.grad, their_prompt.grad, rtol=1e-3, atol=1e-6)
    if name in ("neox", "opt"):  # greedy, with PEFT's own way to count positions
        with torch.no_grad():
            mask = torch.ones_like(tokens)
            made = tuned.generate(
                input_ids=tokens, attention_mask=mask, max_new_tokens=9, do_sample=False, eos_token_id=-1
            )
        own = decode(model, tokens.tolist(), DecodeSettings(max_new_tokens=9))
        assert [completion.ids for completion in own] == made[:, -9:].tolist()
    with pytest.raises(CheckpointError, match="is not empty"):
        export_prompt(reader, folder, dtype=torch.float32)


@pytest.mark.parametrize("kind", [SEQUENCE, TOKENS, QUESTION])
def test_heads_of_labels_go_along(tmp_path: Path, kind: str) -> None:
    import transformers
    from peft import PeftModel

    theirs = make_with_head("neox", kind, tmp_path / "hf")
    model = with_prompt(tmp_path / "hf")
    reader = save_model(tmp_path / "tuned", model, tp_size=1)
    export_prompt(reader, tmp_path / "adapter", dtype=torch.float32)
    fresh = getattr(transformers, f"AutoModel{kind}").from_config(theirs.config, attn_implementation="eager").eval()
    fresh.gpt_neox.load_state_dict(theirs.gpt_neox.state_dict())  # its head is another one
    tuned = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter")).eval()
    tokens = torch.randint(1, VOCAB, (3, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        output, logits = tuned(tokens), model.logits(model(tokens))
    expected = torch.stack([output.start_logits, output.end_logits], -1) if kind == QUESTION else output.logits
    logits, expected = (logits[:, -1], expected) if kind == SEQUENCE else (logits, expected[:, NUM:])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_no_exporter_drops_a_prompt_in_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small_model(soft_prompt=SoftPrompt(4))
    save_model(tmp_path / "tuned", model)
    source = ["--input_dir", str(tmp_path / "tuned"), "--output_dir"]
    for command, more in ((convert, ["--precision", "fp32", "--no_save_tokenizer"]), (to_gpt_neox, [])):
        with pytest.raises(CheckpointError, match="has a soft prompt of 4 tokens, which this format has no place for"):
            command([*source, str(tmp_path / "out"), *more])
        assert not (tmp_path / "out").exists()
    assert convert([*source, str(tmp_path / "adapter"), "--adapter", "--base-model", "some/model"]) == 0
    assert "PEFT adapter, 4 virtual tokens, fp32" in capsys.readouterr().out
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "some/model"
    assert (
        convert([*source, str(tmp_path / "hf"), "--precision", "fp32", "--no_save_tokenizer", "--without-soft-prompt"])
        == 0
    )
    assert to_gpt_neox([*source, str(tmp_path / "neox"), "--without-soft-prompt"]) == 0
    back = load_model(open_weights(tmp_path / "hf", None))
    own = dict(model.named_parameters())
    assert set(own) - {name for name, _ in back.named_parameters()} == {"soft_prompt.weight"}
    for name, parameter in back.named_parameters():
        assert torch.equal(parameter, own[name][: len(parameter)])
    save_model(tmp_path / "plain", small_model())
    with pytest.raises(CheckpointError, match="no low-rank updates and no soft prompt"):
        convert(["--input_dir", str(tmp_path / "plain"), "--output_dir", str(tmp_path / "x"), "--adapter"])


@pytest.mark.parametrize("task", ["causal_lm", "token_classification"])
def test_a_prompt_for_a_model_with_folded_multipliers(tmp_path: Path, task: str) -> None:
    import transformers
    from peft import PeftModel

    labels = {} if task == "causal_lm" else {"task": task, "num_labels": 3, "head_bias": True}
    mup = WidthScaling(12, 40, 2, 2, 6, embedding_mult=1.4, position_mult=0.7)
    model = small_model(soft_prompt=SoftPrompt(4), mup=mup, **labels)
    save_model(tmp_path / "tuned", model)
    source = ["--input_dir", str(tmp_path / "tuned"), "--output_dir"]
    base = [*source, str(tmp_path / "hf"), "--precision", "fp32", "--no_save_tokenizer", "--without-soft-prompt"]
    assert convert(base) == convert([*source, str(tmp_path / "adapter"), "--adapter"]) == 0
    kind = "CausalLM" if task == "causal_lm" else "TokenClassification"
    theirs = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(tmp_path / "hf")
    tuned = PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).eval()
    tokens = torch.randint(0, 61, (2, 19), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(tokens)), tuned(tokens).logits[:, 4:], rtol=1e-4, atol=1e-5)


def test_low_rank_updates_are_merged_first(tmp_path: Path) -> None:
    lora = LowRank(2, 4.0, ("dense", "query_key_value"))
    model = small_model(soft_prompt=SoftPrompt(4), lora=lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".lora.b"):
                parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(3))
    reader = save_model(tmp_path / "tuned", model)
    for export in (export_prompt, export_adapter):
        with pytest.raises(CheckpointError):
            export(reader, tmp_path / "adapter", dtype=torch.float32)
    with pytest.raises(CheckpointError, match="no one adapter of PEFT"):
        convert(["--input_dir", str(tmp_path / "tuned"), "--output_dir", str(tmp_path / "adapter"), "--adapter"])
    merge_lora(["--input_dir", str(tmp_path / "tuned"), "--output_dir", str(tmp_path / "merged")])
    merged = load_model(Reader(tmp_path / "merged/global_step5"))
    tokens = torch.randint(0, 61, (2, 19), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens), model(tokens), rtol=1e-4, atol=1e-4)
    assert convert(["--input_dir", str(tmp_path / "merged"), "--output_dir", str(tmp_path / "a"), "--adapter"]) == 0
