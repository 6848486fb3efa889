"""What must hold between keys. Each rule says where, what was given, what is required and what to do.

Changes no value. Invariant: a configuration that passes all rules can be built and run on the layout it names.
"""

from __future__ import annotations

import math
import re

from megatron.config.architecture_rules import ARCHITECTURE_RULES
from megatron.config.deepspeed_blocks import check_deepspeed_blocks
from megatron.config.draft import Draft
from megatron.config.schema.tuning import virtual_tokens
from megatron.config.texts import check_texts
from megatron.config.tuning_rules import TUNING_RULES, text_and_prompt
from megatron.config.width_rules import WIDTH_RULES


def check_tensor_parallel(draft: Draft) -> None:
    """Everything that tensor-parallel ranks divide."""
    tp, length = draft["model_parallel_size"], draft["seq_length"]
    virtual = virtual_tokens(draft["soft_prompt_tuning"])
    if draft["sequence_parallel"] and (length + virtual) % tp:
        lengths = text_and_prompt(virtual, length) if virtual else f"seq_length = {length}"
        draft.problem(
            "sequence_parallel",
            f"sequence_parallel = true divides {lengths} over model_parallel_size = {tp} ranks. "
            f"Use {f'num_tokens: {virtual - (length + virtual) % tp + tp}' if virtual else 'a multiple of it'}, or "
            "remove sequence_parallel.",
        )
    for name in ("num_attention_heads", "ffn_size", "padded_vocab_size"):
        if name in draft.failed or draft[name] is None or draft[name] % tp == 0:
            continue
        place = name if draft.is_given(name) else "model_parallel_size"
        draft.problem(
            place, f"{name} = {draft[name]} is not a multiple of model_parallel_size = {tp}. Change one of the two."
        )
    kv_heads = draft["num_kv_heads"]
    # Fewer kv heads than ranks are replicated: each rank takes the one that its query heads share.
    if draft.is_given("num_kv_heads") and kv_heads % tp and tp % kv_heads:
        draft.problem(
            "num_kv_heads",
            f"num_kv_heads = {kv_heads} neither divides nor is a multiple of model_parallel_size = {tp}. Change one of "
            "the two.",
        )


def check_zero(draft: Draft) -> None:
    """DeepSpeed's pipeline works with ZeRO 1 only."""
    stage, stages = draft["zero_stage"], draft["pipe_parallel_size"]
    if stage >= 2 and stages >= 2:
        draft.problem(
            "zero_optimization.stage",
            f"zero_optimization.stage = {stage} does not work with pipe_parallel_size = {stages}: pipeline stages "
            "need their "
            f"whole gradients until the last micro-batch. Use stage 1, or pipe_parallel_size: 1 with stage {stage}.",
        )
    block = draft["zero_optimization"]
    for name in ("offload_optimizer", "offload_param"):
        offload = getattr(block, name, None)
        if offload is not None and offload.device == "nvme":
            draft.problem(
                f"zero_optimization.{name}.device",
                f"zero_optimization.{name}.device = nvme needs an extension that DeepSpeed compiles, which is not "
                "supported yet. Use cpu.",
            )
            return
    if (
        block is not None
        and block.stage < 3
        and (
            block.cpu_offload_param
            or block.cpu_offload_params
            or (block.offload_param and block.offload_param.device != "none")
        )
    ):
        draft.problem(
            "zero_optimization",
            f"offload_param needs zero_optimization.stage = 3, not {block.stage}. Use stage 3, or remove it.",
        )


def check_tasks(draft: Draft) -> None:
    """Tasks while training are scored by the model in training, which some rank must hold whole."""
    if draft["eval_tasks"] is None or draft.inference:
        return
    splits = {
        "pipe_parallel_size": draft["pipe_parallel_size"] >= 2,
        "sequence_parallel": draft["sequence_parallel"] and draft["model_parallel_size"] > 1,
        "zero_stage": draft["zero_stage"] == 3,
    }
    for name, is_split in splits.items():
        if is_split:
            draft.problem(
                "eval_tasks",
                f"eval_tasks while training does not work with {name} = {str(draft[name]).lower()} "
                f"({draft.place(name)}): no rank holds the whole model. Remove it, and run evaluate.py on the "
                "checkpoint.",
            )


def check_compile(draft: Draft) -> None:
    """What compiled blocks cannot be combined with."""
    if not draft["torch_compile"]:
        return
    if draft["recompute_activations"] != "none":
        draft.problem(
            "torch_compile",
            f"torch_compile = true does not work with recomputation ({draft.place('recompute_activations')}): the "
            "second forward pass keeps other tensors than the compiled first one. Remove one of the two.",
        )
    if draft["zero_stage"] == 3:
        draft.problem(
            "torch_compile",
            f"torch_compile = true does not work with ZeRO stage 3 ({draft.place('zero_stage')}), which fetches "
            "weights in the middle of a block. Use stage 1 or 2, or remove torch_compile.",
        )


