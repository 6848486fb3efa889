"""What must hold between the keys of fine-tuning. As in `megatron.config.rules`."""

from __future__ import annotations

from megatron.config.draft import Draft
from megatron.config.schema import GATED_ACTIVATIONS
from megatron.config.schema.tuning import virtual_tokens

_NUM_TOKENS = "soft_prompt_tuning.num_tokens"


def text_and_prompt(virtual: int, length: int) -> str:
    """The sum of both lengths, as messages write it."""
    return f"{_NUM_TOKENS} + seq_length = {virtual} + {length} = {virtual + length}"


def check_soft_prompt(draft: Draft) -> None:
    """A prompt's start, and its length beside that of the text."""
    block = draft["soft_prompt_tuning"]
    virtual = virtual_tokens(block)
    if not virtual:
        return
    if block.init_string and "init_range" in block.model_fields_set:
        draft.warn(
            "soft_prompt_tuning.init_range",
            f"init_range = {block.init_range:g} has no effect beside init_string: the prompt starts as that text",
        )
    length, positions = draft["seq_length"], draft["max_position_embeddings"]
    if length <= positions < virtual + length:
        less = f"seq_length: {positions - virtual} or less, or " if virtual < positions else "less seq_length and "
        draft.problem(
            _NUM_TOKENS,
            f"{text_and_prompt(virtual, length)} is more than max_position_embeddings = {positions}: virtual tokens "
            f"stand before the text and take positions of their own. Use {less}fewer virtual tokens.",
        )
    elif virtual >= length:
        draft.warn(
            _NUM_TOKENS,
            f"{_NUM_TOKENS} = {virtual} with seq_length = {length}: most of every sequence is prompt",
        )


def check_tuning(draft: Draft) -> None:
    """LoRA's keys, and what they need."""
    if draft["lora_rank"] is None:
        for name in ("lora_alpha", "lora_dropout", "lora_targets"):
            if draft.is_given(name):
                draft.problem(name, f"{name} does nothing without lora_rank. Set lora_rank, for example 8.")
        return
    fused = draft["num_kv_heads"] in (None, draft["num_attention_heads"])
    is_gated = draft["activation"] in GATED_ACTIVATIONS
    missing = ({"query", "key_value"} if fused else set()) | (set() if is_gated else {"gate", "up"})
    for name in sorted(missing & set(draft["lora_targets"])):
        draft.problem(
            "lora_targets",
            f"lora_targets holds {name}, which this model does not have: its attention "
            f"{'is' if fused else 'is not'} one query_key_value, its MLP {'is' if is_gated else 'is not'} gated.",
        )


def check_base(draft: Draft) -> None:
    """What is fine-tuned should have been trained."""
    if draft["load"] is not None or draft["train_parameters"] or draft.inference:
        return
    added = {"lora_rank": draft["lora_rank"], "soft_prompt_tuning": virtual_tokens(draft["soft_prompt_tuning"])}
    for name, size in added.items():
        if size:
            draft.warn(
                name,
                f"{name} without load: all weights stay at their random start. Set load, and finetune: true, to train "
                "for a model that has learnt something",
            )


TUNING_RULES = (check_soft_prompt, check_tuning, check_base)
