"""Rules between keys: each message, and that what is just allowed passes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron.common.errors import ConfigError
from megatron.config import Config
from megatron.config.upstream_keys import NOT_YET_VALUES

LISTS = {f"{part}_data_paths": ["a", "b"] for part in ("train", "valid", "test")}
ADAM = {"type": "Adam", "params": {"lr": 1e-3}}


@pytest.mark.parametrize(
    ("devices", "changes", "message"),
    [
        (4, {"model_parallel_size": 4}, "num_attention_heads = 6 is not a multiple of model_parallel_size = 4"),
        (1, {"torch_compile": True, "checkpoint_activations": True}, "does not work with recomputation"),
        (1, {"torch_compile": True, "zero_optimization": {"stage": 3}}, "does not work with ZeRO stage 3"),
        (
            2,
            {"model_parallel_size": 2, "num_kv_heads": 3},
            "num_kv_heads = 3 neither divides nor is a multiple of model_parallel_size = 2.",
        ),
        (3, {"model_parallel_size": 3, "intermediate_size": 100}, "ffn_size = 100 is not a multiple"),
        (2, {"model_parallel_size": 2, "padded_vocab_size": 513}, "padded_vocab_size = 513 is not a multiple"),
        (1, {"pos_emb": "rotary", "rotary_pct": 0.4}, "turns 3 of 8 dimensions"),
        (1, {"pos_emb": "rotary", "rotary_pct": 0.1}, "turns 0 of 8 dimensions"),
        (1, {"max_position_embeddings": 31}, "max_position_embeddings = 31 is below seq_length = 32"),
        (1, {"use_bias_in_head": True}, "use_bias_in_head = true needs no_weight_tying: true"),
        (1, {"sliding_window_layers": [0]}, "sliding_window_layers needs sliding_window_width"),
        (1, {"sliding_window_layers": [9], "sliding_window_width": 4}, "sliding_window_layers names layer 9; with num"),
        (1, {"sliding_window_layers": [0, 0], "sliding_window_width": 4}, "names a layer twice"),
        (1, {"rope_scaling": {"rope_type": "linear", "factor": 2}}, "rope_scaling needs pos_emb: rotary, not learned"),
        (
            1,
            {"pos_emb": "rotary", "rope_scaling": {"rope_type": "yarn", "factor": 2}},
            "rope_scaling.rope_type = yarn needs original_max_position_embeddings",
        ),
        (
            1,
            {"pos_emb": "rotary", "rope_scaling": {"low_freq_factor": 4}},
            "rope_scaling.low_freq_factor = 4 must be below high_freq_factor = 4",
        ),
        (1, {"norm": "non_parametric_layernorm", "norm_zero_centered": True}, "has none. Remove one of the two."),
        (1, {"norm": "scalenorm", "use_qk_layernorm": True}, "does not work with norm = scalenorm"),
        (1, {"pos_emb": "rpe", "rpe_max_distance": 16}, "rpe_max_distance = 16 must be above half of rpe_num_buckets"),
        (1, {"anomaly_loss_factor": 0.9}, "anomaly_loss_factor = 0.9 would skip half of all steps"),
        (1, {"anomaly_grad_norm_factor": 1}, "anomaly_grad_norm_factor = 1 would skip half of all steps"),
        (1, {"anomaly_rollbacks": 2}, "anomaly_rollbacks = 2 needs checkpoints to go back to, and save is not set"),
        (1, {"gpt_j_tied": True}, "gpt_j_tied = true needs gpt_j_residual"),
        (1, {"bias_gelu_fusion": True, "activation": "relu"}, "asks for tanh gelu, and activation = relu"),
        (2, {"pipe_parallel_size": 2, "zero_optimization": {"stage": 2}}, "does not work with pipe_parallel_size = 2"),
        (
            1,
            {"zero_optimization": {"stage": 1, "offload_param": {"device": "cpu"}}},
            "needs zero_optimization.stage = 3",
        ),
        (
            2,
            {"pipe_parallel_size": 2, "eval_tasks": ["a"]},
            "eval_tasks while training does not work with pipe_parallel_size = 2 (command line (pipe_parallel_size))",
        ),
        (
            2,
            {"model_parallel_size": 2, "sequence_parallel": True, "eval_tasks": ["a"]},
            "with sequence_parallel = true (command line (sequence_parallel)): no rank holds the whole model.",
        ),
        (
            1,
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "zero_optimization.offload_param.device = nvme needs an extension",
        ),
        (
            1,
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "nvme"}}},
            "command line (zero_optimization): zero_optimization.offload_optimizer.device = nvme needs",
        ),
        (
            1,
            {"fp32_allreduce": True, "communication_data_type": "fp16"},
            "contradicts communication_data_type = fp16 (command line (communication_data_type)).",
        ),
        (5, {"pipe_parallel_size": 5}, "pipe_parallel_size = 5 is more than num_layers = 4"),
        (1, {"min_lr": 0.1, "optimizer": ADAM}, "min_lr = 0.1 is above optimizer.params.lr = 0.001"),
        (1, {"lr_decay_iters": 5, "lr_decay_fraction": 0.5, "train_iters": 9}, "are both set"),
        (1, {"save": "x"}, "needs to know when. Set checkpoint_factor"),
        (1, {"checkpoint_factor": 1.5}, "must be a whole number of steps"),
        (1, {"checkpoint_factor": 1, "checkpoint_scale": "log"}, "must be above 1"),
        (1, {"keep_checkpoint_every": 5}, "says what pruning spares, and nothing is pruned"),
        (1, {"extra_save_iters": [1, -2]}, "holds a negative step"),
        (1, {"finetune": True}, "finetune = true needs load"),
        (1, {"iteration": 5}, "iteration = 5 needs load"),
        (
            1,
            {"use_checkpoint_lr_scheduler": True, "override_lr_scheduler": True},
            "use_checkpoint_lr_scheduler = true cannot go with override_lr_scheduler = true",
        ),
        (1, {"use_checkpoint_lr_scheduler": True, "finetune": True, "load": "c"}, "cannot go with finetune = true"),
        (1, {"data_path": "d", **LISTS}, "are both set"),
        (1, {"train_data_paths": ["a"]}, "valid_data_paths and test_data_paths not. Set all three."),
        (1, {**LISTS, "valid_data_weights": [1.0]}, "valid_data_weights has 1 entries and valid_data_paths 2"),
        (1, {**LISTS, "train_data_weights": [0.0, 0.0]}, "not all 0"),
        (1, {**LISTS, "train_label_data_paths": ["a"]}, "train_label_data_paths has 1 entries"),
        (1, {"split": "a,b"}, "not up to three shares"),
        (1, {"split": "1,2,3,4"}, "not up to three shares"),
        (1, {"split": "0,0,0"}, "the shares add up to 0"),
        (2, {"model_parallel_size": 2, "sequence_parallel": True, "seq_length": 33}, "divides seq_length = 33 over"),
        (1, {"include": "a:0"}, "include = a:0 chooses among the hosts of a hostfile"),
        (1, {"pipe_partition_method": "type:["}, "is not parameters, uniform or type:"),
        (1, {"pipe_partition_method": "layers"}, "is not parameters, uniform or type:"),
        (1, {"deepspeed": False}, "training always runs over DeepSpeed"),
        (1, {"num_layers": None}, "num_layers is missing"),
        (
            1,
            {"dataset_impl": "pairwise"},
            "dataset_impl = pairwise is not supported yet. The other two serve post-training",
        ),
        (1, {"text_gen_type": "precompute"}, "Reference log-probabilities serve DPO"),
        (1, {"train_micro_batch_size_per_gpu": "auto"}, "must be a whole number. Runs are not tuned by trial"),
        (1, {"zero_optimization": {"stage": [0, 1]}}, "must be a whole number. Runs are not tuned by trial"),
        (1, {"moe_min_capacity": 4}, "no key of this version: experts have no capacity"),
        (1, {"optimizer": {"type": "sm3", "params": {"lr": 1}}}, 'optimizer.type = "sm3": it needs whole matrices'),
        (1, {"deepspeed_extra_args": {"fp16": {}}, "fp16": {"enabled": True}}, "deepspeed_extra_args.fp16"),
    ],
)
def test_refused(refused: Callable[..., str], devices: int, changes: dict[str, object], message: str) -> None:
    found = refused(devices, **changes)
    assert message in found
    assert len(found.split("\n")) == 1, "one mistake, one message"


@pytest.mark.parametrize(
    ("devices", "changes"),
    [
        (3, {"model_parallel_size": 3, "intermediate_size": 99}),
        (2, {"model_parallel_size": 2, "num_kv_heads": 2}),
        (2, {"model_parallel_size": 2, "num_kv_heads": 1}),
        (6, {"model_parallel_size": 6, "num_kv_heads": 3}),
        (4, {"pipe_parallel_size": 4}),
        (2, {"model_parallel_size": 2, "sequence_parallel": True}),
        (2, {"model_parallel_size": 2, "eval_tasks": ["a"]}),
        (1, {"sequence_parallel": True, "eval_tasks": ["a"]}),
        (1, {"fp32_allreduce": True, "communication_data_type": "fp32"}),
        (1, {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}),
        (1, {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}),
        (2, {"zero_optimization": {"stage": 2}}),
        (1, {"pipe_parallel_size": 1, "zero_optimization": {"stage": 3}}),
        (1, {"pos_emb": "rotary", "rotary_pct": 0.25}),
        (1, {"max_position_embeddings": 32}),
        (1, {"gpt_j_tied": True, "gpt_j_residual": True}),
        (1, {"min_lr": 1e-3, "optimizer": ADAM}),
        (1, {"save": "x", "extra_save_iters": [0]}),
        (1, {"checkpoint_factor": 1.5, "checkpoint_scale": "log"}),
        (1, {"split": "98/1/1"}),
        (1, {"pack_impl": "unpacked", "allow_chopped": False}),
        (1, {"pack_impl": "pack_until_overflow"}),
        (1, {"pipe_partition_method": "Uniform"}),
        (1, {"pipe_partition_method": "type:transformer|mlp"}),
        (1, {**LISTS, "train_data_weights": [0.0, 2.0]}),
        (1, {"deepspeed_extra_args": {"zero_force_ds_cpu_optimizer": False}}),
    ],
)
def test_accepted(tiny: Callable[..., Config], devices: int, changes: dict[str, object]) -> None:
    assert tiny(devices, **changes).parallel.world_size == devices


def test_whole_documents_cannot_be_asked_of_packed_samples(tiny: Callable[..., Config]) -> None:
    assert "no effect with pack_impl: packed" in tiny(allow_chopped=False).warnings[0]
    assert not tiny(allow_chopped=False, pack_impl="unpacked").warnings


@pytest.fixture
def _epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(NOT_YET_VALUES, "train_epochs", raising=False)


@pytest.mark.usefixtures("_epochs")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_iters": 5}, "train_epochs and train_iters (command line (train_iters)) are both set"),
        (
            {**LISTS, "train_data_weights": [1.0, 2.0]},
            "and train_data_weights (command line (train_data_weights)) asks",
        ),
        ({**LISTS, "weight_by_num_documents": True}, "weight_by_num_documents"),
    ],
)
def test_epochs_go_without_steps_and_weights(
    refused: Callable[..., str], changes: dict[str, object], message: str
) -> None:
    found = refused(train_epochs=2, **changes)
    assert message in found
    assert len(found.split("\n")) == 1


@pytest.mark.usefixtures("_epochs")
def test_epochs_become_steps_once_the_data_is_known(tiny: Callable[..., Config]) -> None:
    config = tiny(train_epochs=2, optimizer=ADAM, data_path="d", lr_decay_fraction=0.5)
    config.require_training()
    assert (config.training.train_iters, config.schedule.lr_decay_iters) == (None, None)
    known = config.with_train_iters(9)
    assert (known.training.train_iters, known.schedule.lr_decay_iters) == (9, 4)
    assert known.origin("train_iters") == "derived from train_epochs = 2"
    assert tiny(train_epochs=2, lr_decay_iters=30).with_train_iters(9).schedule.lr_decay_iters == 30
    with pytest.raises(ConfigError, match="train_epochs = 2 over the training data does not fill one batch"):
        config.with_train_iters(0)


def test_training_needs_steps_optimizer_and_data(tiny: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny().require_training()
    assert [word in str(caught.value) for word in ("train_iters", "optimizer is missing", "data_path")] == [True] * 3
    tiny(train_iters=1, optimizer=ADAM, data_path="d").require_training()


@pytest.mark.parametrize(
    ("changes", "owner"),
    [
        ({"rpe_num_buckets": 8}, "pos_emb: learned"),
        ({"rotary_interleaved": True}, "pos_emb: learned"),
        ({"scalenorm_epsilon": 1e-3}, "norm: layernorm"),
    ],
)
def test_a_key_of_another_kind_is_told_to_have_no_effect(
    tiny: Callable[..., Config], changes: dict[str, object], owner: str
) -> None:
    (warning,) = tiny(**changes).warnings
    assert f"{next(iter(changes))} has no effect with {owner}" in warning
