"""transformers as the judge of an exported folder; the only file that imports it.

It writes nothing. Invariant: everything here is computed from the folder's files alone.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron.common.errors import MegatronError


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
    """What transformers computes in fp32 on the CPU from the folder.

    Shapes: tokens [B, T] -> ([B, T, H] after the embedding, after each block but the last, after the final norm), [B,
    T, V].
    """
    model = _transformers().AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    with torch.inference_mode():
        output = model.eval()(tokens, output_hidden_states=True, use_cache=False)
    return list(output.hidden_states), output.logits


def encode(folder: Path, texts: Sequence[str], *, marks: bool = False) -> list[list[int]]:
    """The ids that the folder's tokenizer gives in transformers; marks: with those that it sets around a text."""
    tokenizer = _transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return [tokenizer.encode(text, add_special_tokens=marks) for text in texts]
