"""Values that follow from others: precision, ZeRO stage, model sizes, vocabulary, update rule, schedule.

A set value is never overwritten; where it contradicts what follows from the others, that is a problem. Layout and
batch are in `layout`. Invariant: after these, no key that the program computes with is left open, unless a problem
says why.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron.config.draft import Draft, SkipRule, did_you_mean
from megatron.config.layout import round_up
from megatron.config.schema import GATED_ACTIVATIONS
from megatron.config.schema.execution import Bf16Block, Fp16Block
from megatron.config.schema.learning import decay_steps
from megatron.config.update_rule import derive_optimizer
from megatron.config.upstream_keys import NOT_YET_LAYERS
from megatron.config.vocabulary import Vocabulary, vocabulary_of
from megatron.config.width_rules import derive_base_shapes

# Kinds of layers in attention_config; both are exact causal attention.
KINDS = ("global", "flash")


def derive_precision(draft: Draft) -> None:
    """One precision out of `precision`, `fp16` and `bf16`; a contradiction names both keys and their places."""
    asked = _asked_precisions(draft)
    given = draft["precision"]
    if given == "auto":
        on_device = "bfloat16" if draft["device"] == "cuda" else "fp32"
        given = asked[0][1] if asked else on_device
    wishes = [*asked, *([("precision", given)] if given is not None else [])]
    for name, meaning in wishes[1:]:
        first, its_meaning = wishes[0]
        if meaning != its_meaning:
            draft.fail(
                name,
                f"{_wish(draft, name)} asks for {meaning}, and {_wish(draft, first)} ({draft.place(first)}) for "
                f"{its_meaning}. Remove one of the two.",
            )
    precision = wishes[0][1] if wishes else "fp32"
    for block, meaning in (("fp16", "fp16"), ("bf16", "bfloat16")):
        if precision == meaning and draft[block] is not None and not _is_on(draft, block):
            draft.fail(
                wishes[0][0],
                f"{_wish(draft, wishes[0][0])} contradicts {block}.enabled = false "
                f"({draft.place(f'{block}.enabled')}). Remove one of the two.",
            )
    if draft["precision"] in (None, "auto"):
        default = draft["device"] if draft["precision"] else "the default"
        draft.origins["precision"] = f"derived from {asked[0][0] if asked else default}"
    draft.values["precision"] = precision
    if precision == "fp16":
        draft.derive("fp16", Fp16Block(enabled=True), "precision")
    if precision == "bfloat16":
        draft.derive("bf16", Bf16Block(enabled=True), "precision")


def _asked_precisions(draft: Draft) -> list[tuple[str, str]]:
    """What the blocks ask for: (dotted key, precision), old spellings included."""
    asked = []
    fp16 = draft["fp16"]
    if fp16 is not None and fp16.fp16 is not None and "enabled" in fp16.model_fields_set and fp16.fp16 != fp16.enabled:
        draft.fail(
            "fp16.fp16",
            f"fp16.fp16 = {str(fp16.fp16).lower()} contradicts fp16.enabled = {str(fp16.enabled).lower()} "
            f"({draft.place('fp16.enabled')}). Remove fp16.fp16.",
        )
    if _is_on(draft, "fp16"):
        kind = str(fp16.type or "fp16").lower()
        # Old files (Pythia 1B's) ask for bfloat16 through the fp16 block.
        if kind in ("bfloat16", "bf16", "bfp16"):
            draft.warn(
                "fp16.type", f"fp16.type = {fp16.type} is taken as precision: bfloat16; its loss scale is not used"
            )
            asked.append(("fp16.type", "bfloat16"))
        elif kind in ("fp16", "float16", "half"):
            asked.append(("fp16.enabled", "fp16"))
        else:
            draft.fail("fp16.type", f'fp16.type = "{fp16.type}" is not one of fp16, bfloat16. Remove it.')
    if _is_on(draft, "bf16"):
        asked.append(("bf16.enabled", "bfloat16"))
    return asked


def _is_on(draft: Draft, block: str) -> bool:
    value = draft[block]
    if value is None:
        return False
    return bool(value.fp16 if block == "fp16" and value.fp16 is False else value.enabled)


def _wish(draft: Draft, name: str) -> str:
    """`bf16.enabled = true`, as the user may have written it."""
    if name == "precision":
        return f"precision = {draft['precision']}"
    return f"fp16.type = {draft['fp16'].type}" if name == "fp16.type" else f"{name} = true"


def derive_zero(draft: Draft) -> None:
    """The stage that runs: at least 1."""
    block = draft["zero_optimization"]
    if block is not None and block.stage == 0 and "stage" in block.model_fields_set:
        draft.warn("zero_optimization.stage", "ZeRO stage 0 runs as stage 1: the same result with less memory")
    draft.derive("zero_stage", max(1, block.stage) if block is not None else 1, "zero_optimization.stage")


def derive_model(draft: Draft) -> None:
    """Sizes that follow from the architecture keys."""
    required = ("num_layers", "hidden_size", "num_attention_heads", "seq_length")
    missing = [name for name in required if name not in draft.failed and draft[name] is None]
    if len(missing) == len(required) and not draft.meant & set(required):
        draft.problem(
            "", f"no model is given: {', '.join(missing)} are missing. Name a model's file too, as configs/125M.yml."
        )
    else:
        for name in missing:
            if name not in draft.meant:
                draft.problem(name, f"{name} is missing. It has no default; set it.")
    draft.failed.update(missing)
    if "norm" not in draft.failed and draft["norm"].startswith("te_"):
        # Transformer Engine's kernels of the same functions.
        plain = draft["norm"].removeprefix("te_")
        draft.warn("norm", f"norm = {draft['norm']} is computed as {plain}, the same function on PyTorch's kernels")
        draft.values["norm"] = plain
    draft.derive("num_kv_heads", draft["num_attention_heads"], "num_attention_heads")
    draft.derive("use_bias_in_qkv", draft["use_bias_in_attn_linear"], "use_bias_in_attn_linear")
    if not {"hidden_size", "num_attention_heads"} & draft.failed:
        draft.derive("head_dim", draft["hidden_size"] // draft["num_attention_heads"], "hidden_size")
    if draft["max_position_embeddings"] is None:
        draft.derive("max_position_embeddings", draft["seq_length"], "seq_length")


def derive_labels(draft: Draft) -> None:
    """As many labels as there are names."""
    if names := draft["label_names"]:
        draft.derive("num_labels", len(names), "label_names")


def derive_ffn(draft: Draft) -> None:
    """The feed-forward width; a gated activation takes two thirds of the asked width, then halves the pair."""
    hidden, multiple = draft["hidden_size"], draft["mlp_multiple_of"]
    asked, factor = draft["intermediate_size"], draft["expansion_factor"]
    if asked is not None and factor is not None:
        draft.fail(
            "expansion_factor",
            f"expansion_factor and intermediate_size ({draft.place('intermediate_size')}) are both set. Keep one.",
        )
    width = asked if asked is not None else int(factor * hidden) if factor is not None else 4 * hidden
    asked_width = width
    if draft["activation"] in GATED_ACTIVATIONS:
        pair = int(width * 2 / 3)
        width, joint = round_up(pair // 2, multiple), round_up(pair, 2 * multiple)
        if joint != 2 * width:
            # Upstream builds two matrices that do not fit each other here and fails at the first forward pass.
            given = "mlp_multiple_of" if draft.is_given("mlp_multiple_of") else "intermediate_size"
            draft.fail(
                given,
                f"{draft['activation']} takes two thirds of the feed-forward width: int({asked_width} * 2/3) = {pair} "
                f"columns for gate and up, rounded to {joint} by 2 * mlp_multiple_of = {2 * multiple}; and {pair} // 2 "
                f"= {pair // 2} rows for down, rounded to {width}; {joint} is not 2 * {width}. For a final width X set "
                "intermediate_size: X and mlp_multiple_of: X.",
            )
    else:
        width = round_up(width, multiple)
    source = (
        "intermediate_size" if asked is not None else "expansion_factor" if factor is not None else "4 * hidden_size"
    )
    draft.derive("ffn_size", width, source)


def derive_attention(draft: Draft) -> None:
    """attention_config as one name per layer."""
    layers, given = draft["num_layers"], draft["attention_config"]
    if given is None:
        draft.derive("attention_config", ["global"] * layers, "num_layers")
        return
    kinds: list[str] = []
    described = 0
    for entry in given:
        if isinstance(entry, str):
            kinds.append(entry)
            described += 1
            continue
        pattern, count = entry if isinstance(entry, list) and len(entry) == 2 else ([], None)
        counts = count == "all" or (isinstance(count, int) and not isinstance(count, bool) and count > 0)
        if not (isinstance(pattern, list) and pattern and counts):
            draft.fail(
                "attention_config",
                f'attention_config holds {json.dumps(entry)}. Each entry is a name, or [[names], count or "all"]; for '
                f"all layers write {json.dumps([[_names_in(entry) or ['flash'], 'all']])}.",
            )
        wanted = layers - len(kinds) if count == "all" else int(str(count)) * len(pattern)
        described += wanted
        # More than there are layers is only counted.
        wanted = min(wanted, layers + len(pattern))
        kinds += [str(name) for name in pattern * -(-wanted // len(pattern))][:wanted]
    unknown = [kind for kind in dict.fromkeys(kinds) if kind not in KINDS]
    reasons: dict[str, list[str]] = {}
    for kind in unknown:
        missing = f"it is no kind of layer.{did_you_mean(kind, KINDS) or ' Use global or flash.'}"
        reasons.setdefault(f"{NOT_YET_LAYERS[kind]}." if kind in NOT_YET_LAYERS else missing, []).append(kind)
    for reason, names in reasons.items():
        draft.problem("attention_config", f"attention_config asks for {', '.join(names)}: {reason}")
    if unknown:
        raise SkipRule
    if described != layers:
        draft.fail(
            "attention_config",
            f"attention_config describes {described} layer{'' if described == 1 else 's'} and num_layers = {layers}. "
            f"{_for_all_layers(given, kinds, layers)}",
        )
    draft.values["attention_config"] = kinds


def _names_in(entry: Any) -> list[str]:
    """The kinds of layers that a broken entry names."""
    if isinstance(entry, str):
        return [entry] if entry in KINDS else []
    inner = [_names_in(part) for part in entry] if isinstance(entry, list) else []
    return list(dict.fromkeys(name for names in inner for name in names))


def _for_all_layers(given: list[Any], kinds: list[str], layers: int) -> str:
    """The user's own pattern, for as many layers as there are."""
    if not kinds:
        return "Remove the key for global in all layers."
    if len(set(kinds)) == 1:
        pattern = kinds[:1]
    elif len(given) == 1 and isinstance(given[0], list):
        pattern = given[0][0]
    elif len(kinds) > layers:
        # What the list says of the layers that there are.
        return f"Write {json.dumps(kinds[:layers])}, or change num_layers."
    else:
        # The list from its beginning again, until every layer has a kind.
        return f"Write {json.dumps([[kinds, 'all']])}, or one kind for each layer."
    return f"Write {json.dumps([[pattern, 'all']])}."


