"""Upstream keys that this version does not act on, and what becomes of them.

NO_EFFECT: performance switches and dead keys; accepted, with a warning where they ask for something.
REFUSED: what this project does in another way or not at all; accepted only with upstream's neutral value.
NOT_YET: features that do not exist here yet; likewise.
NOT_YET_VALUES, NOT_YET_LAYERS: values of keys of ours that do not work yet.
SET_BY_PROGRAM: upstream's internal fields, which no file should set.
Invariant: a key is here or in the schema, never in both and never in neither.
"""

from __future__ import annotations

from typing import Any

_FUSED = "it chooses a kernel upstream; the fastest correct kernel is chosen here by itself"
_TE = "the same layer runs here on PyTorch's kernels"
_TE_FP8 = "it only serves te_fp8_mha"
_DEAD = "upstream never reads it either"
_LOSS_SCALE = "upstream never reads it; set it inside the fp16 block"

NO_EFFECT: dict[str, tuple[Any, str]] = {
    # key: (value, or values, that ask for nothing; why it has no effect)
    "scaled_upper_triang_masked_softmax_fusion": (False, _FUSED),
    "scaled_masked_softmax_fusion": (False, _FUSED),
    "bias_dropout_fusion": (False, _FUSED),
    "rope_fusion": (False, _FUSED),
    "layernorm_fusion": (False, _FUSED),
    "rmsnorm_fusion": (False, _FUSED),
    "use_flashattn_swiglu": (False, _FUSED),
    "te_columnparallel": (False, _FUSED),
    "te_rowparallel": (False, _FUSED),
    "te_layernorm_mlp": (False, f"{_TE}; use_bias_in_mlp and activation decide on its parameters"),
    "te_mha": (False, f"{_TE}; use_bias_in_attn_linear decides on its parameters"),
    "te_fp8_format": ("hybrid", _TE_FP8),
    "te_fp8_wgrad": (True, _TE_FP8),
    "te_fp8_amax_history_len": (1, _TE_FP8),
    "te_fp8_amax_compute_algo": ("most_recent", _TE_FP8),
    "te_fp8_margin": (0, _TE_FP8),
    "fused_kernels_build_path": (None, "no kernel is built at start"),
    "apply_query_key_layer_scaling": (False, "it only keeps fp16 scores small, and attention accumulates in fp32 here"),
    "attention_softmax_in_fp32": (False, "attention always computes its softmax in fp32 here"),
    "rotary_save_freqs_buffer": (False, "rotary tables are computed, never stored in checkpoints"),
    "use_cpu_initialization": (False, "weights are the same at every layout and are drawn a shard at a time"),
    "synchronize_each_layer": (False, "it only serves upstream's checkpointing code"),
    "contiguous_checkpointing": (False, "it only serves upstream's checkpointing code"),
    "deepspeed_activation_checkpointing": (True, "checkpoint_activations alone decides"),
    "partition_activations": (
        False,
        "recomputed activations stay whole on each rank; the results are the same, memory is higher",
    ),
    "checkpoint_in_cpu": (
        False,
        "recomputed activations stay on the device; the results are the same, memory is higher",
    ),
    "profile_backward": (False, "it only serves upstream's checkpointing code"),
    "use_shared_fs": (True, "index caches are locked and atomic, on shared and on local disks alike"),
    "distributed_backend": ("nccl", "nccl is used on CUDA and gloo on a CPU"),
    "output_layer_parallelism": ("column", "column is the only way"),
    "use_bias_in_norms": (True, "upstream never reads it; layernorm keeps its bias"),
    "num_unique_layers": (None, _DEAD),
    "param_sharing_style": ("grouped", _DEAD),
    "clip_grad": (1.0, "upstream overwrites it; set gradient_clipping"),
    "hysteresis": (2, _LOSS_SCALE),
    "dynamic_loss_scale": (None, _LOSS_SCALE),
    "loss_scale": (None, _LOSS_SCALE),
    "loss_scale_window": (1000.0, _LOSS_SCALE),
    "min_scale": (1.0, _LOSS_SCALE),
    "no_save_optim": (False, _DEAD),
    "short_seq_prob": (0.1, _DEAD),
    "moe_lbl_in_fp32": (False, _DEAD),
    "adlr_autoresume": (False, _DEAD),
    "adlr_autoresume_interval": (1000, _DEAD),
    "deepscale": (False, _DEAD),
    "deepscale_config": (None, _DEAD),
    "weight_server_port": (6000, _DEAD),
    "lazy_mpu_init": (False, _DEAD),
    "gmlp_attn_dim": (64, "it only serves gmlp layers"),
    "data_impl": (("infer", "mmap", "cached"), "the files say themselves which format they have"),
    "onnx_safe": (False, "activations are plain torch operations"),
    "s3_chunk_size": (104857600, "it only serves s3_path"),
    "scheduler": (None, "upstream does not use it either; lr_decay_style, lr_decay_iters, min_lr and warmup decide"),
    "activation_checkpointing": (
        None,
        "upstream does not use it either; recompute_activations and checkpoint_num_layers decide",
    ),
    "checkpoint": (None, "checkpoints are not written by DeepSpeed; save and checkpoint_factor decide"),
    "sparse_attention": (None, _DEAD),
    "sparsity_config": (None, "it only serves the sparse kinds of attention_config"),
    "sparse_gradients": (False, "gradients of the embedding travel dense; the results are the same"),
    "fp16_lm_cross_entropy": (False, "the loss is computed in fp32, a few rows at a time, in less memory than in fp16"),
    "precompute_model_name": (None, "it only serves text_gen_type: precompute"),
}

