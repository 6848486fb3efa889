"""The ModelSpec that a configuration describes: the one mapping from upstream's keys to internal names."""

from __future__ import annotations

import math
from typing import cast

from megatron.common.errors import ConfigError
from megatron.config import Config
from megatron.config.schema import GATED_ACTIVATIONS, ModelSection, RopeScalingBlock
from megatron.model.spec import LowRank, ModelSpec, Norm, Residual, RopeScaling, SoftPrompt, WidthScaling
from megatron.tokenizer.base import Tokenizer

# As transformers' heads of these tasks have it.
_HEAD_BIAS = {"sequence_classification": False, "token_classification": True, "question_answering": True}
_TANH = {"gelu": "gelu_tanh", "geglu": "geglu_tanh"}


def model_spec(config: Config, prompt_ids: tuple[int, ...] = ()) -> ModelSpec:
    """Read the architecture keys. All rules between them were checked when the config was loaded.

    prompt_ids: what a soft prompt starts from (`init_ids`); it matters to training alone.
    """
    model, tokenizer, mup = config.model, config.tokenizer, width_scaling(config)
    residual: Residual = "sequential"
    if model.gpt_j_residual:
        residual = "parallel_tied" if model.gpt_j_tied else "parallel"
    sizes = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_heads": model.num_attention_heads,
        "num_kv_heads": model.num_kv_heads,
        "ffn_size": model.ffn_size,
        "vocab_size": tokenizer.vocab_size,
        "padded_vocab_size": tokenizer.padded_vocab_size,
        "max_positions": model.max_position_embeddings,
    }
    missing = [name for name, size in sizes.items() if size is None]
    assert not missing, f"a resolved config leaves {missing} open"
    activation: str = model.activation
    if model.bias_gelu_fusion:
        activation = _TANH.get(activation, activation)
    return ModelSpec(
        **sizes,
        head_dim=model.head_dim,
        # Loading has made plain norms of Transformer Engine's names.
        norm=cast(Norm, model.norm),
        norm_eps=norm_epsilon(model),
        norm_offset=model.norm_zero_centered,
        activation=activation,
        position=model.pos_emb,
        position_offset=model.opt_pos_emb_offset,
        rotary_dims=int(model.head_dim * model.rotary_pct) if model.pos_emb == "rotary" else 0,
        rotary_base=model.rotary_emb_base,
        rotary_interleaved=model.rotary_interleaved,
        rope_scaling=rope_scaling(model.rope_scaling),
        rpe_buckets=model.rpe_num_buckets,
        rpe_max_distance=model.rpe_max_distance,
        residual=residual,
        tied_head=not model.no_weight_tying and model.task == "causal_lm",
        attention_bias=model.use_bias_in_attn_linear,
        qkv_bias=model.use_bias_in_qkv,
        mlp_bias=model.use_bias_in_mlp,
        head_bias=_HEAD_BIAS.get(model.task, model.use_bias_in_head),
        task=model.task,
        num_labels=2 if model.task == "question_answering" else model.num_labels or 0,
        label_names=tuple(model.label_names or ()),
        qk_norm=model.use_qk_layernorm,
        window=model.sliding_window_width,
        window_layers=None if model.sliding_window_layers is None else tuple(sorted(model.sliding_window_layers)),
        lora=low_rank(config),
        soft_prompt=soft_prompt(config, prompt_ids),
        mup=mup,
        init_scale=config.width.mup_init_scale,
        embedding_scale=math.sqrt(mup.hidden_size if mup else model.hidden_size) if model.scale_embeddings else 1.0,
        attention_dropout=model.attention_dropout,
        hidden_dropout=model.hidden_dropout,
        init_method=model.init_method,
        output_init_method=model.output_layer_init_method,
        init_std=model.init_method_std,
    )


def low_rank(config: Config) -> LowRank | None:
    """The low-rank updates that the config asks for, their targets by the names that this model's layers have."""
    tuning, model = config.tuning, config.model
    if tuning.lora_rank is None:
        return None
    is_fused = model.num_kv_heads == model.num_attention_heads
    attention = {"query_key_value"} if is_fused else {"query", "key_value"}
    inner = {"gate", "up"} if model.activation in GATED_ACTIVATIONS else {"linear1"}
    meaning: dict[str, set[str]] = {
        "all": {*attention, *inner, "dense", "linear2"},
        "attention": {*attention, "dense"},
        "mlp": {*inner, "linear2"},
        "query_key_value": attention,
        "linear1": inner,
    }
    targets = set().union(*(meaning.get(target, {target}) for target in tuning.lora_targets))
    return LowRank(tuning.lora_rank, tuning.lora_alpha, tuple(sorted(targets)), tuning.lora_dropout)


def soft_prompt(config: Config, ids: tuple[int, ...] = ()) -> SoftPrompt | None:
    """The virtual tokens that the config asks for. What init_string means is the tokenizer's business: `init_ids`."""
    block = config.tuning.soft_prompt_tuning
    if block is None or not block.enabled:
        return None
    return SoftPrompt(block.num_tokens, block.init_range, ids)


def init_ids(config: Config, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that a soft prompt starts from: init_string's, repeated or cut to num_tokens; none without init_string.

    Raises: ConfigError if the tokenizer makes no token of it.
    """
    block = config.tuning.soft_prompt_tuning
    if block is None or not block.enabled or not block.init_string:
        return ()
    ids = tokenizer.encode(block.init_string)
    if not ids:
        raise ConfigError(
            f"{config.origin('soft_prompt_tuning.init_string')}: soft_prompt_tuning.init_string = "
            f"{block.init_string!r} has no token in this tokenizer. Use another text, or remove it."
        )
    return tuple(ids[place % len(ids)] for place in range(block.num_tokens))


def width_scaling(config: Config) -> WidthScaling | None:
    """The base model's widths, and the multipliers."""
    width, base = config.width, config.width.mup_base_shapes
    if not width.use_mup or base is None:
        return None
    return WidthScaling(
        hidden_size=base.hidden_size,
        ffn_size=base.ffn_size,
        num_heads=base.num_attention_heads,
        num_kv_heads=base.num_kv_heads,
        head_dim=base.head_dim,
        embedding_mult=width.mup_embedding_mult,
        position_mult=width.mup_rp_embedding_mult,
        attention_temp=width.mup_attn_temp,
        output_temp=width.mup_output_temp,
    )


def norm_epsilon(model: ModelSection) -> float:
    """The epsilon of the chosen norm: each has a key of its own."""
    return {"rmsnorm": model.rms_norm_epsilon, "scalenorm": model.scalenorm_epsilon}.get(
        model.norm, model.layernorm_epsilon
    )


def rope_scaling(block: RopeScalingBlock | None) -> RopeScaling | None:
    """The block in the model's terms."""
    if block is None or block.rope_type == "default":
        return None
    return RopeScaling(
        kind=block.rope_type,
        factor=block.factor,
        original_positions=block.original_max_position_embeddings or 0,
        low_freq_factor=block.low_freq_factor,
        high_freq_factor=block.high_freq_factor,
        beta_fast=block.beta_fast,
        beta_slow=block.beta_slow,
        attention_factor=block.attention_factor,
    )
