"""checkpoint_validation_with_forward_pass: one forward pass whose result is stored with a checkpoint and repeated
after loading it.

Upstream stores the logits of one made-up sequence and compares them. Here it is the loss of one made-up sequence: a
number that every weight takes part in, that exists at any layout, and that is compared across layouts and precisions
too. Invariant: the pass changes nothing, and does not depend on the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from megatron.checkpoint.manifest import software_versions
from megatron.common.errors import CheckpointError
from megatron.convert.foreign import AnyReader
from megatron.data.loader import Batch
from megatron.engine.train_engine import TrainEngine
from megatron.training.additions import computes_otherwise

# How far rounding may move the loss, relative: ten times (fp32) and once what megatron.training.comparison grants the
# loss of a training step. A wrong tensor moves it by 1e-3 to 1e-1.
TOLERANCES = {"fp32": 1e-5, "fp16": 1e-3, "bfloat16": 5e-3}
STATE = "forward_pass"
_LONGEST = 2048


def forward_pass(engine: TrainEngine, length: int | None = None) -> dict[str, Any]:
    """The loss of the made-up sequence, in nats per token, and how it was computed. Collective.

    length: tokens; unset, as many as the model has positions, rounded down to a power of two (which sequence
    parallelism can divide), or to a multiple of the ranks where a soft prompt leaves nothing of that.
    """
    spec, rows = engine.spec, engine.options.micro_batch_size
    positions = min(_LONGEST, 1 << (spec.max_positions.bit_length() - 1))
    if positions <= spec.num_virtual_tokens:
        positions = spec.max_positions - spec.max_positions % engine.groups.tp_size
    length = length or positions - spec.num_virtual_tokens
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(spec.vocab_size, (_LONGEST + 1,), generator=generator)[: length + 1].expand(rows, -1)
    labels = text[:, 1:].contiguous()
    if spec.task != "causal_lm":
        # Those of answers are bits (megatron.objectives.labels).
        labels %= 4 if spec.task == "question_answering" else spec.num_labels
    # The same sequence on every row and replica: their mean does not depend on how many there are.
    batch = Batch(text[:, :-1].contiguous(), labels, torch.ones(rows, length), [0] * rows)
    loss = engine.evaluate([batch])
    # JSON has no NaN.
    return {"loss": loss if math.isfinite(loss) else str(loss), "precision": engine.options.precision, "tokens": length}


def check_forward(engine: TrainEngine, reader: AnyReader, report: Callable[[str], None]) -> None:
    """Repeat the pass that `reader`'s checkpoint stored the result of, with the weights just loaded. Collective.

    Raises: CheckpointError if the results differ by more than rounding explains.
    """
    stored = reader.state.get(STATE)
    groups = engine.groups
    key = "checkpoint_validation_with_forward_pass"
    if stored is None:
        report(f"warning: {reader.folder} was saved without {key}: there is no result to compare with")
        return
    if new := computes_otherwise(reader, engine.spec):
        report(f"{key}: not compared, because {new} is new")
        return
    if groups.sequence_parallel and (stored["tokens"] + engine.spec.num_virtual_tokens) % groups.tp_size:
        report(
            f"warning: {key}: the stored pass of {stored['tokens']} tokens does not divide over {groups.tp_size} "
            "sequence-parallel ranks: not compared"
        )
        return
    mine = forward_pass(engine, stored["tokens"])
    before, now = float(stored["loss"]), float(mine["loss"])
    difference = abs(now - before) / max(abs(before), 1e-30)
    tolerance = max(TOLERANCES[mine["precision"]], TOLERANCES[stored["precision"]])
    what = f"the forward pass gave a loss of {before:.7g} when {reader.folder} was saved, and {now:.7g} after loading"
    if not difference <= tolerance:
        raise CheckpointError(
            f"{what}: off by {difference:.2g}, rounding explains {tolerance:.0e} ({stored['precision']} then, "
            f"{mine['precision']} now). The files are whole, so the same weights mean something else now. Since then "
            f"{_changed_versions(reader)}; this program may have changed as well. Go back to what it was, or set "
            f"{key}: false to go on nevertheless."
        )
    report(f"{what}: {'identical' if before == now else f'off by {difference:.1g}, which is rounding'}")


def _changed_versions(reader: AnyReader) -> str:
    now = software_versions()
    changed = [
        f"{name} {then} became {now.get(name)}" for name, then in reader.software.items() if then != now.get(name)
    ]
    return ", ".join(changed) or "no version of a library has changed"
