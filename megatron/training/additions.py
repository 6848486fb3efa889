"""What fine-tuning puts beside the weights that a run loads: low-rank updates, a soft prompt, a head for labels.

Not here: which of them learn (megatron.model.lora). Invariant: a checkpoint's additions are taken whole or refused,
never left behind without a word.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron.common.errors import CheckpointError
from megatron.convert.foreign import AnyReader
from megatron.engine.state import WEIGHT, TensorSource
from megatron.model.build import HEAD, WORD_EMBEDDING
from megatron.model.lora import is_update
from megatron.model.soft_prompt import SOFT_PROMPT_WEIGHT
from megatron.model.spec import ModelSpec

# What a head for labels changes of the language model that it is put on.
_HEAD_FIELDS = ("task", "num_labels", "label_names", "tied_head", "head_bias")


def is_added(reader: AnyReader, spec: ModelSpec, name: str) -> bool:
    """Whether the run adds a parameter to those that were saved."""
    saved = reader.state.get("model_spec", {})
    if is_update(name):
        return saved.get("lora") is None
    if name == SOFT_PROMPT_WEIGHT:
        return saved.get("soft_prompt") is None
    return name.startswith(f"{HEAD}.") and saved.get("task", "causal_lm") == "causal_lm" != spec.task


def agreed_fields(reader: AnyReader, saved: dict[str, Any], mine: dict[str, Any], weights_only: bool) -> dict[str, Any]:
    """`mine`, the fields of the run's model, with those that need not be as `saved` taken from there.

    Raises: CheckpointError if one of the two has an addition that the other cannot do without.
    """
    folder, mine = reader.folder, dict(mine)
    if saved.get("lora") is not None and mine["lora"] is None:
        raise CheckpointError(
            f"{folder} has low-rank updates (LoRA), the config has none. Set the lora keys to those of that run, or "
            "merge the updates into the weights first: tools/ckpts/merge_lora.py."
        )
    if saved.get("lora") is None and mine["lora"] is not None and not weights_only:
        raise CheckpointError(
            f"{folder} has no low-rank updates (LoRA), the config has lora_rank. Set finetune: true to start training "
            "updates of these weights."
        )
    _check_prompts(reader, saved.get("soft_prompt"), mine["soft_prompt"], weights_only)
    if saved.get("soft_prompt") is not None or weights_only:
        mine["soft_prompt"] = saved.get("soft_prompt")
    if weights_only and saved.get("lora") is None:
        mine["lora"] = None
    if not (saved.get("label_names") and mine["label_names"]):
        # One of the two does not say what the labels stand for.
        mine["label_names"] = saved.get("label_names")
    if weights_only and saved.get("task") == "causal_lm":
        for name in _HEAD_FIELDS:
            mine[name] = saved.get(name)
    return mine


def _check_prompts(
    reader: AnyReader, saved: dict[str, Any] | None, mine: dict[str, Any] | None, weights_only: bool
) -> None:
    base = "load the model that it was trained for, whose weights are as they were"
    if saved is not None and mine is None:
        raise CheckpointError(
            f"{reader.folder} has a soft prompt of {saved['num_tokens']} tokens, the config has none. Set "
            f"soft_prompt_tuning: {{num_tokens: {saved['num_tokens']}}} to go on with it, or {base}."
        )
    if saved is None and mine is not None and not weights_only:
        raise CheckpointError(
            f"{reader.folder} has no soft prompt, the config has soft_prompt_tuning. Set finetune: true to start "
            "training a prompt for this model."
        )
    if saved is not None and mine is not None and saved["num_tokens"] != mine["num_tokens"]:
        raise CheckpointError(
            f"{reader.folder} has a soft prompt of {saved['num_tokens']} tokens, the config has "
            f"soft_prompt_tuning.num_tokens = {mine['num_tokens']}. Set num_tokens: {saved['num_tokens']} to go on "
            f"with it; for a prompt of another length, {base}."
        )


class PromptOfWords:
    """A checkpoint without a soft prompt, read as if it held the one that the run starts from: embeddings of words."""

    def __init__(self, reader: TensorSource, spec: ModelSpec) -> None:
        assert spec.soft_prompt is not None
        assert spec.soft_prompt.init_ids
        self._reader, self._spec, self._ids = reader, spec, list(spec.soft_prompt.init_ids)

    def names(self) -> list[str]:
        """As the checkpoint's, and the prompt's."""
        return [*self._reader.names(), SOFT_PROMPT_WEIGHT]

    def kinds(self, name: str) -> list[str]:
        """As the checkpoint's; of the prompt the weight."""
        return [WEIGHT] if name == SOFT_PROMPT_WEIGHT else self._reader.kinds(name)

    def read_shard(
        self, name: str, kind: str, tp_rank: int, tp_size: int, start: int = 0, stop: int | None = None, **wanted: Any
    ) -> torch.Tensor:
        """As `Reader.read_shard`."""
        if name != SOFT_PROMPT_WEIGHT:
            return self._reader.read_shard(name, kind, tp_rank, tp_size, start, stop, **wanted)
        words = self._reader.read_shard(f"{WORD_EMBEDDING}.weight", kind, 0, 1).view(-1, self._spec.hidden_size)
        return (words[self._ids].float() * self._spec.input_scale).flatten()[start:stop]


def source_of(reader: AnyReader, spec: ModelSpec) -> TensorSource:
    """What a run takes its weights from: the checkpoint, with the start of a new prompt where that is made of words."""
    if spec.soft_prompt is None or not spec.soft_prompt.init_ids or not is_added(reader, spec, SOFT_PROMPT_WEIGHT):
        return reader
    return PromptOfWords(reader, spec)


def computes_otherwise(reader: AnyReader, spec: ModelSpec) -> str:
    """What the run adds that makes another function of the saved weights, in words; "" where it is the same.

    Low-rank updates do not: they start at zero.
    """
    if spec.soft_prompt is not None and is_added(reader, spec, SOFT_PROMPT_WEIGHT):
        return "the soft prompt"
    return "the head" if is_added(reader, spec, f"{HEAD}.weight") else ""


def start_of_prompt(reader: AnyReader, spec: ModelSpec) -> str:
    """What the run's soft prompt is before the first step, in words."""
    if not is_added(reader, spec, SOFT_PROMPT_WEIGHT):
        return "as the checkpoint has it"
    if spec.soft_prompt is not None and spec.soft_prompt.init_ids:
        return "starts as the embeddings of init_string's tokens"
    return "starts at random"


def is_kept(reader: AnyReader, spec: ModelSpec, name: str) -> bool:
    """Whether a parameter stays at its initial value, because `source_of` does not have it."""
    if name == SOFT_PROMPT_WEIGHT and spec.soft_prompt is not None and spec.soft_prompt.init_ids:
        return False
    return is_added(reader, spec, name)
