"""Every size and switch of a model in one frozen object, all derived values explicit.

The only place where internal names may differ from upstream's YAML keys; `megatron/model/from_config.py` builds it
from a config, `megatron/convert` from a Hugging Face folder or a checkpoint's manifest. This module knows no layout
and no process. Invariant: two equal specs describe the same function of the same weights.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Norm = Literal["layernorm", "rmsnorm", "scalenorm", "non_parametric_layernorm"]
PositionEmbedding = Literal["rotary", "learned", "sinusoidal", "alibi", "rpe", "none"]
Residual = Literal["sequential", "parallel", "parallel_tied"]
Task = Literal["causal_lm", "sequence_classification", "token_classification", "question_answering"]
RopeKind = Literal["linear", "llama3", "yarn"]


@dataclass(frozen=True)
class RopeScaling:
    """How rotary wavelengths are stretched to reach beyond the positions that the model was first trained on.

    kind: linear: all by `factor` (Chen et al. 2023, arXiv 2306.15595); llama3: long ones only, with a ramp between
        the bounds low_freq_factor and high_freq_factor (Llama 3.1); yarn: by parts, with a temperature
        (Peng et al. 2023, arXiv 2309.00071, equations 17 to 23).
    original_positions: what the model was first trained on. attention_factor: yarn's factor on the tables; None: 0.1
    ln(factor) + 1.
    """

    kind: RopeKind
    factor: float
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


@dataclass(frozen=True)
class LowRank:
    """Low-rank updates of linear layers, trained in their stead (Hu et al. 2021, LoRA, arXiv 2106.09685).

    rank, alpha: the update is alpha / rank times a product of two matrices of that rank. targets: the layers, by the
    last part of their name (query_key_value, query, key_value, dense, linear1, linear2, gate, up). dropout: of the
    update's input.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = 0.0


