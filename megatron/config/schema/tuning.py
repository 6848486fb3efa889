"""The keys that say which part of a model learns."""

from __future__ import annotations

from typing import Literal

from megatron.config.schema.base import Block, Bool, Float, Int, Section, key

LoraTarget = Literal[
    "all", "attention", "mlp", "query_key_value", "query", "key_value", "dense", "linear1", "linear2", "gate", "up"
]


class SoftPromptBlock(Block):
    """Virtual tokens before every sequence, whose embeddings are all that learns."""

    enabled: Bool = key(True, "false: as if the block were not there.")
    num_tokens: Int = key(10, "Virtual tokens. With seq_length they must fit max_position_embeddings.", gt=0)
    init_string: str = key(
        "",
        "They start as the word embeddings of this text's tokens, repeated or cut to num_tokens. Unset: at random.",
    )
    init_range: Float = key(0.5, "They start uniform between -init_range and init_range.", gt=0)


class TuningSection(Section):
    """Fine-tuning: low-rank updates, soft prompts, frozen parameters."""

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
    soft_prompt_tuning: SoftPromptBlock | None = key(
        None,
        "Train a soft prompt (prompt tuning): virtual tokens before every sequence, in place of the weights. With load "
        "and finetune, it is made for the model of the checkpoint. Unset: none.",
    )
    train_parameters: list[str] | None = key(
        None,
        "Train only parameters whose name fits one of these patterns (*, ?, [...]), such as layers.3.* or head.*. "
        "Unset: all; with LoRA and soft prompts: only what they add.",
        ours=True,
    )
    freeze_parameters: list[str] | None = key(
        None, "Keep parameters as they are whose name fits one of these patterns, such as embedding.*.", ours=True
    )

    @property
    def num_virtual_tokens(self) -> int:
        """Tokens that a soft prompt adds to every sequence."""
        return virtual_tokens(self.soft_prompt_tuning)


def virtual_tokens(block: SoftPromptBlock | None) -> int:
    """Tokens that a soft prompt adds to every sequence; 0 without one."""
    return block.num_tokens if block is not None and block.enabled else 0
