"""What must hold between the keys that say which function the model is.

Changes no value, and says nothing of layouts. Invariant: as in `rules`.
"""

from __future__ import annotations

from megatron.config.draft import Draft
from megatron.config.schema import FIELDS, GATED_ACTIVATIONS


def check_heads(draft: Draft) -> None:
    """Head counts against the hidden size and against each other."""
    hidden, heads, kv_heads = draft["hidden_size"], draft["num_attention_heads"], draft["num_kv_heads"]
    if hidden % heads and not draft.is_given("head_dim"):
        draft.problem(
            "num_attention_heads",
            f"num_attention_heads = {heads} does not divide hidden_size = {hidden}. Use a divisor of "
            f"{hidden}{_near(hidden, heads)}, or set head_dim.",
        )
    if heads % kv_heads:
        draft.problem(
            "num_kv_heads",
            f"num_kv_heads = {kv_heads} does not divide num_attention_heads = {heads}. Use a divisor of {heads}"
            f"{_near(heads, kv_heads)}, or remove the key for multi-head attention.",
        )


def check_task(draft: Draft) -> None:
    """A head of labels needs their number, and data that has labels."""
    task, labels, names = draft["task"], draft["num_labels"], draft["label_names"]
    needs_number = task in ("sequence_classification", "token_classification")
    if needs_number and labels is None and names is None:
        draft.problem(
            "task",
            f"task = {task} needs label_names, or num_labels. preprocess_labelled.py prints them: set them to that.",
        )
    for key, value in (("num_labels", labels), ("label_names", names)):
        if not needs_number and value is not None:
            draft.problem(key, f"{key} does nothing with task = {task} ({draft.place('task')}). Remove it.")
    if names is not None and len(names) < 2:
        draft.problem("label_names", f"label_names has {len(names)} of the two or more that a classification needs.")
    elif names is not None and len(names) != labels:
        draft.problem(
            "label_names",
            f"label_names are {len(names)}, num_labels is {labels} ({draft.place('num_labels')}). Remove num_labels, "
            "or name every label.",
        )
    elif names is not None and (twice := sorted({name for name in names if names.count(name) > 1})):
        draft.problem("label_names", f"label_names has {', '.join(twice)} more than once. Each label has its own name.")
    if task == "causal_lm" or draft.inference:
        return
    if draft["train_label_data_paths"] is None:
        draft.problem(
            "task",
            f"task = {task} learns from labels: set train_data_paths and train_label_data_paths (and those of valid "
            "and test) to what tools/datasets/preprocess_labelled.py wrote.",
        )
    if draft["pack_impl"] != "unpacked":
        draft.problem(
            "task",
            f"task = {task} needs one document per sequence, not pack_impl = {draft['pack_impl']} "
            f"({draft.place('pack_impl')}). Set pack_impl: unpacked.",
        )


def check_rotary(draft: Draft) -> None:
    """Rotary embeddings turn pairs of dimensions."""
    width = draft["head_dim"]
    if draft["pos_emb"] != "rotary" or (
        not draft.is_given("head_dim") and draft["hidden_size"] % draft["num_attention_heads"]
    ):
        return
    turned = int(width * draft["rotary_pct"])
    if turned % 2 or turned == 0:
        draft.problem(
            "rotary_pct",
            f"rotary_pct = {draft['rotary_pct']} turns {turned} of {width} dimensions of each head; "
            "the number must be even and above 0. Choose another rotary_pct.",
        )


def check_rope_scaling(draft: Draft) -> None:
    """What each rule of stretching needs."""
    block = draft["rope_scaling"]
    if block is None:
        return
    if draft["pos_emb"] != "rotary":
        draft.problem(
            "rope_scaling", f"rope_scaling needs pos_emb: rotary, not {draft['pos_emb']}. Remove one of the two."
        )
    if block.rope_type in ("llama3", "yarn") and block.original_max_position_embeddings is None:
        draft.problem(
            "rope_scaling",
            f"rope_scaling.rope_type = {block.rope_type} needs original_max_position_embeddings: the positions that "
            "the model was first trained on. Add it to the block.",
        )
    if block.low_freq_factor >= block.high_freq_factor:
        draft.problem(
            "rope_scaling.low_freq_factor",
            f"rope_scaling.low_freq_factor = {block.low_freq_factor:g} must be below high_freq_factor = "
            f"{block.high_freq_factor:g}.",
        )


def check_positions(draft: Draft) -> None:
    """Sequence against positions."""
    if draft["seq_length"] > draft["max_position_embeddings"]:
        draft.problem(
            "max_position_embeddings",
            f"max_position_embeddings = {draft['max_position_embeddings']} is below seq_length = "
            f"{draft['seq_length']}. Raise it or lower seq_length.",
        )


def check_residual(draft: Draft) -> None:
    """gpt_j_tied without gpt_j_residual means nothing."""
    if draft["gpt_j_tied"] and not draft["gpt_j_residual"]:
        draft.problem("gpt_j_tied", "gpt_j_tied = true needs gpt_j_residual: true. Set it, or remove gpt_j_tied.")


def check_gelu(draft: Draft) -> None:
    """Only gelu has a tanh approximation."""
    if draft["bias_gelu_fusion"] and draft["activation"] not in ("gelu", "geglu", "gelu_tanh", "geglu_tanh"):
        draft.problem(
            "bias_gelu_fusion",
            f"bias_gelu_fusion = true asks for tanh gelu, and activation = {draft['activation']}. Remove one of the "
            "two.",
        )


