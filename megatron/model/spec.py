"""Every size and switch of a model in one frozen object, all derived values explicit.

The only place where internal names may differ from upstream's YAML keys; `megatron/model/from_config.py` builds it
from a config, `megatron/convert` from a Hugging Face folder or a checkpoint's manifest. This module knows no layout
and no process. Invariant: two equal specs describe the same function of the same weights.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Norm = Literal["layernorm", "rmsnorm"]
PositionEmbedding = Literal["rotary", "learned", "none"]
Residual = Literal["sequential", "parallel", "parallel_tied"]


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
    residual: sequential: x + attn(ln1 x), then + mlp(ln2 .); parallel: x + attn(ln1 x) + mlp(ln2 x) (gpt_j_residual);
        parallel_tied: x + attn(ln1 x) + mlp(ln1 x) (gpt_j_tied).
    tied_head: the output head shares the embedding's weight (not no_weight_tying).
    activation: gelu | gelu_tanh (bias_gelu_fusion) | relu | silu | geglu | swiglu ...
    position_offset: first row of the learned position table that is used (opt_pos_emb_offset).
    rotary_dims: leading dimensions of each head that are rotated (int(head_dim * rotary_pct)).
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

    @property
    def head_dim(self) -> int:
        """D, width of one head."""
        return self.hidden_size // self.num_heads

    @property
    def is_gated(self) -> bool:
        """Whether the MLP multiplies an activated gate with an up projection."""
        return self.activation in GATED_ACTIVATIONS

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
        """The inverse of `to_dict`. Raises TypeError for a field that this version does not know."""
        return cls(**values)


GATED_ACTIVATIONS = frozenset({"geglu", "reglu", "swiglu", "bilinear", "glu"})
