"""The YAML that describes an imported model: its architecture keys, and how to go on training it.

It reads no configuration. Invariant: loading the file gives the spec that was written, whatever was its source.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron.model.spec import ModelSpec

_PRECISION = {torch.float16: "fp16", torch.bfloat16: "bfloat16"}


def architecture_keys(spec: ModelSpec) -> dict[str, tuple[Any, str]]:
    """Key -> (value, comment) for everything that differs from a key's default, and for the sizes."""
    keys: dict[str, tuple[Any, str]] = {
        "num_layers": (spec.num_layers, "transformer blocks"),
        "hidden_size": (spec.hidden_size, "width of the residual stream"),
        "num_attention_heads": (spec.num_heads, "query heads"),
        "num_kv_heads": (spec.num_kv_heads, "key and value heads"),
        "head_dim": (spec.head_dim, "width of one head"),
        "seq_length": (spec.max_positions, "tokens per training sequence; may be lowered"),
        "max_position_embeddings": (spec.max_positions, "longest sequence the model is made for"),
        **_ffn_keys(spec),
        "norm": (spec.norm, "normalisation"),
    }
    epsilon = {"rmsnorm": "rms_norm_epsilon", "scalenorm": "scalenorm_epsilon"}.get(spec.norm, "layernorm_epsilon")
    keys[epsilon] = (spec.norm_eps, "added for stability")
    keys["activation"] = (spec.activation, "feed-forward non-linearity")
    keys["pos_emb"] = (spec.position, "positions")
    keys |= _position_keys(spec)
    keys |= {
        "gpt_j_residual": (spec.residual != "sequential", "attention and feed-forward side by side"),
        "gpt_j_tied": (spec.residual == "parallel_tied", "one norm for both"),
        "no_weight_tying": (not spec.tied_head, "the output head has a matrix of its own"),
        "use_bias_in_attn_linear": (spec.attention_bias, "bias on attention's output"),
        "use_bias_in_qkv": (spec.qkv_bias, "biases on queries, keys and values"),
        "use_bias_in_mlp": (spec.mlp_bias, "biases in the feed-forward"),
    }
    switches = {
        "use_bias_in_head": (spec.head_bias and spec.task == "causal_lm", "bias on the output head"),
        "task": (spec.task if spec.task != "causal_lm" else "", "what the head predicts"),
        "num_labels": (spec.num_labels if spec.task.endswith("classification") else 0, "its outputs"),
        "label_names": (list(spec.label_names), "what they stand for"),
        "norm_zero_centered": (spec.norm_offset, "norms multiply with 1 + weight"),
        "use_qk_layernorm": (spec.qk_norm, "queries and keys are normalised"),
        "scale_embeddings": (spec.embedding_scale != 1.0, "embeddings times the root of hidden_size"),
    }
    assert spec.embedding_scale in (1.0, math.sqrt(spec.hidden_size)), "no key gives another scale"
    keys |= {name: entry for name, entry in switches.items() if entry[0]}
    keys |= {
        "attention_dropout": (spec.attention_dropout, "of attention weights"),
        "hidden_dropout": (spec.hidden_dropout, "of the residual stream"),
        "init_method": (spec.init_method, "of new matrices, of which an imported model has none"),
        "output_layer_init_method": (spec.output_init_method, "likewise"),
        "init_method_std": (spec.init_std, "likewise"),
    }
    return keys


def _ffn_keys(spec: ModelSpec) -> dict[str, tuple[Any, str]]:
    if not spec.is_gated:
        return {"intermediate_size": (spec.ffn_size, "feed-forward width")}
    # Upstream's arithmetic takes two thirds of it for a gated unit, and then rounds up to the multiple.
    return {
        "intermediate_size": (spec.ffn_size, "feed-forward width, with mlp_multiple_of for exactly this"),
        "mlp_multiple_of": (spec.ffn_size, "rounds the gated width up to it"),
    }


