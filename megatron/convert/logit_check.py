"""Does transformers compute from a folder what the native model computes from the checkpoint?

Both compute in fp32. A model that is too large is taken a run of layers at a time (megatron.convert.layer_runs), each
between those rows of the embedding and of the head that the prompts use: every layer is compared, and no more than
one run is in memory; the other rows are compared as they are stored. Where weights were rounded to half precision on
the way, what the rounding itself changes is measured apart.
Invariant: the native side never reads the folder, and transformers never reads the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from megatron.common.errors import CheckpointError
from megatron.convert.family import EMBEDDING, HEAD, HEAD_BIAS, Family
from megatron.convert.foreign import AnyReader
from megatron.convert.hf_folder import PORTION_NUMEL, HFWeights
from megatron.convert.hf_reference import hidden_states_and_logits
from megatron.convert.layer_runs import Run, reference_folder, runs, vocabulary_groups
from megatron.model.build import POSITION_EMBEDDING, WORD_EMBEDDING, layer_list
from megatron.model.spec import ModelSpec
from megatron.parallel.process_groups import ProcessGroups

# Two correct fp32 programs differ by the order of their sums; a wrong mapping by as much as the logits are large.
RELATIVE_BOUND = 1e-4
# Rounding every weight to 8 (11) significant bits moves a logit by some multiple of 2^-8 (2^-11) of the largest one.
ROUNDING_BOUND = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.3}
# Of the fp32 weights of the layers that are held at a time; one layer is always taken.
RUN_BYTES = 500_000_000


@dataclass(frozen=True)
class LogitCheck:
    """difference: largest |native - transformers| with the same rounded weights. rounding: largest change of a native
    logit by rounding the weights. scale: largest |native logit|."""

    difference: float
    rounding: float
    scale: float


@torch.inference_mode()
def check_logits(
    reader: AnyReader,
    spec: ModelSpec,
    family: Family,
    folder: Path,
    dtype: torch.dtype | None,
    *,
    scratch: Path,
    seed: int = 1234,
    run_bytes: int = RUN_BYTES,
) -> LogitCheck:
    """Compare fixed and random prompts.

    dtype: what one of the two sides was rounded to (both are, before they are compared); None: neither was.
    scratch: a folder to write parts of a large model into.
    Raises: CheckpointError naming the first layer whose output differs, or the rounding beyond its bound.
    """
    tokens = prompts(spec, seed)
    worst = LogitCheck(0.0, 0.0, 0.0)
    all_runs = runs(spec, tokens, run_bytes)
    if all_runs[0].rows is not None:
        _compare_vocabulary(reader, spec, family, HFWeights(folder), dtype)
    for run in all_runs:
        states, logits = native_states(reader, run, dtype)
        with reference_folder(family, spec, run, folder, dtype, scratch) as reference:
            their_states, their_logits = hidden_states_and_logits(reference, run.tokens)
        scale = max(1.0, logits.abs().max().item())
        difference = (logits - their_logits).abs().max().item() if logits.shape == their_logits.shape else float("inf")
        if not difference <= RELATIVE_BOUND * scale:
            raise CheckpointError(
                f"transformers' logits differ from the native ones by {difference:.3g} (largest logit {scale:.3g}, "
                f"bound {RELATIVE_BOUND * scale:.3g}); {_first_difference(states, their_states, run.layers.start)}. "
                "Nothing was written."
            )
        rounding = 0.0
        if dtype is not None and dtype != torch.float32:
            _, exact = native_states(reader, run, torch.float32)
            rounding = (logits - exact).abs().max().item()
            if not rounding <= ROUNDING_BOUND[dtype] * scale:
                raise CheckpointError(
                    f"rounding the weights to {dtype} moves a logit by {rounding:.3g} (largest logit {scale:.3g}, "
                    f"bound {ROUNDING_BOUND[dtype] * scale:.3g}). Nothing was written. Use --precision fp32."
                )
        worst = LogitCheck(max(worst.difference, difference), max(worst.rounding, rounding), max(worst.scale, scale))
    return worst


def prompts(spec: ModelSpec, seed: int) -> torch.Tensor:
    """Rows of ids: one id again and again, ids in order, and random ones. Shapes: [4, T]."""
    T = min(spec.max_positions, 128)
    random = torch.randint(spec.vocab_size, (2, T), generator=torch.Generator().manual_seed(seed))
    fixed = torch.stack([torch.zeros(T, dtype=torch.int64), torch.arange(T) % spec.vocab_size])
    return torch.cat([fixed, random])


def native_states(reader: AnyReader, run: Run, dtype: torch.dtype | None) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The native model's states at the places where transformers shows its own, and its logits, of a run's tokens.

    Weights are rounded to `dtype` and computed with in fp32, one block's at a time in memory.
    Shapes: as `hf_reference.hidden_states_and_logits`.
    """
    spec, x = run.spec, run.tokens
    states: list[torch.Tensor] = []
    for layer in layer_list(spec, ProcessGroups.single()):
        if layer.name == "head":
            continue
        module = layer.build().eval()
        _fill(module, _source_name(layer.name, run.layers.start), reader, run, dtype)
        x = module(x)
        if layer.name == POSITION_EMBEDDING:
            states.clear()  # transformers shows the sum
        states.append(x)
        del module  # before the next one is made
    is_vocabulary = spec.task == "causal_lm"
    logits = states[-1] @ _read(reader, EMBEDDING if spec.tied_head else HEAD, run, dtype, is_vocabulary).T
    if spec.head_bias:
        logits = logits + _read(reader, HEAD_BIAS, run, dtype, is_vocabulary)
    if spec.task == "sequence_classification":
        logits = logits[:, -1]
    return [*states[:-2], states[-1]], logits