_BATCH = "A checkpoint goes on at any number of processes; set the batch keys"

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    # key: (neutral values, why it is refused, and what to use)
    "amp": ((None,), "Apex AMP is gone from DeepSpeed. Use precision: bfloat16 or precision: fp16"),
    "elasticity": ((None,), f"elastic training is gone from DeepSpeed. {_BATCH}"),
    "compression_training": (
        (None,),
        "DeepSpeed's compression library is gone. Train without, and quantize afterwards",
    ),
    "curriculum_learning": (
        (None,),
        "sequences have one length. Train with a smaller seq_length first, then continue with load and the full "
        "seq_length (max_position_embeddings keeps the model's size)",
    ),
    "data_efficiency": ((None,), "the order of samples follows from seed alone. Sort or weight the data beforehand"),
    "autotuning": ((None,), "runs are not restarted to be tuned. `./deepy.py --plan` says what fits and ranks layouts"),
    "autotuning_run": ((None,), "runs are not restarted to be tuned. `./deepy.py --plan` says what fits"),
    "use_bnb_optimizer": (
        (False,),
        "8-bit optimizer states do not fit checkpoints that load at any layout. For less memory divide the states over "
        "replicas (zero_optimization.stage: 1), put them into the host's memory (offload_optimizer), or use Lion",
    ),
    "serve_model_weights": (
        (False,),
        "weights are not served to other processes. Export a checkpoint with tools/ckpts/convert_neox_to_hf.py",
    ),
    "s3_path": (
        (None,),
        "checkpoints are written to the bucket itself, not to a folder and then copied. Give save (and load) the "
        "address, s3://bucket/run, with async_save: true if it is slow",
    ),
}

_POST = "post-training (DPO, reward models, KTO, REINFORCE)"
_MAMBA = "Mamba and RWKV layers"
_MOE = "mixture of experts"
_FP8 = "attention in 8-bit floating point"

