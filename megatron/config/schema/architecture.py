"""The keys that say what function the model is: sizes, norms, positions, attention, feed-forward, initialisation.

Says nothing of how the model is divided or trained. Invariant: with `tokenizer.padded_vocab_size`, these keys determine
every parameter's name and shape.
"""

from __future__ import annotations

from typing import Any, Literal

from megatron.config.schema.base import Block, Bool, Float, Int, Section, key

Activation = Literal[
    "gelu",
    "geglu",
    "relu",
    "softsign",
    "swish",
    "mish",
    "silu",
    "reglu",
    "swiglu",
    "bilinear",
    "glu",
    "gelu_tanh",
    "geglu_tanh",
]
GATED_ACTIVATIONS = ("geglu", "geglu_tanh", "reglu", "swiglu", "bilinear", "glu")
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


class RopeScalingBlock(Block):
    """How rotary wavelengths are stretched; the names are those of Hugging Face's config.json."""

    rope_type: Literal["default", "linear", "llama3", "yarn"] = key("default", "The rule; default: none.")
    factor: Float = key(1.0, "How many times longer sequences become.", ge=1)
    original_max_position_embeddings: Int | None = key(
        None, "Positions that the model was first trained on; llama3 and yarn need it.", unit="tokens", gt=0
    )
    low_freq_factor: Float = key(1.0, "llama3: waves longer than the original length / this are stretched.", gt=0)
    high_freq_factor: Float = key(4.0, "llama3: waves shorter than the original length / this stay.", gt=0)
    beta_fast: Float = key(32.0, "yarn: dimensions that turn more often than this stay.", gt=0)
    beta_slow: Float = key(1.0, "yarn: dimensions that turn less often than this are stretched whole.", gt=0)
    attention_factor: Float | None = key(None, "yarn: factor on the tables. Unset: 0.1 ln(factor) + 1.", gt=0)