def check_allreduce(draft: Draft) -> None:
    """Gradients travel in one format."""
    travelling = draft["communication_data_type"]
    if draft["fp32_allreduce"] and travelling not in (None, "fp32"):
        draft.problem(
            "fp32_allreduce",
            f"fp32_allreduce = true contradicts communication_data_type = {travelling} "
            f"({draft.place('communication_data_type')}). Remove one of the two.",
        )


def check_stages(draft: Draft) -> None:
    """Every pipeline stage needs a layer."""
    stages, layers = draft["pipe_parallel_size"], draft["num_layers"]
    if stages > layers:
        draft.problem(
            "pipe_parallel_size",
            f"pipe_parallel_size = {stages} is more than num_layers = {layers}. Use at most {layers}.",
        )


def check_learning_rate(draft: Draft) -> None:
    """Bounds of the schedule."""
    lr, min_lr = draft["lr"], draft["min_lr"]
    if lr is not None and min_lr > lr:
        draft.problem("min_lr", f"min_lr = {min_lr:g} is above optimizer.params.lr = {lr:g}. Lower min_lr or raise lr.")
    for beta in draft["betas"]:
        if not 0 <= beta < 1:
            draft.problem(
                "optimizer.params.betas", f"optimizer.params.betas = {list(draft['betas'])}: each must lie in [0, 1)."
            )


def check_checkpoint(draft: Draft) -> None:
    """When to save, and where to load from."""
    if draft.inference:
        # Nothing is saved, and what a run saved is found in its `save` as well.
        if draft["iteration"] is not None and draft["load"] is None and draft["save"] is None:
            draft.problem(
                "iteration",
                f"iteration = {draft['iteration']} needs load or save: the folder that holds the checkpoint. Set load.",
            )
        return
    factor, extra = draft["checkpoint_factor"], draft["extra_save_iters"]
    if draft["save"] is not None and factor is None and extra is None:
        draft.problem(
            "save",
            f"save = {draft['save']} needs to know when. Set checkpoint_factor (steps between checkpoints) or "
            "extra_save_iters.",
        )
    if factor is not None and draft["checkpoint_scale"] == "linear" and (factor < 1 or factor != int(factor)):
        draft.problem(
            "checkpoint_factor",
            f"checkpoint_factor = {factor:g} must be a whole number of steps with checkpoint_scale: linear.",
        )
    if factor is not None and draft["checkpoint_scale"] == "log" and factor <= 1:
        draft.problem(
            "checkpoint_factor", f"checkpoint_factor = {factor:g} must be above 1 with checkpoint_scale: log."
        )
    keep_every = draft["keep_checkpoint_every"]
    if keep_every is not None and draft["keep_last_n_checkpoints"] is None:
        draft.problem(
            "keep_checkpoint_every",
            f"keep_checkpoint_every = {keep_every} says what pruning spares, and nothing is pruned. Set "
            "keep_last_n_checkpoints, or remove the key.",
        )
    if extra is not None and min(extra, default=0) < 0:
        draft.problem("extra_save_iters", f"extra_save_iters = {extra} holds a negative step. Remove it.")
    if draft["load"] is None and (draft["iteration"] is not None or draft["finetune"]):
        name = "finetune" if draft["finetune"] else "iteration"
        draft.problem(
            name, f"{name} = {str(draft[name]).lower()} needs load: the folder that holds the checkpoint. Set load."
        )


def check_anomalies(draft: Draft) -> None:
    """What counts as a leap, and where a roll-back goes to."""
    for name in ("anomaly_loss_factor", "anomaly_grad_norm_factor"):
        if name not in draft.failed and 0 < draft[name] <= 1:
            draft.problem(
                name,
                f"{name} = {draft[name]:g} would skip half of all steps: it is a multiple of the running median. "
                "Use a number above 1, such as 2 for the loss or 10 for the gradient norm; 0 is off.",
            )
    if draft.is_given("anomaly_rollbacks") and draft["anomaly_rollbacks"] and not draft["save"]:
        draft.problem(
            "anomaly_rollbacks",
            f"anomaly_rollbacks = {draft['anomaly_rollbacks']} needs checkpoints to go back to, and save is not set. "
            "Set save and checkpoint_factor, or remove anomaly_rollbacks.",
        )


def check_schedule_source(draft: Draft) -> None:
    """Which schedule a continued run follows."""
    if not draft["use_checkpoint_lr_scheduler"]:
        return
    for other, why in (
        ("override_lr_scheduler", "one takes the checkpoint's schedule, the other this configuration's"),
        ("finetune", "it begins a new run, whose schedule is this configuration's"),
    ):
        if draft[other]:
            draft.problem(
                "use_checkpoint_lr_scheduler",
                f"use_checkpoint_lr_scheduler = true cannot go with {other} = true: {why}. Remove one of the two.",
            )


