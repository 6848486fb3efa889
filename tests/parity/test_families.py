"""Every family: the imported model is transformers' function, its gradients included, and comes back bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from megatron.checkpoint import Reader
from megatron.convert.export import export_checkpoint
from megatron.convert.families import FAMILIES
from megatron.convert.hf_folder import HFWeights
from megatron.convert.import_hf import import_folder
from megatron.inference.decode import DecodeSettings, decode
from megatron.inference.load import load_model
from megatron.model.build import vocabulary_parameters
from tests.distributed.layout_cases import BETAS, Case, global_batch
from tests.parity.family_cases import spec_values, step_in_place
from tests.parity.hf_models import MODELS, VOCAB, make

# fp32 sums of a few hundred products in another order.
TOLERANCE = 1e-5


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    weights = HFWeights(folder)
    return {name: weights.read(name) for name in weights.names()}


def test_every_family_is_here() -> None:
    assert {model_type for model_type, _ in MODELS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(tmp_path: Path, name: str) -> None:
    theirs = make(name, tmp_path / "hf")
    imported = import_folder(tmp_path / "hf", tmp_path / "native")
    assert imported.check.difference < 1e-4
    reader = Reader(tmp_path / "native/global_step0")
    ours = load_model(reader)

    tokens = torch.randint(VOCAB, (3, 30), generator=torch.Generator().manual_seed(3))
    labels = torch.randint(VOCAB, (3, 30), generator=torch.Generator().manual_seed(4))
    for parameter in ours.parameters():
        parameter.requires_grad_()
    logits = ours.logits(ours(tokens))
    expected = theirs(tokens).logits
    assert expected.abs().max() > 0.5, "a model this flat would hide differences"
    assert (logits - expected).abs().max() < TOLERANCE * max(1.0, float(expected.detach().abs().max()))
    loss, their_loss = (F.cross_entropy(out.flatten(0, 1), labels.flatten()) for out in (logits, expected))
    assert abs(float(loss.detach()) - float(their_loss.detach())) < TOLERANCE
    loss.backward()
    their_loss.backward()
    their_grads = {name: parameter.grad for name, parameter in theirs.named_parameters(remove_duplicate=False)}
    family = FAMILIES[MODELS[name][0]]
    grads = {own: parameter.grad for own, parameter in ours.named_parameters()}
    for group in family.all_groups(ours.spec):
        for their_name, grad in zip(group.theirs, group.recipe.to_hf([grads[own] for own in group.ours]), strict=True):
            wanted = their_grads[their_name.replace("embed_out", "lm_head")]
            assert (grad - wanted).abs().max() < TOLERANCE * max(1.0, float(wanted.abs().max())), their_name

    prompts = [tokens[0, :7].tolist(), tokens[1, :3].tolist(), tokens[2, :12].tolist()]
    for prompt, completion in zip(prompts, decode(ours, prompts, DecodeSettings(max_new_tokens=20)), strict=True):
        ids = torch.tensor([prompt])
        generated = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=None
        )
        assert completion.ids == generated[0, len(prompt) :].tolist()

    export_checkpoint(reader, tmp_path / "back", "stored")
    before, after = tensors(tmp_path / "hf"), tensors(tmp_path / "back")
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)


QUICK = (
    *("neox", "gpt2", "gptj", "starcoder", "llama-3", "mistral", "qwen2-window", "qwen3"),
    *("gemma", "falcon-40b", "opt"),
)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[] if name in QUICK and (dtype == torch.bfloat16) else [pytest.mark.full])
        for name in MODELS
        for dtype in (torch.bfloat16, torch.float16)
    ],
)
def test_half_precision_there_and_back(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """What is stored in half precision stays what it is, and computes in fp32 as transformers does."""
    make(name, tmp_path / "hf", dtype)
    # Read anew: converting a model has rounded its constants (rotary wavelengths) as well.
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    imported = import_folder(tmp_path / "hf", tmp_path / "native")
    assert imported.check.rounding == 0.0
    reader = Reader(tmp_path / "native/global_step0")
    ours = load_model(reader)
    tokens = torch.randint(VOCAB, (2, 30), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits, expected = ours.logits(ours(tokens)), theirs(tokens).logits
    assert (logits - expected).abs().max() < TOLERANCE * max(1.0, float(expected.abs().max()))
    export_checkpoint(reader, tmp_path / "back", "stored")
    before, after = tensors(tmp_path / "hf"), tensors(tmp_path / "back")
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) and after[key].dtype == dtype for key in before)


LAYOUTS = ({"tp": 2, "pp": 2}, {"tp": 2}, {"pp": 2})


def layout_cases() -> list[Any]:
    """Both axes for one model of each family; the rest with the full matrix."""
    return [
        pytest.param(name, layout, id=f"{name}-{layout}", marks=[] if is_quick else [pytest.mark.full])
        for layout in LAYOUTS
        for name in MODELS
        for is_quick in [name in QUICK and layout == LAYOUTS[0]]
    ]


@pytest.mark.parametrize(("name", "layout"), layout_cases())
def test_divided_models(tmp_path: Path, ranks: Callable[..., list[Any]], name: str, layout: dict[str, int]) -> None:
    """Loss and every gradient at the layout are transformers', and its checkpoint is exported to the same bytes."""
    theirs = make(name, tmp_path / "hf")
    spec = import_folder(tmp_path / "hf", tmp_path / "native").spec
    case = Case(**layout, spec=spec_values(spec, layout.get("tp", 1)), global_batch=4, micro_batch=2, clipping=0.0)
    found = ranks(step_in_place, case.world_size, case, tmp_path / "native/global_step0", tmp_path / "divided")

    def mean_loss(step: int) -> torch.Tensor:
        tokens, labels, _ = global_batch(step, case)
        return F.cross_entropy(theirs(tokens).logits.flatten(0, 1), labels.flatten())

    with torch.no_grad():
        valid = float(mean_loss(7))
    loss = mean_loss(0)
    loss.backward()
    for their_valid, their_loss in found:
        assert their_valid == pytest.approx(valid, abs=TOLERANCE)
        assert their_loss == pytest.approx(float(loss.detach()), abs=TOLERANCE)
    reader = Reader(tmp_path / "divided/global_step1")
    their_grads = {key: parameter.grad for key, parameter in theirs.named_parameters(remove_duplicate=False)}
    padded = vocabulary_parameters(spec)
    for group in FAMILIES[MODELS[name][0]].all_groups(spec):
        moments = [reader.read(own, "exp_avg", rows=spec.vocab_size if own in padded else None) for own in group.ours]
        for their_name, moment in zip(group.theirs, group.recipe.to_hf(moments), strict=True):
            wanted = their_grads[their_name.replace("embed_out", "lm_head")]
            grad = moment / (1 - BETAS[0])
            assert (grad - wanted).abs().max() < TOLERANCE * max(1.0, float(wanted.abs().max())), their_name

    export_checkpoint(reader, tmp_path / "back", "stored")
    before, after = tensors(tmp_path / "hf"), tensors(tmp_path / "back")
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