class ModelSection(Section):
    """The architecture."""

    num_layers: Int = key(None, "Transformer blocks. Required.", gt=0, le=10_000)
    task: Literal["causal_lm", "sequence_classification", "token_classification", "question_answering"] = key(
        "causal_lm",
        "What the head predicts: the next token; a label for the sequence, from its last token; a label for every "
        "token; or where in the text an answer begins and ends. Data for the last three: "
        "tools/datasets/preprocess_labelled.py.",
        ours=True,
    )
    num_labels: Int | None = key(
        None,
        "Labels of sequence_classification and token_classification. Unset: as many as label_names has.",
        ours=True,
        gt=1,
    )
    label_names: list[str] | None = key(
        None,
        "What the labels stand for, in the order of their numbers: compared with those of the data and of the "
        "checkpoint, and exported.",
        ours=True,
    )
    hidden_size: Int = key(None, "Width of the residual stream. Required; a multiple of num_attention_heads.", gt=0)
    num_attention_heads: Int = key(None, "Query heads. Required; a multiple of model_parallel_size.", gt=0)
    head_dim: Int = key(None, "Width of one head. Unset: hidden_size / num_attention_heads.", gt=0, ours=True)
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
    norm: Literal["layernorm", "rmsnorm", "scalenorm", "non_parametric_layernorm", "te_layernorm", "te_rmsnorm"] = key(
        "layernorm",
        "Normalisation of every block and of the output. non_parametric_layernorm has no weights (OLMo). te_layernorm "
        "and te_rmsnorm are layernorm and rmsnorm, on PyTorch's kernels.",
    )
    layernorm_epsilon: Float = key(1e-5, "Added to the variance in layernorm.", gt=0)
    rms_norm_epsilon: Float = key(1e-8, "Added to the mean square in rmsnorm.", gt=0)
    scalenorm_epsilon: Float = key(1e-8, "The least length that scalenorm divides by.", gt=0)
    norm_zero_centered: Bool = key(
        False, "Norms multiply with 1 + weight, and weights start at 0 and decay towards 1 (Gemma).", ours=True
    )
    use_qk_layernorm: Bool = key(
        False,
        "Normalise queries and keys head by head before positions enter, with one weight per head dimension (Qwen3). "
        "Upstream's couples the heads of a tensor-parallel rank, which made another model at every layout.",
    )
    pos_emb: Literal["learned", "rotary", "sinusoidal", "rpe", "alibi", "none"] = key(
        "learned", "How positions enter the model."
    )
    rotary_pct: Float = key(
        1.0, "Part of each head that rotary embeddings turn: int(head_dim * rotary_pct) dimensions.", gt=0, le=1
    )
    rotary_emb_base: Float = key(10000, "Base of the rotary wavelengths (theta).", gt=1)
    rotary_interleaved: Bool = key(
        False, "Rotary pairs are neighbouring dimensions (GPT-J) instead of halves (GPT-NeoX, Llama).", ours=True
    )
    rope_scaling: RopeScalingBlock | None = key(
        None,
        "Stretches rotary wavelengths for longer sequences, for example {rope_type: llama3, factor: 8, "
        "original_max_position_embeddings: 8192}.",
        ours=True,
    )
    rpe_num_buckets: Int = key(32, "Buckets of distances with pos_emb: rpe.", ge=2)
    rpe_max_distance: Int = key(128, "Distances from here on share rpe's last bucket.", unit="tokens", ge=2)
    sliding_window_width: Int | None = key(
        None, "A token sees itself and this many before it. Unset: all.", unit="tokens", ge=0
    )
    sliding_window_layers: list[Int] | None = key(
        None, "The layers, counted from 0, to which sliding_window_width applies. Unset: all.", ours=True
    )
    opt_pos_emb_offset: Int = key(0, "Learned positions start at this row of the table (OPT uses 2).", ge=0)
    no_weight_tying: Bool = key(False, "Give the output head a matrix of its own instead of the embedding's.")
    gpt_j_residual: Bool = key(
        False, "Attention and feed-forward side by side: x + attn(ln1 x) + mlp(ln2 x), instead of one after the other."
    )
    gpt_j_tied: Bool = key(False, "With gpt_j_residual, feed the first norm's output to both branches.")
    activation: Activation = key(
        "gelu", "Feed-forward non-linearity; geglu, geglu_tanh, reglu, swiglu, bilinear and glu are gated."
    )
    bias_gelu_fusion: Bool = key(
        False,
        "Use the tanh approximation of gelu (and of geglu), which is what upstream's fused kernel computes. Without "
        "it, gelu is exact; gelu_tanh and geglu_tanh are the approximation under names of their own.",
    )
    use_bias_in_attn_linear: Bool = key(True, "Biases on query_key_value and on attention's output matrix.")
    use_bias_in_qkv: Bool = key(
        None, "Biases on query_key_value alone (Qwen2). Unset: use_bias_in_attn_linear.", ours=True
    )
    use_bias_in_head: Bool = key(False, "A bias on the output head (GPT-J); needs no_weight_tying.", ours=True)
    scale_embeddings: Bool = key(False, "Multiply word embeddings by sqrt(hidden_size) (Gemma).", ours=True)
    use_bias_in_mlp: Bool = key(True, "Biases on the feed-forward matrices.")
    attention_config: list[Any] = key(
        None,
        'Attention of each layer, `[[["flash"], "all"]]` or one name per layer. global and flash are both exact causal '
        "attention, computed by the fastest kernel at hand. Unset: global everywhere.",
    )
    attention_backend: Literal["auto", "flash", "flex", "sdpa", "eager"] = key(
        "auto",
        "What computes attention while training. auto: flash (the flash-attn package) where it is installed, else flex "
        "(FlexAttention) on CUDA for windows and ALiBi, else sdpa (torch's fused attention); eager is the definition "
        "in fp32, slow and exact. A named one that cannot serve the model is an error. Generation and evaluation "
        "choose by themselves.",
        ours=True,
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
