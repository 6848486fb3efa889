"""Heads of labels there and back, their losses as transformers has them; and low-rank updates as PEFT applies them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint import Reader
from megatron.common.errors import CheckpointError
from megatron.convert.export import export_checkpoint
from megatron.convert.hf_folder import HFWeights
from megatron.convert.import_hf import import_folder
from megatron.convert.open import open_weights
from megatron.convert.peft_adapter import export_adapter
from megatron.inference.load import load_model
from megatron.model.build import build_model
from megatron.model.spec import LowRank
from megatron.objectives.labels import label_loss, span_loss
from tests.parity.hf_models import MODELS, VOCAB, make
from tests.unit.convert.small_models import save_model

SEQUENCE, TOKENS, QUESTION = "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"


def make_with_head(name: str, kind: str, folder: Path, num_labels: int = 3) -> Any:
    """A model of labels, saved; in fp32 and evaluation mode."""
    import transformers

    model_type, keys = MODELS[name]
    labels = {} if kind == QUESTION else {"id2label": dict(enumerate(["yes", "no", "either"][:num_labels]))}
    config = transformers.AutoConfig.for_model(model_type, **keys, **labels)
    if kind == TOKENS:
        config.classifier_dropout = 0.0
    torch.manual_seed(7)
    model = getattr(transformers, f"AutoModel{kind}").from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(parameter + 0.2 * noise if parameter.dim() == 1 else 0.15 * noise)
    model.save_pretrained(folder)
    model.config.pad_token_id = 0
    return model


@pytest.mark.parametrize(
    ("name", "kind"),
    [("neox", SEQUENCE), ("neox", TOKENS), ("neox", QUESTION), ("llama-2", SEQUENCE), ("gpt2", SEQUENCE)],
)
def test_heads_there_and_back(tmp_path: Path, name: str, kind: str) -> None:
    theirs = make_with_head(name, kind, tmp_path / "hf")
    imported = import_folder(tmp_path / "hf", tmp_path / "native")
    reader = Reader(tmp_path / "native/global_step0")
    ours = load_model(reader)
    tokens = torch.randint(1, VOCAB, (3, 20), generator=torch.Generator().manual_seed(3))  # 0 would be padding
    hidden = ours(tokens)
    logits = ours.logits(hidden).detach()
    mask = torch.ones(tokens.shape)
    arguments = (ours.output_weight, *())
    if kind == QUESTION:
        start, end = torch.tensor([0, 4, 7]), torch.tensor([3, 4, 19])
        labels = torch.zeros_like(tokens)
        labels[range(3), start] |= 1
        labels[range(3), end] |= 2
        output = theirs(tokens, start_positions=start, end_positions=end)
        expected = torch.stack([output.start_logits, output.end_logits], -1)
        term = span_loss(hidden, *arguments, labels, mask, ours.output_bias)
    elif kind == TOKENS:
        labels = torch.randint(3, tokens.shape, generator=torch.Generator().manual_seed(4))
        output = theirs(tokens, labels=labels)
        expected = output.logits
        term = label_loss(hidden, *arguments, labels, mask, ours.output_bias)
    else:
        labels, mask = torch.zeros_like(tokens), torch.zeros(tokens.shape)
        labels[:, -1], mask[:, -1] = torch.tensor([2, 0, 1]), 1.0
        output = theirs(tokens, labels=labels[:, -1])
        logits, expected = logits[:, -1], output.logits
        term = label_loss(hidden, *arguments, labels, mask, None)
    torch.testing.assert_close(logits, expected.detach(), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close((term.sum / term.count).detach(), output.loss.detach(), rtol=1e-5, atol=1e-5)
    exported = export_checkpoint(reader, tmp_path / "back", "stored")
    first, second = HFWeights(tmp_path / "hf"), HFWeights(tmp_path / "back")
    assert set(first.names()) == set(second.names())
    assert all(torch.equal(first.read(one), second.read(one)) for one in first.names())
    assert json.loads((tmp_path / "back/config.json").read_text())["architectures"] == [exported.architecture]
    assert exported.architecture.endswith(kind)
    if kind != QUESTION:
        there, back = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "back"))
        assert back["id2label"] == there["id2label"] == {"0": "yes", "1": "no", "2": "either"}
    assert f"task: {imported.spec.task}" in imported.config.read_text()


def test_a_family_without_the_head_says_so(tmp_path: Path) -> None:
    make("llama-2", tmp_path / "hf")
    spec = import_folder(tmp_path / "hf", tmp_path / "native").spec
    asked = dataclasses.replace(spec, task="question_answering", num_labels=2, head_bias=True)
    reader = save_model(tmp_path / "asked", build_model(asked, seed=1), tp_size=1)
    with pytest.raises(CheckpointError, match="question_answering"):
        export_checkpoint(reader, tmp_path / "out", "fp32")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["neox", "gpt2", "gptj", "llama-1", "llama-2", "starcoder", "falcon-40b"])
@pytest.mark.parametrize("targets", ["all", "query"])
def test_adapters_as_peft_applies_them(tmp_path: Path, name: str, targets: str) -> None:
    from peft import PeftModel

    if name not in MODELS:
        name = next(one for one, (kind, _) in MODELS.items() if kind == name.split("-")[0])
    theirs = make(name, tmp_path / "hf")
    base = load_model(open_weights(tmp_path / "hf", None))
    every = ("dense", "gate", "key_value", "linear1", "linear2", "query", "query_key_value", "up")
    chosen = every if targets == "all" else ("query", "query_key_value")
    model = build_model(dataclasses.replace(base.spec, lora=LowRank(3, 5.0, chosen)), seed=2).eval()
    weights, generator = dict(base.named_parameters()), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for own, parameter in model.named_parameters():
            if own in weights:
                parameter.copy_(weights[own])
            else:
                parameter.normal_(0.0, 0.2, generator=generator)
    reader = save_model(tmp_path / "tuned", model, tp_size=1)
    assert export_adapter(reader, tmp_path / "adapter", dtype=torch.float32, model_type=MODELS[name][0]) > 0
    tokens = torch.randint(VOCAB, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        plain = theirs(tokens).logits.clone()
        expected = PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).eval()(tokens).logits
        assert (plain - expected).abs().max() > 0.05
        torch.testing.assert_close(model.logits(model(tokens)), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(CheckpointError, match="is not empty"):
        export_adapter(reader, tmp_path / "adapter", dtype=torch.float32)
