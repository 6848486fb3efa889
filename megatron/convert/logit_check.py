"""Does transformers compute from a folder what the native model computes from the checkpoint?

Both compute in fp32. A model that is too large is taken a run of layers at a time, each between the embedding and the
head: every layer is compared, and no more than one run is in memory. Where weights were rounded to half precision on
the way, what the rounding itself changes is measured apart.
Invariant: the native side never reads the folder, and transformers never reads the checkpoint.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron.common.errors import CheckpointError
from megatron.convert.family import EMBEDDING, HEAD, HEAD_BIAS, Family
from megatron.convert.foreign import AnyReader
from megatron.convert.hf_folder import CONFIG, HFWeights, read_json, write_weights
from megatron.convert.hf_reference import hidden_states_and_logits
from megatron.model.build import POSITION_EMBEDDING, WORD_EMBEDDING, layer_list
from megatron.model.spec import ModelSpec
from megatron.parallel.process_groups import ProcessGroups

# Two correct fp32 programs differ by the order of their sums; a wrong mapping by as much as the logits are large.
RELATIVE_BOUND = 1e-4
# Rounding every weight to 8 (11) significant bits moves a logit by some multiple of 2^-8 (2^-11) of the largest one.
ROUNDING_BOUND = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.3}
# Of the fp32 weights that transformers holds at a time; one layer is always taken.
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
    for run in _runs(spec, run_bytes):
        part = _part_of(spec, run)
        states, logits = native_states(reader, part, tokens, dtype, first=run.start)
        with _reference_folder(family, spec, part, folder, run, dtype, scratch) as reference:
            their_states, their_logits = hidden_states_and_logits(reference, tokens)
        scale = max(1.0, logits.abs().max().item())
        difference = (logits - their_logits).abs().max().item() if logits.shape == their_logits.shape else float("inf")
        if not difference <= RELATIVE_BOUND * scale:
            raise CheckpointError(
                f"transformers' logits differ from the native ones by {difference:.3g} (largest logit {scale:.3g}, "
                f"bound {RELATIVE_BOUND * scale:.3g}); {_first_difference(states, their_states, run.start)}. "
                "Nothing was written."
            )
        rounding = 0.0
        if dtype is not None and dtype != torch.float32:
            _, exact = native_states(reader, part, tokens, torch.float32, first=run.start)
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


def native_states(
    reader: AnyReader, spec: ModelSpec, tokens: torch.Tensor, dtype: torch.dtype | None, *, first: int = 0
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The native model's states at the places where transformers shows its own, and its logits.

    Weights are rounded to `dtype` and computed with in fp32, one block's at a time in memory. first: the checkpoint's
    layer that is the spec's first. Shapes: as `hf_reference.hidden_states_and_logits`.
    """
    x = tokens
    states: list[torch.Tensor] = []
    for layer in layer_list(spec, ProcessGroups.single()):
        if layer.name == "head":
            continue
        module = layer.build().eval()
        _fill(module, _source_name(layer.name, first), reader, dtype)
        x = module(x)
        if layer.name == POSITION_EMBEDDING:
            states.clear()  # transformers shows the sum
        states.append(x)
    rows = spec.vocab_size if spec.task == "causal_lm" else None
    head = reader.read(EMBEDDING if spec.tied_head else HEAD, rows=rows, dtype=dtype).float()
    logits = states[-1] @ head.T
    if spec.head_bias:
        logits = logits + reader.read(HEAD_BIAS, rows=rows, dtype=dtype).float()
    if spec.task == "sequence_classification":
        logits = logits[:, -1]
    return [*states[:-2], states[-1]], logits


def _source_name(layer: str, first: int) -> str:
    kind, _, index = layer.partition(".")
    return f"{kind}.{int(index) + first}" if kind == "layers" else layer