def check_data(draft: Draft) -> None:
    """One prefix, or lists for all three parts, each with as many weights and labels."""
    parts = ("train", "valid", "test")
    lists = [part for part in parts if draft[f"{part}_data_paths"] is not None]
    if lists and draft["data_path"] is not None:
        draft.problem(
            "data_path",
            f"data_path and {lists[0]}_data_paths ({draft.place(f'{lists[0]}_data_paths')}) are both set. Keep one "
            "of the two.",
        )
    if lists and len(lists) < 3:
        absent = " and ".join(f"{part}_data_paths" for part in parts if part not in lists)
        draft.problem(f"{lists[0]}_data_paths", f"{lists[0]}_data_paths is set and {absent} not. Set all three.")
    for part in parts:
        paths = draft[f"{part}_data_paths"]
        for name in (f"{part}_data_weights", f"{part}_label_data_paths"):
            beside = draft[name]
            if beside is not None and paths is None:
                given = f", not data_path ({draft.place('data_path')})" if draft["data_path"] is not None else ""
                draft.problem(name, f"{name} needs {part}_data_paths{given}. Set it to a list of as many prefixes.")
            elif beside is not None and len(beside) != len(paths or ()):
                draft.problem(
                    name,
                    f"{name} has {len(beside)} entries and {part}_data_paths {len(paths or ())}. Give one for each.",
                )
        weights = draft[f"{part}_data_weights"]
        if weights is not None and (min(weights, default=0) < 0 or sum(weights) == 0):
            draft.problem(
                f"{part}_data_weights", f"{part}_data_weights = {weights}: weights must be 0 or more, and not all 0."
            )


def check_packing(draft: Draft) -> None:
    """Packed samples cut every document where they end."""
    if not draft["allow_chopped"] and draft["pack_impl"] == "packed":
        draft.warn(
            "allow_chopped",
            "allow_chopped: false has no effect with pack_impl: packed, which cuts documents where samples end",
        )


def check_epochs(draft: Draft) -> None:
    """Passes and steps exclude each other; weights would break the passes."""
    if draft["train_epochs"] is None:
        return
    if draft["train_iters"] is not None:
        draft.problem(
            "train_epochs",
            f"train_epochs and train_iters ({draft.place('train_iters')}) are both set. Keep one of the two.",
        )
    for name in ("train_data_weights", "weight_by_num_documents"):
        if draft[name]:
            draft.problem(
                "train_epochs",
                f"train_epochs passes over every prefix equally often, and {name} ({draft.place(name)}) asks for "
                "other shares. Remove one of the two.",
            )


def check_split(draft: Draft) -> None:
    """Three shares."""
    text = draft["split"]
    try:
        shares = [float(part) for part in text.replace("/", ",").split(",")]
    except ValueError:
        shares = []
    if shares and len(shares) <= 3 and sum(shares) == 0:
        draft.fail("split", f'split = "{text}": the shares add up to 0. Give at least one a part.')
    if not 1 <= len(shares) <= 3 or not all(math.isfinite(s) and s >= 0 for s in shares) or sum(shares) <= 0:
        draft.problem(
            "split",
            f'split = "{text}" is not up to three shares for training, validation and test. Write for example "969, '
            '30, 1".',
        )


def check_deepspeed(draft: Draft) -> None:
    """DeepSpeed is the engine."""
    if not draft["deepspeed"]:
        draft.problem("deepspeed", "deepspeed = false: training always runs over DeepSpeed. Remove the key.")


def check_profile(draft: Draft) -> None:
    """A range of steps, and something to record in it."""
    first, last = draft["profile_step_start"], draft["profile_step_stop"]
    if first > last and (draft["profile"] or draft["memory_profiling"]):
        draft.problem(
            "profile_step_stop",
            f"profile_step_stop = {last} is before profile_step_start = {first} ({draft.place('profile_step_start')}). "
            "Raise it: both steps are profiled.",
        )
    if draft["memory_profiling"] and draft["device"] == "cpu":
        draft.warn("memory_profiling", "memory_profiling has no effect on a CPU: it records CUDA memory")


def check_hosts(draft: Draft) -> None:
    """Filters need something to filter."""
    for name in ("include", "exclude"):
        if draft[name] is not None and draft["hostfile"] is None:
            draft.problem(
                name, f"{name} = {draft[name]} chooses among the hosts of a hostfile. Set hostfile, or remove it."
            )


def check_partition(draft: Draft) -> None:
    """How DeepSpeed deals layers to stages."""
    method = draft["pipe_partition_method"]
    kind, _, pattern = method.partition(":")
    if method.lower() in ("parameters", "uniform"):
        return
    try:
        good = kind.lower() == "type" and bool(pattern) and re.compile(pattern) is not None
    except re.error:
        good = False
    if not good:
        draft.problem(
            "pipe_partition_method",
            f'pipe_partition_method = "{method}" is not parameters, uniform or type:<regular expression>.',
        )


RULES = (
    check_hosts,
    check_partition,
    check_profile,
    *ARCHITECTURE_RULES,
    check_tensor_parallel,
    check_zero,
    check_allreduce,
    check_compile,
    *TUNING_RULES,
    *WIDTH_RULES,
    check_stages,
    check_tasks,
    check_learning_rate,
    check_checkpoint,
    check_anomalies,
    check_schedule_source,
    check_data,
    check_packing,
    check_epochs,
    check_split,
    check_deepspeed,
    check_deepspeed_blocks,
    check_texts,
)
