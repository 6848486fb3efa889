"""The ModelSpec that a configuration describes: the one mapping from upstream's keys to internal names."""

from __future__ import annotations

from megatron.config import Config
from megatron.model.spec import ModelSpec, Residual


def model_spec(config: Config) -> ModelSpec:
    """Read the architecture keys. All rules between them were checked when the config was loaded."""
    model, tokenizer = config.model, config.tokenizer
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
    return ModelSpec(
        **sizes,
        norm=model.norm,
        norm_eps=model.rms_norm_epsilon if model.norm == "rmsnorm" else model.layernorm_epsilon,
        activation="gelu_tanh" if model.activation == "gelu" and model.bias_gelu_fusion else model.activation,
        position=model.pos_emb,
        position_offset=model.opt_pos_emb_offset,
        rotary_dims=int(model.head_dim * model.rotary_pct) if model.pos_emb == "rotary" else 0,
        rotary_base=model.rotary_emb_base,
        residual=residual,
        tied_head=not model.no_weight_tying,
        attention_bias=model.use_bias_in_attn_linear,
        mlp_bias=model.use_bias_in_mlp,
        attention_dropout=model.attention_dropout,
        hidden_dropout=model.hidden_dropout,
        init_method=model.init_method,
        output_init_method=model.output_layer_init_method,
        init_std=model.init_method_std,
    )
