"""The keys that say which part of a model learns."""

from __future__ import annotations

from typing import Literal

from megatron.config.schema.base import Float, Int, Section, key

LoraTarget = Literal[
    "all", "attention", "mlp", "query_key_value", "query", "key_value", "dense", "linear1", "linear2", "gate", "up"
]


class TuningSection(Section):
    """Fine-tuning: low-rank updates, frozen parameters."""

    lora_rank: Int | None = key(
        None,
        "Train low-rank updates of linear layers (LoRA) in place of the weights: the rank of the updates. With load "
        "and finetune, the weights of the checkpoint are what is updated. Unset: no LoRA.",
        ours=True,
        gt=0,
    )
    lora_alpha: Float = key(16.0, "The updates are scaled by lora_alpha / lora_rank.", ours=True, gt=0)
    lora_dropout: Float = key(0.0, "Dropout of what enters the updates.", ours=True, ge=0, lt=1)
    lora_targets: list[LoraTarget] = key(
        ["all"],
        "The layers that get updates: all, attention, mlp, or single ones (query_key_value also means query and "
        "key_value of grouped-query attention; linear1 also means gate and up of a gated MLP).",
        ours=True,
        min_length=1,
    )
    train_parameters: list[str] | None = key(
        None,
        "Train only parameters whose name fits one of these patterns (*, ?, [...]), such as layers.3.* or head.*. "
        "Unset: all; with LoRA: only the updates.",
        ours=True,
    )
    freeze_parameters: list[str] | None = key(
        None, "Keep parameters as they are whose name fits one of these patterns, such as embedding.*.", ours=True
    )
