"""From which version of transformers on an exported folder means what was checked here.

config.json is written for 4.40 and later; what a switch needs beyond that is no matter of its keys, but of code that
older versions do not have. Some of them refuse the folder, some compute something else: the exporter says so.
Source: one model of each family and switch, exported and loaded in 4.40.2, 4.41.2, 4.42.4, 4.43.4, 4.44.2, 4.45.2,
4.46.3, 4.48.3, 4.51.3, 4.57.1 and 5; a version stands for the oldest of these that gave the native logits.
"""

from __future__ import annotations

from megatron.model.spec import ModelSpec

_SCALING = {"llama": (4, 43), "gpt_neox": (4, 45), "falcon": (4, 45), "qwen2": (4, 45)}
_KNOWS_LINEAR = frozenset({"llama", "gpt_neox", "falcon"})
_HEAD_DIM = {"llama": (4, 45), "mistral": (4, 43), "qwen2": (4, 48)}


def needed_versions(model_type: str, spec: ModelSpec) -> list[tuple[tuple[int, int], str]]:
    """(version, what older ones make of it) for every part of the model that 4.40 does not compute; newest first."""
    needs: list[tuple[tuple[int, int], str]] = []
    if model_type == "qwen3":
        needs.append(((4, 51), "older ones do not know qwen3"))
    if (scaling := spec.rope_scaling) is not None:
        if scaling.kind == "yarn":
            needs.append(((4, 51), "older ones refuse yarn, or compute it from another original length"))
        elif scaling.kind == "llama3" or model_type not in _KNOWS_LINEAR:
            version = _SCALING.get(model_type, (4, 48))
            needs.append((version, f"older ones refuse rope_scaling {scaling.kind}, or ignore it"))
    if model_type in _HEAD_DIM and spec.head_dim * spec.num_heads != spec.hidden_size:
        needs.append((_HEAD_DIM[model_type], "older ones do not know head_dim, and refuse the shapes"))
    if spec.window is not None and model_type == "mistral":
        needs.append(((4, 42), "in older ones a window of W is one of W + 1 tokens"))
    if spec.window is not None and model_type in ("qwen2", "qwen3"):
        needs.append(((4, 57), "older ones apply the window to other layers, or not at all"))
    if model_type == "falcon" and spec.residual == "parallel_tied" and 1 < spec.num_kv_heads < spec.num_heads:
        needs.append(((4, 41), "older ones expect two norms in a block, and start them at random"))
    if model_type == "llama" and spec.mlp_bias:
        needs.append(((4, 41), "older ones leave out mlp_bias"))
    return sorted(needs, reverse=True)