NOT_YET: dict[str, tuple[tuple[Any, ...], str]] = {
    # key: (neutral values, what the key belongs to)
    **dict.fromkeys(
        ("mamba_selective_scan_fusion", "mamba_causal_conv_fusion", "mamba_inner_func_fusion"), ((False,), _MAMBA)
    ),
    **dict.fromkeys(("mamba_selective_fp32_params", "mamba_use_bias_in_conv"), ((True,), _MAMBA)),
    "mamba_use_bias_in_linears": ((False,), _MAMBA),
    **dict.fromkeys(("dim_att", "head_size", "ffn_dim"), ((None,), _MAMBA)),
    "te_fp8_mha": ((False,), _FP8),
    **dict.fromkeys(("moe_num_experts", "moe_expert_interval", "moe_top_k"), ((1,), _MOE)),
    "moe_router_type": (("sinkhorn",), _MOE),
    "moe_jitter_eps": ((None,), _MOE),
    **{
        f"{sign}{part}{label}_data_paths": ((None,), "pairwise data")
        for sign in ("pos_", "neg_")
        for part in ("train", "valid", "test")
        for label in ("", "_label")
    },
    **{f"{part}_reward_data_paths": ((None,), _POST) for part in ("train", "valid", "test")},
    "train_impl": (("normal",), _POST),
    **dict.fromkeys(("dpo_fp32", "kto_fp32", "fp32_reinforce"), ((True,), _POST)),
    **dict.fromkeys(("dpo_reference_free", "reinforce_leave_one_out"), ((False,), _POST)),
    **dict.fromkeys(("dpo_beta", "kto_beta", "kl_div_beta"), ((0.1,), _POST)),
    **dict.fromkeys(("kto_desirable_weight", "kto_undesirable_weight"), ((1.0,), _POST)),
    "z_loss": ((0.0,), _POST),
    "kl_impl": (("mse",), _POST),
    "online_dataserver_ips": (("localhost",), _POST),
    "online_dataserver_ports": ((10000,), _POST),
}

NOT_YET_VALUES: dict[str, tuple[tuple[Any, ...], str]] = {
    # key of the schema: (values that work, what to do meanwhile)
    "dataset_impl": (("gpt2",), "The other two serve post-training (DPO, reward models, REINFORCE). Use gpt2."),
}

_BLOCKS = (
    "the block-sparse patterns of upstream do not exist here. Use global, which is exact; where it is too slow, "
    "sliding_window_width, for all layers or for those in sliding_window_layers"
)
_RECURRENT = "the layers do not exist here yet. Use global or flash"
_GATING = "spatial gating does not exist here (upstream's fails in its first step). Use global or flash"

# Kinds of layers of attention_config, beside global and flash: why not, and what to do.
NOT_YET_LAYERS: dict[str, str] = {
    "local": "DeepSpeed's local attention does not exist here. Use global in its place, with sliding_window_width: the "
    "tokens that a token sees before itself, and sliding_window_layers: the layers that it is for",
    **dict.fromkeys(("sparse_fixed", "sparse_variable", "bigbird", "bslongformer"), _BLOCKS),
    **dict.fromkeys(("gmlp", "amlp"), _GATING),
    **dict.fromkeys(("mamba", "rwkv"), _RECURRENT),
}

SET_BY_PROGRAM: dict[str, str] = {
    "is_pipe_parallel": "pipe_parallel_size",
    "batch_size": "train_micro_batch_size_per_gpu",
    "zero_reduce_scatter": "zero_optimization.reduce_scatter",
    "zero_contiguous_gradients": "zero_optimization.contiguous_gradients",
    "zero_reduce_bucket_size": "zero_optimization.reduce_bucket_size",
    "zero_allgather_bucket_size": "zero_optimization.allgather_bucket_size",
    "local_rank": "",
    "rank": "",
    "do_train": "",
    "do_valid": "",
    "do_test": "",
    "config_files": "",
    "git_hash": "",
    "user_script": "",
    "curriculum_seqlen": "",
    "comet_experiment": "comet_experiment_name",
}

# What to do until a feature is there, by what NOT_YET calls it; elsewhere: remove the key.
MEANWHILE: dict[str, str] = {
    _POST: "Fine-tune on labels with train_label_data_paths, or leave train_impl at normal.",
    "pairwise data": "Fine-tune on labels with train_label_data_paths.",
    _MAMBA: "Use attention_config with global or flash.",
    _MOE: "Use a dense model: moe_num_experts: 1.",
    _FP8: "Remove the key: precision: bfloat16 computes the same function.",
}

EVERY_OTHER_KEY = frozenset((*NO_EFFECT, *REFUSED, *NOT_YET, *SET_BY_PROGRAM))
