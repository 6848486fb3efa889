"""Does transformers compute from an exported folder what the native model computes from the checkpoint?

Both compute in fp32; the native model is run block by block, so that one block's weights are in memory at a time.
Exported in half precision, the native weights are rounded the same way first, and what the rounding itself changes is
measured apart.
Invariant: the native side never reads the exported folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from megatron.common.errors import CheckpointError
from megatron.convert.foreign import AnyReader
from megatron.convert.gpt_neox import EMBEDDING, HEAD
from megatron.convert.hf_reference import hidden_states_and_logits
from megatron.model.build import layer_list
from megatron.model.spec import ModelSpec
from megatron.parallel.process_groups import ProcessGroups

# Two correct fp32 programs differ by the order of their sums; a wrong mapping by as much as the logits are large.
RELATIVE_BOUND = 1e-4
# Rounding every weight to 8 (11) significant bits moves a logit by some multiple of 2^-8 (2^-11) of the largest one.
ROUNDING_BOUND = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.3}


@dataclass(frozen=True)
class LogitCheck:
    """difference: largest |native - transformers| with the same rounded weights. rounding: largest change of a native
    logit by rounding the weights. scale: largest |native logit|."""

    difference: float
    rounding: float
    scale: float


@torch.inference_mode()
def check_logits(reader: AnyReader, spec: ModelSpec, folder: Path, dtype: torch.dtype, seed: int = 1234) -> LogitCheck:
    """Compare fixed and random prompts.

    Raises: CheckpointError naming the first layer whose output differs, or the rounding beyond its bound.
    """
    tokens = prompts(spec, seed)
    states, logits = native_states(reader, spec, tokens, dtype)
    their_states, their_logits = hidden_states_and_logits(folder, tokens)
    scale = max(1.0, logits.abs().max().item())
    difference = (logits - their_logits).abs().max().item() if logits.shape == their_logits.shape else float("inf")
    if not difference <= RELATIVE_BOUND * scale:
        raise CheckpointError(
            f"transformers' logits differ from the native ones by {difference:.3g} (largest logit {scale:.3g}, bound "
            f"{RELATIVE_BOUND * scale:.3g}); {_first_difference(states, their_states)}. Nothing was written."
        )
    rounding = 0.0
    if dtype != torch.float32:
        _, exact = native_states(reader, spec, tokens, torch.float32)
        rounding = (logits - exact).abs().max().item()
        if not rounding <= ROUNDING_BOUND[dtype] * scale:
            raise CheckpointError(
                f"rounding the weights to {dtype} moves a logit by {rounding:.3g} (largest logit {scale:.3g}, bound "
                f"{ROUNDING_BOUND[dtype] * scale:.3g}). Nothing was written. Use --precision fp32."
            )
    return LogitCheck(difference, rounding, scale)


def prompts(spec: ModelSpec, seed: int) -> torch.Tensor:
    """Rows of ids: one id again and again, ids in order, and random ones. Shapes: [4, T]."""
    T = min(spec.max_positions, 128)
    random = torch.randint(spec.vocab_size, (2, T), generator=torch.Generator().manual_seed(seed))
    fixed = torch.stack([torch.zeros(T, dtype=torch.int64), torch.arange(T) % spec.vocab_size])
    return torch.cat([fixed, random])


def native_states(
    reader: AnyReader, spec: ModelSpec, tokens: torch.Tensor, dtype: torch.dtype
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The native model's states at the places where transformers shows its own, and its logits, weights rounded to
    `dtype`.

    Shapes: as `hf_reference.hidden_states_and_logits`.
    """
    x, states = tokens, []
    for layer in layer_list(spec, ProcessGroups.single()):
        if layer.name == "head":
            continue
        module = layer.build().eval()
        _fill(module, layer.name, reader, dtype)
        x = module(x)
        states.append(x)
    head = reader.read(EMBEDDING if spec.tied_head else HEAD, rows=spec.vocab_size, dtype=dtype).float()
    return [*states[:-2], states[-1]], states[-1] @ head.T


def _fill(module: nn.Module, layer: str, reader: AnyReader, dtype: torch.dtype) -> None:
    for name, parameter in module.named_parameters():
        rows = parameter.shape[0] if f"{layer}.{name}" == EMBEDDING else None
        parameter.copy_(reader.read(f"{layer}.{name}", rows=rows, dtype=dtype))


def _first_difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> str:
    if len(ours) != len(theirs):
        return f"the native model has {len(ours) - 1} layers, transformers' {len(theirs) - 1}"
    names = [
        "the embedding",
        *(f"layer {index}" for index in range(len(ours) - 2)),
        f"layer {len(ours) - 2} or the final norm",
    ]
    for name, mine, other in zip(names, ours, theirs, strict=True):
        difference, scale = (mine - other).abs().max().item(), max(1.0, mine.abs().max().item())
        if not difference <= RELATIVE_BOUND * scale:
            return f"the first to differ is {name}, by {difference:.3g} (largest value {scale:.3g})"
    return "the hidden states agree, so it is the output head"