def _position_keys(spec: ModelSpec) -> dict[str, tuple[Any, str]]:
    keys: dict[str, tuple[Any, str]] = {}
    if spec.position == "rotary":
        keys["rotary_pct"] = (rotary_part(spec), "part of each head that is rotated")
        keys["rotary_emb_base"] = (spec.rotary_base, "base of the wavelengths")
        if spec.rotary_interleaved:
            keys["rotary_interleaved"] = (True, "pairs are neighbours")
    if (scaling := spec.rope_scaling) is not None:
        block = {
            "rope_type": scaling.kind,
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_positions or None,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "attention_factor": scaling.attention_factor,
        }
        keys["rope_scaling"] = ({name: value for name, value in block.items() if value is not None}, "stretches them")
    if spec.position == "learned" and spec.position_offset:
        keys["opt_pos_emb_offset"] = (spec.position_offset, "first row of the position table")
    if spec.position == "rpe":
        keys["rpe_num_buckets"] = (spec.rpe_buckets, "of distances")
        keys["rpe_max_distance"] = (spec.rpe_max_distance, "from here on they share the last")
    if spec.window is not None:
        keys["sliding_window_width"] = (spec.window, "tokens before itself that a token sees")
        if spec.window_layers is not None:
            keys["sliding_window_layers"] = (list(spec.window_layers), "the layers that this applies to")
    return keys


def rotary_part(spec: ModelSpec) -> float:
    """The part of each head that, multiplied out and cut to a whole number, is the spec's."""
    part = spec.rotary_dims / spec.head_dim
    # The quotient may lie a rounding error too low.
    return part if int(spec.head_dim * part) == spec.rotary_dims else math.nextafter(part, 2.0)


def yaml_text(spec: ModelSpec, root: Path, carried: Sequence[str], source: Path, dtype: torch.dtype) -> str:
    """The file. root: where the checkpoint will lie; carried: the tokenizer's files there."""
    lines = [
        f"# A model imported from {source.name}. Add the data and the optimizer with a second file.",
        "",
        "# Model",
        *_lines(architecture_keys(spec)),
        "",
        "# Vocabulary",
        *_lines({"vocab_size": (spec.vocab_size, "ids that the model knows, not all of which a tokenizer may use")}),
        *_lines(_tokenizer_keys(root, carried)),
        "",
        "# Run",
        *_lines(
            {
                "load": (str(root), "the imported weights"),
                "finetune": (True, "take the weights and start a new run"),
                "precision": (_PRECISION.get(dtype, "fp32"), "as it was stored"),
            }
        ),
    ]
    return "\n".join(lines) + "\n"


def _tokenizer_keys(root: Path, carried: Sequence[str]) -> dict[str, tuple[Any, str]]:
    if "tokenizer.json" in carried:
        return {
            "tokenizer_type": ("HFTokenizer", "a tokenizer.json of the tokenizers library"),
            "vocab_file": (str(root / "tokenizer.json"), "the tokenizer"),
        }
    if "vocab.json" in carried and "merges.txt" in carried:
        return {
            "tokenizer_type": ("GPT2BPETokenizer", "a vocabulary and merges"),
            "vocab_file": (str(root / "vocab.json"), "the vocabulary"),
            "merge_file": (str(root / "merges.txt"), "the merges"),
        }
    if "tokenizer.model" in carried:
        return {
            "tokenizer_type": ("SPMTokenizer", "a SentencePiece model"),
            "vocab_file": (str(root / "tokenizer.model"), "the tokenizer"),
        }
    return {"padded_vocab_size": (None, "the folder had no tokenizer: set tokenizer_type and vocab_file")}


def _lines(keys: dict[str, tuple[Any, str]]) -> list[str]:
    return [f"{name}: {_plain(value)}  # {comment}" for name, (value, comment) in keys.items()]


def _plain(value: Any) -> str:
    """One line of YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_plain(part)}" for name, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_plain, value)) + "]"
    if isinstance(value, float):
        text = repr(value)
        # YAML takes 1e-05 for a word.
        return text.replace("e", ".0e") if "e" in text and "." not in text else text
    return f'"{value}"' if isinstance(value, str) and not value.replace("_", "").isalnum() else str(value)
