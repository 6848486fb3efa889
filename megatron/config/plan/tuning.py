"""Fine-tuning in a plan: low-rank updates and soft prompts beside the weights, and which parameters learn.

Invariant: names, shapes and who learns are those of `megatron.model.lora` for the same keys.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import replace

from megatron.config.plan.architecture import BLOCK, SOFT_PROMPT, Kept, Layer, Parameter
from megatron.config.plan.gradients import with_gradients
from megatron.config.schema import ModelSection
from megatron.config.schema.tuning import TuningSection

_PROMPT = "soft_prompt.weight"
# Row-parallel layers divide their inputs, all others their outputs.
ROW_PARALLEL = ("dense", "linear2")


def tuned(
    layers: Sequence[Layer], model: ModelSection, tuning: TuningSection, *, staged: bool = False
) -> tuple[Layer, ...]:
    """The layers with their low-rank updates, every parameter marked as learning or frozen, and what follows.

    staged: as in `with_gradients`.
    """
    targets = _targets(model, tuning)
    found = []
    for layer in layers:
        changed = _updated(layer, tuning, targets) if layer.kind == BLOCK and targets else layer
        parameters = tuple(replace(p, trained=_is_trained(p.name, model, tuning)) for p in changed.parameters)
        found.append(replace(changed, parameters=parameters))
    if tuning.num_virtual_tokens:
        # Behind the word embeddings, which leave the dropout to it.
        table = Parameter(_PROMPT, (tuning.num_virtual_tokens, model.hidden_size), sharded=False)
        table = replace(table, trained=_is_trained(_PROMPT, model, tuning))
        found.insert(1, Layer("soft_prompt", SOFT_PROMPT, (table,), kept=found[0].kept))
        found[0] = replace(found[0], kept=())
    return with_gradients(found, model, dropped_updates=tuning.lora_dropout > 0, staged=staged)


def _targets(model: ModelSection, tuning: TuningSection) -> set[str]:
    if tuning.lora_rank is None:
        return set()
    attention = {"query_key_value"} if model.num_kv_heads == model.num_attention_heads else {"query", "key_value"}
    inner = {"gate", "up"} if model.is_gated else {"linear1"}
    meaning = {
        "all": {*attention, *inner, *ROW_PARALLEL},
        "attention": {*attention, "dense"},
        "mlp": {*inner, "linear2"},
        "query_key_value": attention,
        "linear1": inner,
    }
    return {name for target in tuning.lora_targets for name in meaning.get(target, {target})}


def _updated(layer: Layer, tuning: TuningSection, targets: set[str]) -> Layer:
    rank = tuning.lora_rank
    assert rank is not None
    parameters = list(layer.parameters)
    kept, flops = list(layer.kept), 0
    for weight in layer.parameters:
        owner, _, own = weight.name.rpartition(".")
        module = owner.rpartition(".")[2]
        if own != "weight" or module not in targets:
            continue
        out, into = weight.shape
        parameters += _pair(owner, out, into, rank, weight, is_row=module in ROW_PARALLEL)
        kept += _pair_kept(tuning, into, rank, is_row=module in ROW_PARALLEL, in_attention=module not in ROW_PARALLEL)
        flops += 2 * rank * (out + into)
    return replace(
        layer, parameters=tuple(parameters), kept=tuple(kept), flops=(*layer.flops, ("low_rank_updates", flops))
    )


def _pair(owner: str, out: int, into: int, rank: int, weight: Parameter, *, is_row: bool) -> Iterator[Parameter]:
    # The matrix at the divided features is divided; the other one is whole on every rank.
    yield Parameter(f"{owner}.lora.a", (rank, into), weight.sharded and is_row, weight.layer)
    yield Parameter(f"{owner}.lora.b", (out, rank), weight.sharded and not is_row, weight.layer)


def _pair_kept(tuning: TuningSection, into: int, rank: int, *, is_row: bool, in_attention: bool) -> Iterator[Kept]:
    yield Kept("input of the second low-rank matrix", rank, in_attention=in_attention)
    if tuning.lora_dropout:
        # The dropped-out input, and the mask: a factor on a CPU, a byte on a GPU.
        yield Kept("dropped-out input of an update", into, divided=is_row, in_attention=in_attention)
        yield Kept("update's dropout", into, divided=is_row, in_attention=in_attention, only_on="cpu")
        yield Kept("update's dropout", into, divided=is_row, in_attention=in_attention, only_on="cuda", word=1)


def _is_trained(name: str, model: ModelSection, tuning: TuningSection) -> bool:
    """Frozen patterns go first; what fine-tuning adds learns, and with it only what train_parameters names."""

    def fits(patterns: list[str] | None) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns or ())

    if fits(tuning.freeze_parameters):
        return False
    if name.endswith((".lora.a", ".lora.b")) or name == _PROMPT:
        return True
    is_added = tuning.lora_rank is not None or tuning.num_virtual_tokens
    if is_added and model.task != "causal_lm" and name.startswith("head."):
        return True
    if tuning.train_parameters or is_added:
        return fits(tuning.train_parameters)
    return True