def derive_vocabulary(draft: Draft) -> None:
    """Ids of the tokenizer and rows of the embedding."""
    kind, file = draft["tokenizer_type"], draft["vocab_file"]
    try:
        vocabulary = vocabulary_of(kind, file)
    except (ValueError, TypeError, KeyError) as error:
        draft.problem("vocab_file", f"vocab_file = {file} is not a file for {kind}: {error}.")
        vocabulary = Vocabulary(None)
    rows, size = draft["padded_vocab_size"], vocabulary.size
    divisor = draft["make_vocab_size_divisible_by"] * draft["model_parallel_size"]
    if draft.is_given("vocab_size"):
        if size is not None and not vocabulary.assumed and draft["vocab_size"] < size:
            draft.problem(
                "vocab_size",
                f"vocab_size = {draft['vocab_size']} is below the tokenizer's {size} ids. Use at least {size}, or "
                "remove the key.",
            )
        size = draft["vocab_size"]
    elif size is None:
        if rows is not None:
            draft.derive("vocab_size", rows, "padded_vocab_size, as the tokenizer's file is not there")
            if file is not None and not Path(file).exists():
                draft.warn(
                    "vocab_file", f"{file} is not there yet; all {rows} rows of the embedding count as known ids"
                )
        return
    if vocabulary.assumed and not draft.is_given("vocab_size"):
        if file is None:
            draft.warnings.append(f"vocab_file is not set; {size:,} ids are assumed, as {kind} usually has")
        else:
            draft.warn("vocab_file", f"{file} is not there yet; {size:,} ids are assumed from its name")
    draft.derive("vocab_size", size, "vocab_file")
    draft.derive("padded_vocab_size", round_up(size, divisor), "the tokenizer and make_vocab_size_divisible_by")
    if draft["padded_vocab_size"] < size:
        whose = "vocab_size =" if draft.is_given("vocab_size") else "the tokenizer's"
        draft.problem(
            "padded_vocab_size",
            f"padded_vocab_size = {rows} is below {whose} {size} ids. Use at least {size}, or remove the key.",
        )