def _read(reader: AnyReader, name: str, run: Run, dtype: torch.dtype | None, is_vocabulary: bool) -> torch.Tensor:
    """A tensor rounded to `dtype`, in fp32; of the vocabulary, the run's rows."""
    if not is_vocabulary:
        return reader.read(name, dtype=dtype).float()
    if run.rows is None:
        return reader.read(name, rows=run.spec.vocab_size, dtype=dtype).float()
    chosen = reader.read(name)[run.rows]
    return (chosen if dtype is None else chosen.to(dtype)).float()


def _source_name(layer: str, first: int) -> str:
    kind, _, index = layer.partition(".")
    return f"{kind}.{int(index) + first}" if kind == "layers" else layer


def _fill(module: nn.Module, layer: str, reader: AnyReader, run: Run, dtype: torch.dtype | None) -> None:
    for name, parameter in module.named_parameters():
        parameter.copy_(_read(reader, f"{layer}.{name}", run, dtype, layer == WORD_EMBEDDING))


def _compare_vocabulary(
    reader: AnyReader, spec: ModelSpec, family: Family, weights: HFWeights, dtype: torch.dtype | None
) -> None:
    """All rows of embedding and head, those included that no prompt has. Raises: CheckpointError naming the row."""
    stored = set(weights.names())
    for group in vocabulary_groups(family, spec):
        (ours,), (theirs,) = group.ours, group.theirs
        name = theirs if theirs in stored else theirs.removeprefix(family.prefix)
        (other,) = group.recipe.to_native([weights.read(name)])
        row = _first_differing_row(reader.read(ours, rows=spec.vocab_size, dtype=dtype), other)
        if row is not None:
            raise CheckpointError(f"row {row} of {ours} is not that of {name}. Nothing was written.")


def _first_differing_row(native: torch.Tensor, other: torch.Tensor) -> int | None:
    """Shapes: both [V, ...]. `other` is converted to the type of `native`, some rows at a time."""
    rows = max(1, PORTION_NUMEL // native[0].numel())
    for start in range(0, len(native), rows):
        mine, theirs = native[start : start + rows], other[start : start + rows].to(native.dtype)
        if not torch.equal(mine, theirs):
            return start + int((mine != theirs).view(len(mine), -1).any(1).nonzero()[0])
    return None


def _first_difference(ours: list[torch.Tensor], theirs: list[torch.Tensor], first: int) -> str:
    if len(ours) != len(theirs):
        return f"the native model has {len(ours) - 1} layers, transformers' {len(theirs) - 1}"
    names = [
        "the embedding",
        *(f"layer {first + index}" for index in range(len(ours) - 2)),
        f"layer {first + len(ours) - 2} or the final norm",
    ]
    for name, mine, other in zip(names, ours, theirs, strict=True):
        difference, scale = (mine - other).abs().max().item(), max(1.0, mine.abs().max().item())
        if not difference <= RELATIVE_BOUND * scale:
            return f"the first to differ is {name}, by {difference:.3g} (largest value {scale:.3g})"
    return "the hidden states agree, so it is the output head"