def _fill(module: nn.Module, layer: str, reader: AnyReader, dtype: torch.dtype | None) -> None:
    for name, parameter in module.named_parameters():
        rows = parameter.shape[0] if layer == WORD_EMBEDDING else None
        parameter.copy_(reader.read(f"{layer}.{name}", rows=rows, dtype=dtype))


def _runs(spec: ModelSpec, run_bytes: int) -> Iterator[range]:
    """Consecutive layers whose fp32 weights, with embedding and head, stay within the bytes."""
    H, F_, D = spec.hidden_size, spec.ffn_size, spec.head_dim
    block = 4 * H * (2 * (spec.num_heads + spec.num_kv_heads) * D + F_ * (3 if spec.is_gated else 2))
    ends = 4 * H * (spec.vocab_size * (1 if spec.tied_head else 2) + spec.max_positions)
    width = max(1, (run_bytes - ends) // block)
    if width >= spec.num_layers:
        yield range(spec.num_layers)
        return
    for start in range(0, spec.num_layers, width):
        yield range(start, min(start + width, spec.num_layers))


def _part_of(spec: ModelSpec, run: range) -> ModelSpec:
    if len(run) == spec.num_layers:
        return spec
    layers = None
    if spec.window_layers is not None:
        layers = tuple(layer - run.start for layer in spec.window_layers if layer in run)
    return replace(spec, num_layers=len(run), window_layers=layers)


class _reference_folder:
    """The folder itself, or one with some of its layers, for the time of the `with` block."""

    def __init__(
        self,
        family: Family,
        whole: ModelSpec,
        part: ModelSpec,
        folder: Path,
        run: range,
        dtype: torch.dtype | None,
        scratch: Path,
    ) -> None:
        self.family, self.whole, self.part, self.folder, self.run = family, whole, part, folder, run
        self.dtype, self.scratch = dtype, scratch
        self.made: Path | None = None

    def __enter__(self) -> Path:
        weights = HFWeights(self.folder)
        needs_rounding = self.dtype is not None and any(weights.dtype(name) != self.dtype for name in weights.names())
        if len(self.run) == self.whole.num_layers and not needs_rounding:
            return self.folder
        self.made = Path(tempfile.mkdtemp(prefix="layers-", dir=self.scratch))
        names = self._names(set(weights.names()))
        described = {new: (weights.shape(old), self.dtype or weights.dtype(old)) for new, old in names.items()}
        write_weights(self.made, described, lambda new: weights.read(names[new]).to(described[new][1]))
        (self.made / CONFIG).write_text(json.dumps(self._config()))
        return self.made

    def __exit__(self, *_: object) -> None:
        if self.made is not None:
            shutil.rmtree(self.made, ignore_errors=True)

    def _names(self, stored: set[str]) -> dict[str, str]:
        """Name in the part -> name in the folder."""
        of_whole, of_part = self.family.all_groups(self.whole), self.family.all_groups(self.part)
        inside = [group for group in of_whole if group.ours[0].startswith("layers.")]
        before = of_whole.index(inside[0])
        per_layer = len(inside) // self.whole.num_layers
        chosen = [
            *of_whole[:before],
            *inside[self.run.start * per_layer : self.run.stop * per_layer],
            *of_whole[before + len(inside) :],
        ]
        names: dict[str, str] = {}
        for new, old in zip(of_part, chosen, strict=True):
            for theirs, source in zip(new.theirs, old.theirs, strict=True):
                names[theirs] = source if source in stored else source.removeprefix(self.family.prefix)
        return names

    def _config(self) -> dict[str, Any]:
        """The folder's own config.json but for the number of layers: what it says is part of what is checked."""
        config = read_json(self.folder / CONFIG)
        key = next(key for key in ("num_hidden_layers", "n_layer") if key in self.family.write(self.whole))
        config[key] = len(self.run)
        if isinstance(config.get("layer_types"), list):
            config["layer_types"] = config["layer_types"][self.run.start : self.run.stop]
        if "max_window_layers" in config:
            config["max_window_layers"] = max(0, config["max_window_layers"] - self.run.start)
        return config


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
