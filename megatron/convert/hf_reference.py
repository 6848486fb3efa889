"""transformers as the judge of an exported folder; the only file that imports it.

It writes nothing. Invariant: everything here is computed from the folder's files alone.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron.common.errors import MegatronError

_TASK_CLASSES = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def _transformers() -> Any:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise MegatronError(
            f"the export is checked by transformers, which cannot be imported ({error}). "
            "Install it: pip install -r requirements/requirements.txt"
        ) from None
    transformers.utils.logging.disable_progress_bar()
    return transformers


def hidden_states_and_logits(folder: Path, tokens: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What transformers computes in fp32 on the CPU from the folder, with the class that its config.json names.

    Shapes: tokens [B, T] -> ([B, T, H] after the embedding, after each block but the last, after the final norm), and
    logits [B, T, V]; of labels [B, T, num_labels], for a label per sequence [B, num_labels].
    """
    transformers = _transformers()
    name = (json.loads((folder / "config.json").read_text()).get("architectures") or [""])[0]
    kind = next((task for task in _TASK_CLASSES if name.endswith(task)), "ForCausalLM")
    model = getattr(transformers, f"AutoModel{kind}").from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    )
    model.config.pad_token_id = None  # it would look for padding in sequences that have none
    with torch.inference_mode():
        rows = [model.eval()(row[None], output_hidden_states=True, use_cache=False) for row in tokens]
    hidden = [torch.cat(states) for states in zip(*(row.hidden_states for row in rows), strict=True)]
    if kind == "ForQuestionAnswering":
        return hidden, torch.cat([torch.stack([row.start_logits, row.end_logits], -1) for row in rows])
    return hidden, torch.cat([row.logits for row in rows])


def encode(folder: Path, texts: Sequence[str], *, marks: bool = False) -> list[list[int]]:
    """The ids that the folder's tokenizer gives in transformers; marks: with those that it sets around a text."""
    tokenizer = _transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return [tokenizer.encode(text, add_special_tokens=marks) for text in texts]