def check_window(draft: Draft) -> None:
    """Which layers a window applies to."""
    layers = draft["sliding_window_layers"]
    if layers is None:
        return
    if draft["sliding_window_width"] is None:
        draft.problem(
            "sliding_window_layers", "sliding_window_layers needs sliding_window_width. Set it, or remove the list."
        )
    foreign = sorted({layer for layer in layers if not 0 <= layer < draft["num_layers"]})
    if foreign or len(set(layers)) < len(layers):
        wrong = f"layer {foreign[0]}" if foreign else "a layer twice"
        draft.problem(
            "sliding_window_layers",
            f"sliding_window_layers names {wrong}; with num_layers = {draft['num_layers']} each of 0 to "
            f"{draft['num_layers'] - 1} may stand there once.",
        )


def check_head_bias(draft: Draft) -> None:
    """A tied head has nothing of its own."""
    if draft["use_bias_in_head"] and not draft["no_weight_tying"]:
        draft.problem(
            "use_bias_in_head",
            "use_bias_in_head = true needs no_weight_tying: true, an output head of its own. Set it, or remove "
            "use_bias_in_head.",
        )


def check_norm(draft: Draft) -> None:
    """Switches of norms that not every norm has."""
    if draft["norm_zero_centered"] and draft["norm"] == "non_parametric_layernorm":
        draft.problem(
            "norm_zero_centered",
            "norm_zero_centered = true shifts the norm's weights, and norm = non_parametric_layernorm has none. Remove "
            "one of the two.",
        )
    if draft["use_qk_layernorm"] and draft["norm"] == "scalenorm":
        draft.problem(
            "use_qk_layernorm",
            "use_qk_layernorm = true does not work with norm = scalenorm, which has no weight per dimension. Use "
            "layernorm or rmsnorm, or remove use_qk_layernorm.",
        )


def check_rpe(draft: Draft) -> None:
    """T5's buckets: half of them exact."""
    if draft["pos_emb"] == "rpe" and draft["rpe_max_distance"] <= draft["rpe_num_buckets"] // 2:
        draft.problem(
            "rpe_max_distance",
            f"rpe_max_distance = {draft['rpe_max_distance']} must be above half of rpe_num_buckets = "
            f"{draft['rpe_num_buckets']}, the distances that have a bucket each. Raise it.",
        )


def check_unused(draft: Draft) -> None:
    """Keys of one kind of norm or position, given beside another kind, change nothing: the user should know."""
    owners = {
        "rpe_num_buckets": ("pos_emb", ("rpe",)),
        "rpe_max_distance": ("pos_emb", ("rpe",)),
        "rotary_interleaved": ("pos_emb", ("rotary",)),
        "scalenorm_epsilon": ("norm", ("scalenorm",)),
    }
    for name, (owner, kinds) in owners.items():
        if draft.is_given(name) and draft[name] != FIELDS[name].default and draft[owner] not in kinds:
            draft.warn(name, f"{name} has no effect with {owner}: {draft[owner]}; it only serves {kinds[0]}")


def check_transformer_engine(draft: Draft) -> None:
    """Upstream's Transformer Engine layers leave out what other keys ask for: there, its model is another one."""
    epsilon = {"layernorm": "layernorm_epsilon", "rmsnorm": "rms_norm_epsilon"}.get(draft["norm"])
    differs: dict[str, list[str]] = {"te_mha": [], "te_layernorm_mlp": []}
    if not draft["use_bias_in_attn_linear"]:
        differs["te_mha"].append("has biases (for the same: use_bias_in_attn_linear: true)")
    if not draft["use_bias_in_mlp"]:
        differs["te_layernorm_mlp"].append("has biases (for the same: use_bias_in_mlp: true)")
    if draft["activation"] in GATED_ACTIVATIONS:
        factor = draft["expansion_factor"]
        width = draft["intermediate_size"] or int((4 if factor is None else factor) * draft["hidden_size"])
        if draft["ffn_size"] != width:
            differs["te_layernorm_mlp"].append(
                f"is {width} wide and not {draft['ffn_size']} (for the same: intermediate_size: {width} with "
                f"mlp_multiple_of: {width})"
            )
    if epsilon is not None and draft[epsilon] != 1e-5:
        differs["te_layernorm_mlp"].append(f"adds 1e-05 in its norm and not {draft[epsilon]:g} ({epsilon}: 1e-5)")
    for name, facts in differs.items():
        if name in draft.idle and facts:
            draft.warn(
                name,
                f"{name} = true: upstream's layer {', '.join(facts)}. This model follows the keys",
            )


ARCHITECTURE_RULES = (
    check_heads,
    check_task,
    check_rotary,
    check_rope_scaling,
    check_positions,
    check_residual,
    check_gelu,
    check_window,
    check_head_bias,
    check_norm,
    check_rpe,
    check_unused,
    check_transformer_engine,
)


def _near(number: int, wish: int) -> str:
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    below = max((n for n in divisors if n < wish), default=None)
    above = min((n for n in divisors if n > wish), default=None)
    near = [str(n) for n in (below, above) if n is not None]
    return f" ({' or '.join(near)} are nearest)" if len(near) == 2 else f" ({near[0]} is nearest)" if near else ""