def derive_schedule(draft: Draft) -> None:
    """Steps until min_lr is reached."""
    iters, fraction = draft["train_iters"], draft["lr_decay_fraction"]
    if draft.is_given("lr_decay_iters") and fraction is not None:
        draft.problem("lr_decay_fraction", "lr_decay_fraction and lr_decay_iters are both set. Keep one of the two.")
    if iters:
        source = "train_iters" if fraction is None else "lr_decay_fraction * train_iters"
        draft.derive("lr_decay_iters", decay_steps(iters, fraction), source)


def derive_recomputation(draft: Draft) -> None:
    """One answer out of checkpoint_activations and recompute_activations; a contradiction names both keys."""
    asked, mode = draft["checkpoint_activations"], draft["recompute_activations"]
    if mode is None:
        mode = "full" if asked else "none"
        draft.derive("recompute_activations", mode, "checkpoint_activations")
    elif draft.is_given("checkpoint_activations") and asked != (mode != "none"):
        draft.fail(
            "recompute_activations",
            f"recompute_activations = {mode} contradicts checkpoint_activations = {str(asked).lower()} "
            f"({draft.place('checkpoint_activations')}). Remove one of the two.",
        )
    draft.derive("checkpoint_activations", mode != "none", "recompute_activations")
    if draft["checkpoint_num_layers"] > 1 and mode != "full" and not draft.inference:
        draft.warn(
            "checkpoint_num_layers",
            f"checkpoint_num_layers = {draft['checkpoint_num_layers']} has no effect with recompute_activations {mode}",
        )


def derive_generation(draft: Draft) -> None:
    """Where prompts come from."""
    if draft["text_gen_type"] is None:
        draft.derive(
            "text_gen_type", "input-file" if draft["sample_input_file"] else "unconditional", "sample_input_file"
        )


# Each with the keys that stay unknown where it cannot be finished.
DERIVATIONS = (
    (derive_precision, ()),
    (derive_zero, ("zero_stage",)),
    (derive_model, ("num_kv_heads", "max_position_embeddings")),
    (derive_labels, ("num_labels",)),
    (derive_ffn, ("ffn_size",)),
    (derive_attention, ()),
    (derive_base_shapes, ("mup_base_shapes",)),
    (derive_vocabulary, ("vocab_size", "padded_vocab_size")),
    (derive_optimizer, ("optimizer_type", "lr", "betas", "eps", "momentum")),
    (derive_schedule, ("lr_decay_iters",)),
    (derive_recomputation, ("recompute_activations",)),
    (derive_generation, ("text_gen_type",)),
)
