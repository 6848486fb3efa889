"""What the ranks of a layout do with an imported model: one step without moving, and a checkpoint of it."""

from __future__ import annotations

from pathlib import Path

from megatron.checkpoint import Reader, save
from megatron.engine.state import export_pieces, import_weights
from megatron.model.build import vocabulary_parameters
from megatron.model.spec import ModelSpec
from megatron.training.saving import share
from tests.distributed.layout_cases import Case, make_engine, rank_batches


def spec_values(spec: ModelSpec, tp_size: int) -> dict[str, object]:
    """The fields of a spec whose vocabulary divides over the ranks."""
    return {**vars(spec), "padded_vocab_size": -(-spec.vocab_size // tp_size) * tp_size}


def step_in_place(case: Case, native: Path, root: Path) -> tuple[float, float]:
    """Validation and training loss; with a learning rate of 0 the first moments are the gradients, but for a factor."""
    engine = make_engine(case)
    source = Reader(native)
    import_weights(engine, source)
    valid = engine.evaluate(rank_batches(7, case, engine.groups.dp_rank))
    loss = engine.train_step(rank_batches(0, case, engine.groups.dp_rank), 0.0).loss
    save(
        root,
        1,
        export_pieces(engine),
        {**source.state, "model_spec": engine.spec.to_dict()},
        rank=engine.groups.global_rank,
        world_size=engine.groups.topology.world_size,
        share=share,
        used_rows=dict.fromkeys(vocabulary_parameters(engine.spec), engine.spec.vocab_size),
    )
    return valid, loss
