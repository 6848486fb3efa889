"""The first 20 losses equal an independent loop: transformers' model, torch's AdamW, the same schedule and clipping."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron.engine.train_engine import TrainEngine
from tests.distributed.layout_cases import EPS, SEQ_LENGTH, Case, global_batch, make_engine, rank_batches, tiny_spec

STEPS = 20
PEAK = 3e-3


def cosine_with_warmup(step: int, warmup_steps: int = 4, total: int = STEPS, least: float = 3e-4) -> float:
    """Learning rate before step `step` (0-based), written out independently of megatron.optim."""
    if step < warmup_steps:
        return PEAK * max(1, step) / warmup_steps
    progress = (step - warmup_steps) / (total - warmup_steps)
    return least + (PEAK - least) * 0.5 * (1 + math.cos(math.pi * progress))


def hugging_face_name(name: str) -> str:
    """transformers' in-memory name of one of our parameters."""
    for ours, theirs in (
        ("embedding.word_embeddings", "gpt_neox.embed_in"),
        ("head", "lm_head"),
        ("final_norm", "gpt_neox.final_layer_norm"),
        ("mlp.linear1", "mlp.dense_h_to_4h"),
        ("mlp.linear2", "mlp.dense_4h_to_h"),
    ):
        name = name.replace(ours, theirs)
    return f"gpt_neox.{name}" if name.startswith("layers.") else name


def hugging_face_twin(engine: TrainEngine) -> torch.nn.Module:
    """GPTNeoXForCausalLM with the engine's weights."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    spec = engine.spec
    config = GPTNeoXConfig(
        vocab_size=spec.padded_vocab_size,
        hidden_size=spec.hidden_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        intermediate_size=spec.ffn_size,
        rotary_pct=spec.rotary_dims / spec.head_dim,
        rotary_emb_base=spec.rotary_base,
        max_position_embeddings=spec.max_positions,
        use_parallel_residual=spec.residual == "parallel",
        layer_norm_eps=spec.norm_eps,
        tie_word_embeddings=spec.tied_head,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    config._attn_implementation = "eager"
    twin = GPTNeoXForCausalLM(config).train()
    state = {hugging_face_name(name): p.detach().clone() for name, p in engine.named_parameters}
    result = twin.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert all("rotary" in key or (spec.tied_head and "lm_head" in key) for key in result.missing_keys)
    return twin


def both_losses(case: Case) -> tuple[list[float], list[float], dict[str, float]]:
    """Losses of our engine and of the independent loop, and the largest weight difference at the end, by name."""
    engine = make_engine(case)
    twin = hugging_face_twin(engine)
    decayed = [p for name, p in twin.named_parameters() if p.dim() > 1]
    plain = [p for name, p in twin.named_parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=PEAK,
        betas=(0.9, 0.95),
        eps=EPS,
    )
    ours, theirs = [], []
    for step in range(STEPS):
        lr = cosine_with_warmup(step)
        ours.append(engine.train_step(rank_batches(step, case, 0), lr).loss)
        tokens, labels, _ = global_batch(step, case)
        logits = twin(input_ids=tokens).logits[..., : engine.spec.vocab_size]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), case.clipping)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        theirs.append(float(loss.detach()))
    twin_state = dict(twin.named_parameters())
    differences = {
        name: float((p.detach() - twin_state[hugging_face_name(name)].detach()).abs().max())
        for name, p in engine.named_parameters
    }
    return ours, theirs, differences


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param({}, id="neox-parallel-untied"),
        pytest.param({"residual": "sequential", "tied_head": True, "rotary_dims": 6}, id="sequential-tied"),
    ],
)
def test_losses_equal_an_independent_loop(ranks: Callable[..., list[Any]], spec: dict[str, Any]) -> None:
    # One micro-batch: an independent loop has no accumulation. A clipping norm that is exceeded makes clipping count.
    case = Case(spec=spec, micro_batch=8, clipping=0.5, steps=STEPS)
    assert tiny_spec(**spec).max_positions >= SEQ_LENGTH
    ((ours, theirs, differences),) = ranks(both_losses, 1, case, timeout=180)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours[-1] != pytest.approx(ours[0], rel=1e-3), "nothing was learned, so nothing was compared"
    assert max(differences.values()) < 2e-5, differences
