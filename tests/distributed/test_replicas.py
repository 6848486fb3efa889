"""check_replicas: silent on sound runs at every layout and precision; a nudged replica or an unreduced gradient is
named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.engine.replicas import checksum
from tests.distributed.broken import checked_training, run_that_strays, watched_gradients
from tests.distributed.layout_cases import Case
from tests.integration.run_cases import write_config

Ranks = Callable[..., list[Any]]

TIED = {"tied_head": True, "residual": "sequential"}


@pytest.mark.parametrize(
    "case",
    [
        Case(tp=2, dp=2, sequence_parallel=True, steps=3),
        Case(tp=2, pp=2, precision="bfloat16", steps=3, spec=TIED),
        Case(tp=2, dp=2, zero_stage=2, precision="fp16", steps=3, spec={"num_kv_heads": 1}),
        Case(pp=2, dp=2, steps=3, spec=TIED),
        Case(tp=2, dp=2, zero_stage=3, steps=3),
    ],
    ids=lambda case: f"tp{case.tp}-pp{case.pp}-dp{case.dp}-zero{case.zero_stage}-{case.precision}",
)
def test_sound_runs_pass(ranks: Ranks, case: Case) -> None:
    assert ranks(checked_training, case.world_size, case, 1) == [""] * case.world_size


@pytest.mark.parametrize(("precision", "zero_stage"), [("fp32", 1), ("bfloat16", 1), ("fp32", 2), ("fp32", 3)])
def test_every_gradient_is_seen(ranks: Ranks, precision: str, zero_stage: int) -> None:
    case = Case(tp=2, dp=2, zero_stage=zero_stage, precision=precision, steps=1)
    seen = ranks(watched_gradients, 4, case)
    # 4 layers of 12 tensors, the embedding, the final norm's two and the head; ZeRO divides them over dp.
    assert len(seen[0] | seen[2]) == 52
    assert (0 < len(seen[0]) < 52) == (zero_stage < 3)
    assert seen[0] == seen[1]


def test_an_unreduced_norm_is_named_at_the_first_step(ranks: Ranks) -> None:
    case = Case(tp=2, sequence_parallel=True, steps=2)
    for message in ranks(checked_training, 2, case, 1, "norms"):
        assert "at step 1 " in message
        assert "layers.0.input_layernorm.weight (gradient) differs over tp: ranks 0 | 1" in message
        assert "and " in message
        assert "more" in message


def test_a_nudged_weight_of_a_replica_is_named_with_its_rank(ranks: Ranks) -> None:
    case = Case(dp=3, global_batch=6, steps=4)
    name = "layers.1.mlp.linear1.weight"
    for message in ranks(checked_training, 3, case, 1, "weight", 1, name, 3):
        assert "at step 3 " in message
        assert f"{name} (weight before the step) differs over dp: ranks 0, 2 | 1" in message


def test_the_interval_decides_when_it_is_found(ranks: Ranks) -> None:
    """A master that strays at step 1 is found at the first step that is a multiple of the interval."""
    case = Case(tp=2, steps=6)
    for message in ranks(checked_training, 2, case, 4, "master", 1, "layers.2.input_layernorm.weight", 1):
        assert "at step 4 " in message
        assert " (weight before the step) differs over tp: ranks 0 | 1" in message
    assert ranks(checked_training, 2, case, 0, "master", 1, "layers.2.input_layernorm.weight", 1) == ["", ""]


def test_a_tied_embedding_that_strays_is_named(ranks: Ranks) -> None:
    case = Case(pp=3, steps=3, spec=TIED)
    for message in ranks(checked_training, 3, case, 1, "master", 2, "embedding.word_embeddings.weight", 2):
        assert "at step 2 " in message
        assert "embedding.word_embeddings.weight (master) differs over the tied stages: ranks 0 | 2" in message


def test_the_key_stops_a_run_before_it_saves(ranks: Ranks, tmp_path: Path) -> None:
    """A nudge behind step 3 is found at step 4, the next that is due, and before its checkpoint."""
    config = write_config(tmp_path, "run", check_replicas=2, checkpoint_factor=4)
    for code, text, step in ranks(run_that_strays, 2, str(config), 4, timeout=120):
        assert code == 8
        assert "at step 4 " in text
        assert "layers.0.mlp.linear1.weight (weight before the step) differs over dp: ranks 0 | 1" in text
        assert step == 3
    assert not list((tmp_path / "run").glob("global_step*"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_checksums_of_fragments_add_up_and_see_every_bit(dtype: torch.dtype) -> None:
    tensor = torch.randn(7, 13, generator=torch.Generator().manual_seed(1)).to(dtype)
    flat = tensor.flatten()
    whole = checksum(tensor)
    assert int(whole) == int(checksum(flat[:40]) + checksum(flat[40:41], 40) + checksum(flat[41:], 41))
    assert int(checksum(tensor.t().contiguous())) != int(whole)
    for position in (0, 40, 90):
        other = flat.clone()
        other[position] = torch.nextafter(other[position], other.new_tensor(9.0))
        assert int(checksum(other)) != int(whole)
    swapped = flat.clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    assert int(checksum(swapped)) != int(whole)


def test_checksum_tells_zeros_of_two_signs_and_small_opposite_changes_apart() -> None:
    assert int(checksum(torch.tensor([0.0]))) != int(checksum(torch.tensor([-0.0])))
    bits = torch.arange(100, dtype=torch.int32)
    other = bits.clone()
    other[0] += 3
    other[1] -= 1
    assert int(checksum(bits.view(torch.float32))) != int(checksum(other.view(torch.float32)))


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(2))
    whole = int(checksum(tensor))
    monkeypatch.setattr("megatron.engine.replicas._CHUNK_ELEMENTS", 64)
    assert int(checksum(tensor)) == whole
