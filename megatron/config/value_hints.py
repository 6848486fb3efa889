"""What a value of the wrong kind was probably meant to be.

Knows how people write numbers, lists and nothing; knows little of single keys. Invariant: a hint is one sentence that
can be followed as it stands, or empty.
"""

from __future__ import annotations

import re
from typing import Any

_SUFFIXES = {"k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_SUFFIXED = re.compile(r"([0-9.]+)\s*([kmbgt])$", re.IGNORECASE)
_FORMULA = re.compile(r"[0-9.]+\s*(\*\*?|/|\+|-)\s*[0-9.]+$")

_ADAM = "Use Adam, or Lion where memory is short"
_ONE_BIT = "compressed communication is gone from DeepSpeed. Use Adam: the update that it approximates"
_EIGHT_BIT = "8-bit states do not fit checkpoints that load at any layout. Use Adam with ZeRO, or Lion"

# Optimizers that users know from upstream and elsewhere, and why they are not here.
OTHER_OPTIMIZERS = {
    "onebitadam": _ONE_BIT,
    "zerooneadam": _ONE_BIT,
    "onebitlamb": _ONE_BIT,
    "sm3": f"it needs whole matrices, and ZeRO updates flat parts of them, where it would be Adagrad. {_ADAM}",
    "adafactor": f"it needs whole matrices, and ZeRO updates flat parts of them. {_ADAM}",
    "muon": f"it needs whole matrices, and ZeRO updates flat parts of them. {_ADAM}",
    "lamb": f"it needs whole matrices' norms, and ZeRO updates flat parts of them. {_ADAM}",
    "adam8bit": _EIGHT_BIT,
    "adamw8bit": _EIGHT_BIT,
    "fusedadam": "Adam runs on the fastest kernel at hand by itself. Use Adam",
    "muadam": "use_mup: true scales Adam itself. Use Adam with it",
    "musgd": "use_mup: true scales SGD itself. Use SGD with it",
    "madgrad": "with decoupled weight decay it is called madgrad_wd. Use that",
    "adagrad": f"it is not supported. {_ADAM}",
}

_FILLED_IN = "Other programs fill it in. Write the value, or remove the key for the default."
_OF_KEY = {
    "fp16": "Write precision: fp16, or {enabled: true}.",
    "bf16": "Write precision: bfloat16, or {enabled: true}.",
    "optimizer": "Write {type: Adam, params: {lr: 1e-4}}.",
    "zero_optimization": "Write {stage: 1}.",
    "optimizer.params.betas": "Write [0.9, 0.95].",
    "warmup": "It is a part of lr_decay_iters, not a number of steps.",
    "attention_config": 'Write [[["flash"], "all"]].',
    "split": 'Write it as text: "969, 30, 1".',
    "fp16.loss_scale": "0 means dynamic.",
    "lr_decay_fraction": "It is a part of train_iters, not a number of steps.",
}


# Values of upstream that a key does not take here, and why.
_SELF_STARTED = "It starts train.py itself, without deepy.py (docs/clusters.md). Remove the key."
_OTHER_VALUES = {
    **{("launcher", name): _SELF_STARTED for name in ("torchrun", "srun", "mpirun", "kubernetes", "accelerate")},
    **{("launcher", name): "Remove the key: one host needs no launcher." for name in ("local", "none", "standard")},
    ("text_gen_type", "precompute"): "Reference log-probabilities serve DPO, which is not supported yet: use another.",
}
_AUTO = (
    "Runs are not tuned by trial: `./deepy.py --plan --gpus N --gpu-memory 80GB` ranks layouts, and prints the lines."
)


def other_value_hint(key: str, value: Any) -> str:
    """` ...` about a value that is none of a key's choices but is one of upstream's, or nothing."""
    hint = _OTHER_VALUES.get((key, str(value).lower()))
    return f" {hint}" if hint else ""


def value_hint(key: str, value: Any, kind: str) -> str:
    """` Write ...`, or nothing. kind: what is required, as `messages` calls it."""
    hint = _OF_KEY.get(key, "")
    if value == "None":
        hint = "Write null for nothing, or remove the key."
    elif value == "auto":
        hint = _AUTO if "batch_size" in key or key == "gradient_accumulation_steps" else _FILLED_IN
    elif kind in ("int", "float") and isinstance(value, list):
        hint = _AUTO if key == "zero_optimization.stage" else hint
    elif kind == "string" and isinstance(value, bool):
        hint = "YAML takes yes, no, on, off, true and false for that. Quote the word."
    elif kind in ("int", "float") and isinstance(value, str):
        hint = _number(value.strip()) or hint
    elif kind == "list" and not hint and isinstance(value, str | int | float):
        shown = [part.strip() for part in value.split(",")] if isinstance(value, str) else [value]
        hint = f"Write [{', '.join(str(part) for part in shown)}]."
    elif kind == "bool" and isinstance(value, str):
        hint = "Write true or false." if value.lower() in ("y", "n", "t", "f", "1", "0") else ""
    return f" {hint}" if hint else ""


def _number(text: str) -> str:
    match = _SUFFIXED.match(text)
    if match:
        scaled = float(match[1]) * _SUFFIXES[match[2].lower()]
        return f"Write {int(scaled) if scaled.is_integer() else scaled}."
    if re.search(r"\s(//|/\*|;)", text):
        return "Comments begin with #."
    if text.endswith(","):
        return "Remove the comma: lines outside of braces end without."
    if re.fullmatch(r"[0-9]+,[0-9]+", text) and not re.fullmatch(r"[0-9]{1,3},[0-9]{3}", text):
        return f"Write {text.replace(',', '.')}."
    if text.endswith("%"):
        try:
            return f"Write {float(text[:-1]) / 100:g}."
        except ValueError:
            return ""
    if re.fullmatch(r"[0-9]{1,3}(,[0-9]{3})+", text):
        return f"Write {text.replace(',', '')}."
    return "Nothing is computed in a file: write the result." if _FORMULA.match(text) else ""
