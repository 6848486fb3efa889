"""A small model of the same shape as a large one, and data for it: for looking at what does not depend on size.

Knows no configuration: plain sizes in, configuration keys out. Invariant: what divides over the ranks of the large
model does so in the small one, and what does not (layers over stages), does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron.data.indexed_writer import IndexedWriter

_HEAD_DIM, _SEQ_LENGTH, _LAYERS, _MICRO_BATCH, _ACCUMULATION = 16, 64, 4, 2, 2
# The printable characters, ids of CharLevelTokenizer.
_FIRST_ID, _LAST_ID = 32, 127


@dataclass(frozen=True)
class Sizes:
    """What the small model is made from, under upstream's names."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_kv_heads: int
    ffn_size: int
    seq_length: int
    micro_batch_size: int
    num_virtual_tokens: int = 0


def scaled_down(sizes: Sizes, tp: int, pp: int, dp: int) -> dict[str, Any]:
    """Configuration keys of a small model that runs at tensor, pipeline and data sizes that divide tp, pp and dp.

    Kept: queries per kv head, the relation of MLP to hidden size, how many layers are left over when stages are filled.
    """
    per_kv_head = sizes.num_attention_heads // sizes.num_kv_heads
    kv_heads = min(sizes.num_kv_heads, max(1, tp if per_kv_head == 1 else math.gcd(sizes.num_kv_heads, tp)))
    heads = kv_heads * per_kv_head
    head_dim = min(_HEAD_DIM, sizes.hidden_size // sizes.num_attention_heads)
    hidden = heads * head_dim
    ffn = max(1, round(sizes.ffn_size / sizes.hidden_size * hidden / (8 * tp))) * 8 * tp
    whole_stages = max(pp, _LAYERS // pp * pp)
    layers = min(sizes.num_layers, whole_stages + sizes.num_layers % pp)
    seq_length = min(sizes.seq_length, max(tp, _SEQ_LENGTH // tp * tp))
    # With the virtual tokens of a soft prompt, whose number stays, it divides over sequence-parallel ranks.
    seq_length += -(seq_length + sizes.num_virtual_tokens) % tp if sizes.num_virtual_tokens else 0
    micro = min(sizes.micro_batch_size, _MICRO_BATCH)
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_kv_heads": kv_heads,
        "intermediate_size": ffn,
        "expansion_factor": None,
        "mlp_multiple_of": ffn,
        "seq_length": seq_length,
        "max_position_embeddings": seq_length + sizes.num_virtual_tokens,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": None,
        "train_batch_size": micro * dp * _ACCUMULATION,
        "tokenizer_type": "CharLevelTokenizer",
        "vocab_file": None,
        "merge_file": None,
        "padded_vocab_size": None,
    }


def write_synthetic_data(folder: Path, num_samples: int, seq_length: int) -> Path:
    """A dataset of made-up documents that fills so many samples; returns its prefix.

    Characters follow one another with preferences, so that there is something to learn.
    """
    generator = np.random.default_rng(7)
    prefix = folder / "made_up_document"
    left = (num_samples + 2) * (seq_length + 1) * 2
    with IndexedWriter(prefix, np.uint16) as writer:
        while left > 0:
            steps = generator.geometric(0.2, int(generator.integers(5, 3 * seq_length)))
            tokens = (_FIRST_ID + np.cumsum(steps) % (_LAST_ID - _FIRST_ID)).astype(np.uint16)
            writer.add_documents(tokens, np.array([tokens.size], np.int32))
            left -= tokens.size
    return prefix
