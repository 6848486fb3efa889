"""The state of this process's random generators as plain tensors, to be saved with a checkpoint and put back.

It seeds nothing. Invariant: after `restore(capture())` every generator continues as if nothing had happened.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch

from megatron.common.errors import CheckpointError


def capture() -> dict[str, torch.Tensor]:
    """The states of Python's, NumPy's, torch's and, where there is one, this rank's CUDA generator."""
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    states = {
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
        "numpy_position": torch.tensor([numpy_state["state"]["pos"], numpy_state["has_gauss"]], dtype=torch.int64),
        "numpy_gauss": torch.tensor([numpy_state["gauss"]], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore(states: Mapping[str, torch.Tensor]) -> None:
    """Put back what `capture` gave. Without a CUDA state (saved on a CPU) that generator is left alone.

    Raises: CheckpointError if a state is missing.
    """
    try:
        version, *words = states["python"].tolist()
        gauss = states["python_gauss"].tolist()
        random.setstate((version, tuple(words), gauss[0] if gauss else None))
        position, has_gauss = states["numpy_position"].tolist()
        key = states["numpy"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", key, position, has_gauss, float(states["numpy_gauss"])))
        torch.set_rng_state(states["torch"])
    except KeyError as error:
        raise CheckpointError(
            f"the checkpoint holds no state of the random generator {error}. Set no_load_rng: true to go on without."
        ) from None
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