@dataclass(frozen=True)
class SoftPrompt:
    """Virtual tokens before every sequence, trained in the weights' stead (Lester et al. 2021, arXiv 2104.08691).

    num_tokens: how many. They come before the text's tokens and take the positions 0 .. num_tokens - 1.
    init_range: they start uniform between -init_range and init_range; init_ids: they start as these words' embeddings,
    one id for each, where given.
    """

    num_tokens: int
    init_range: float = 0.5
    init_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class WidthScaling:
    """Maximal update parametrization, so that learning rates found at the base widths fit these (muP).

    Source: Yang et al. 2022, arXiv 2203.03466, table 8: what grows with the width is a multiplier here; what it does
    to initial values and learning rates is `megatron.model.width_scaling`.
    hidden_size, ffn_size, num_heads, num_kv_heads, head_dim: of the base model. embedding_mult, position_mult: word
    and position embeddings are multiplied with them. attention_temp, output_temp: what goes into the softmax of
    attention and that of the output is divided by them.
    """

    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    embedding_mult: float = 1.0
    position_mult: float = 1.0
    attention_temp: float = 1.0
    output_temp: float = 1.0


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer.

    num_layers: transformer blocks (key num_layers).
    hidden_size: H.
    num_heads: N, query heads (num_attention_heads).
    num_kv_heads: G, key and value heads; equal to num_heads for multi-head attention.
    ffn_size: F, width between the two linear layers of the MLP (after gating arithmetic).
    vocab_size: ids that the tokenizer knows; the rows beyond are padding, masked out of softmax, argmax and loss.
    padded_vocab_size: V, rows of the embedding and of the head (make_vocab_size_divisible_by).
    max_positions: longest sequence (max_position_embeddings).
    head_dim: D, width of one head; 0 given stands for hidden_size / num_heads.
    norm_offset: the norm multiplies with 1 + weight instead of weight (norm_zero_centered; Gemma).
    residual: sequential: x + attn(ln1 x), then + mlp(ln2 .); parallel: x + attn(ln1 x) + mlp(ln2 x) (gpt_j_residual);
        parallel_tied: x + attn(ln1 x) + mlp(ln1 x) (gpt_j_tied).
    tied_head: the output head shares the embedding's weight (not no_weight_tying). head_bias: it adds a bias.
    activation: gelu | gelu_tanh (bias_gelu_fusion) | relu | silu | geglu | geglu_tanh | swiglu ...
    position_offset: first row of the learned position table that is used (opt_pos_emb_offset).
    rotary_dims: leading dimensions of each head that are rotated (int(head_dim * rotary_pct)).
    rotary_interleaved: pairs are neighbours (GPT-J), not halves (GPT-NeoX).
    rpe_buckets, rpe_max_distance: of T5's relative positions.
    attention_bias: on attention's output; qkv_bias: on its projections (None given stands for attention_bias).
    qk_norm: queries and keys are normalised head by head, before the rotation (use_qk_layernorm; Qwen3).
    window: a token sees itself and that many before it (sliding_window_width); window_layers: only in these layers
        (None: in all).
    task, num_labels: causal_lm predicts the next token; the others have a head of num_labels outputs of its own:
        for the last token of a sequence, for every token, or for the start and the end of an answer.
    label_names: what the outputs of the head stand for, in their order; empty where nobody said.
    lora: low-rank updates beside the weights, or None.
    soft_prompt: virtual tokens before every sequence, or None.
    embedding_scale: what the word embeddings are multiplied with (scale_embeddings: sqrt(H), with mup the base's H).
    mup: multipliers of the widths over those of a base model, or None. init_scale: all matrices start that much larger.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    ffn_size: int
    vocab_size: int
    padded_vocab_size: int
    max_positions: int
    norm: Norm = "layernorm"
    norm_eps: float = 1e-5
    activation: str = "gelu"
    position: PositionEmbedding = "rotary"
    position_offset: int = 0
    rotary_dims: int = 0
    rotary_base: float = 10000.0
    residual: Residual = "sequential"
    tied_head: bool = True
    attention_bias: bool = True
    mlp_bias: bool = True
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    init_method: str = "normal"
    output_init_method: str = "scaled_normal"
    init_std: float = 0.02
    # What later versions added: the default is what a checkpoint without the field means.
    head_dim: int = 0
    norm_offset: bool = False
    rotary_interleaved: bool = False
    rope_scaling: RopeScaling | None = None
    rpe_buckets: int = 32
    rpe_max_distance: int = 128
    qkv_bias: bool | None = None
    head_bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    window_layers: tuple[int, ...] | None = None
    embedding_scale: float = 1.0
    lora: LowRank | None = None
    task: Task = "causal_lm"
    num_labels: int = 0
    label_names: tuple[str, ...] = ()
    mup: WidthScaling | None = None
    init_scale: float = 1.0
    soft_prompt: SoftPrompt | None = None

    def __post_init__(self) -> None:
        # Frozen: what stands for something else is replaced once, here, so that equal models have equal specs.
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        if self.qkv_bias is None:
            object.__setattr__(self, "qkv_bias", self.attention_bias)
        if self.window is None or self.window_layers == tuple(range(self.num_layers)):
            object.__setattr__(self, "window_layers", None)

    @property
    def is_gated(self) -> bool:
        """Whether the MLP multiplies an activated gate with an up projection."""
        return self.activation in GATED_ACTIVATIONS

    @property
    def has_position_layer(self) -> bool:
        """Whether positions are added to the word embeddings, by a layer of their own."""
        return self.position in ("learned", "sinusoidal")

    @property
    def num_virtual_tokens(self) -> int:
        """Positions that a soft prompt takes before those of the text."""
        return self.soft_prompt.num_tokens if self.soft_prompt else 0

    @property
    def max_text_positions(self) -> int:
        """Tokens of the longest text."""
        return self.max_positions - self.num_virtual_tokens

    @property
    def base(self) -> ModelSpec:
        """The model without what fine-tuning has put beside its weights."""
        return replace(self, lora=None, soft_prompt=None)

    @property
    def input_scale(self) -> float:
        """What the word embeddings are multiplied with."""
        return self.embedding_scale * (self.mup.embedding_mult if self.mup else 1.0)

    @property
    def position_scale(self) -> float:
        """What added positions are multiplied with."""
        return self.mup.position_mult if self.mup else 1.0

    @property
    def attention_scale(self) -> float | None:
        """What scores are multiplied with; None: 1 / sqrt(D)."""
        return 1.0 / (self.head_dim * self.mup.attention_temp) if self.mup else None

    @property
    def output_scale(self) -> float:
        """What the normed hidden states are multiplied with before the head."""
        return self.mup.hidden_size / self.hidden_size / self.mup.output_temp if self.mup else 1.0

    def layer_window(self, layer: int) -> int | None:
        """How many tokens before itself a token of this layer sees; None: all."""
        return self.window if self.window_layers is None or layer in self.window_layers else None

    def kv_heads_on_rank(self, tp_size: int) -> int:
        """Kv heads that one tensor-parallel rank works with: its share, or one that several ranks share.

        Raises ValueError if neither divides the other.
        """
        if self.num_kv_heads % tp_size and tp_size % self.num_kv_heads:
            raise ValueError(
                f"{self.num_kv_heads} kv heads do not divide over {tp_size} ranks, nor the ranks over them"
            )
        return max(1, self.num_kv_heads // tp_size)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint's manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelSpec:
        """The inverse of `to_dict`, also through JSON. Raises TypeError for a field that this version does not know."""
        values = dict(values)
        if isinstance(values.get("rope_scaling"), dict):
            values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
        if isinstance(values.get("lora"), dict):
            lora = values["lora"]
            values["lora"] = LowRank(**{**lora, "targets": tuple(lora["targets"])})
        if isinstance(values.get("mup"), dict):
            values["mup"] = WidthScaling(**values["mup"])
        if isinstance(values.get("soft_prompt"), dict):
            prompt = values["soft_prompt"]
            values["soft_prompt"] = SoftPrompt(**{**prompt, "init_ids": tuple(prompt["init_ids"])})
        for name in ("window_layers", "label_names"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        return cls(**values)


GATED_ACTIVATIONS = frozenset({"geglu", "geglu_tanh", "reglu", "swiglu", "bilinear", "glu"})
