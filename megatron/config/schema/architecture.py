"""The keys that say what function the model is: sizes, norms, positions, attention, feed-forward, initialisation.

Says nothing of how the model is divided or trained. Invariant: with `tokenizer.padded_vocab_size`, these keys determine
every parameter's name and shape.
"""

from __future__ import annotations

from typing import Any, Literal

from megatron.config.schema.base import Bool, Float, Int, Section, key

Activation = Literal["gelu", "geglu", "relu", "softsign", "swish", "mish", "silu", "reglu", "swiglu", "bilinear", "glu"]
GATED_ACTIVATIONS = ("geglu", "reglu", "swiglu", "bilinear", "glu")
InitMethod = Literal[
    "normal",
    "scaled_normal",
    "orthogonal",
    "scaled_orthogonal",
    "xavier_uniform",
    "xavier_normal",
    "wang_init",
    "small_init",
    "single_residual_scaled_normal",
]


class ModelSection(Section):
    """The architecture."""

    num_layers: Int = key(None, "Transformer blocks. Required.", gt=0)
    hidden_size: Int = key(None, "Width of the residual stream. Required; a multiple of num_attention_heads.", gt=0)
    num_attention_heads: Int = key(None, "Query heads. Required; a multiple of model_parallel_size.", gt=0)
    num_kv_heads: Int = key(
        None,
        "Key and value heads (grouped-query attention). Unset: as many as query heads. "
        "Divides num_attention_heads; is a multiple of model_parallel_size, or divides it: then ranks share a head.",
        gt=0,
    )
    intermediate_size: Int | None = key(
        None,
        "Feed-forward width before gating arithmetic: a gated activation uses two thirds of it, then both are "
        "rounded up "
        "to mlp_multiple_of. Unset: 4 * hidden_size.",
        gt=0,
    )
    mlp_multiple_of: Int = key(1, "The feed-forward width is rounded up to a multiple of this.", gt=0)
    expansion_factor: Float | None = key(
        None, "Feed-forward width as a multiple of hidden_size, in place of intermediate_size.", gt=0
    )
    ffn_size: Int = key(
        None,
        "Width between the two feed-forward matrices after all arithmetic.",
        derived="intermediate_size or expansion_factor",
        ours=True,
    )
    seq_length: Int = key(None, "Length of a training sequence. Required.", unit="tokens", gt=0)
    max_position_embeddings: Int = key(
        None, "Longest sequence the model is made for; at least seq_length. Unset: seq_length.", unit="tokens", gt=0
    )
    norm: Literal["layernorm", "rmsnorm"] = key("layernorm", "Normalisation of every block and of the output.")
    layernorm_epsilon: Float = key(1e-5, "Added to the variance in layernorm.", gt=0)
    rms_norm_epsilon: Float = key(1e-8, "Added to the mean square in rmsnorm.", gt=0)
    pos_emb: Literal["learned", "rotary", "none"] = key("learned", "How positions enter the model.")
    rotary_pct: Float = key(
        1.0, "Part of each head that rotary embeddings turn: int(head_dim * rotary_pct) dimensions.", gt=0, le=1
    )
    rotary_emb_base: Float = key(10000, "Base of the rotary wavelengths (theta).", gt=1)
    opt_pos_emb_offset: Int = key(0, "Learned positions start at this row of the table (OPT uses 2).", ge=0)
    no_weight_tying: Bool = key(False, "Give the output head a matrix of its own instead of the embedding's.")
    gpt_j_residual: Bool = key(
        False, "Attention and feed-forward side by side: x + attn(ln1 x) + mlp(ln2 x), instead of one after the other."
    )
    gpt_j_tied: Bool = key(False, "With gpt_j_residual, feed the first norm's output to both branches.")
    activation: Activation = key("gelu", "Feed-forward non-linearity; geglu, reglu, swiglu, bilinear, glu are gated.")
    bias_gelu_fusion: Bool = key(
        False,
        "Use the tanh approximation of gelu, which is what upstream's fused kernel computes. Without it gelu is exact.",
    )
    use_bias_in_attn_linear: Bool = key(True, "Biases on query_key_value and on attention's output matrix.")
    use_bias_in_mlp: Bool = key(True, "Biases on the feed-forward matrices.")
    attention_config: list[Any] = key(
        None,
        'Attention of each layer, `[[["flash"], "all"]]` or one name per layer. global and flash are both exact causal '
        "attention, computed by the fastest kernel at hand. Unset: global everywhere.",
    )
    init_method: InitMethod = key(
        "normal", "Initialisation of all matrices but those that write to the residual stream."
    )
    output_layer_init_method: InitMethod = key(
        "scaled_normal", "Initialisation of attention's output and of the second feed-forward matrix."
    )
    init_method_std: Float = key(0.02, "Standard deviation of normal and scaled_normal.", ge=0)
    attention_dropout: Float = key(0.0, "Dropout on attention probabilities.", ge=0, lt=1)
    hidden_dropout: Float = key(
        0.0, "Dropout after attention, after the feed-forward and after the embeddings.", ge=0, lt=1
    )

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward multiplies an activated gate with an up projection."""
        return self.activation in GATED_ACTIVATIONS

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_attention_heads
