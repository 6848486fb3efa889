"""Keys that GPT-NeoX once had, or that its forks have, and what took their place.

Upstream stops on them with a traceback. Invariant: none of these is a key of the schema or of `upstream_keys`.
"""

from __future__ import annotations

# Read as the key on the right, with a note.
RENAMED: dict[str, str] = {
    "save_interval": "checkpoint_factor",
    "gas": "gradient_accumulation_steps",
    "label_data_paths": "train_label_data_paths",
    "num_experts": "moe_num_experts",
    "expert_interval": "moe_expert_interval",
}

_WARMUP = "warm-up is a part of the schedule: set warmup to these steps divided by lr_decay_iters"
_MOE = "mixture of experts is divided over the tensor-parallel ranks alone. Remove the key"
_AUX_LOSS = "routers have no loss of their own. Remove the key"

# Refused with these words.
GONE: dict[str, str] = {
    "mlp_type": "the feed-forward follows from activation. For llama's set activation: swiglu, use_bias_in_mlp: false, "
    "and its width X as intermediate_size: X with mlp_multiple_of: X; for the regular one remove the key",
    "decay_lr_to": "min_lr is the key: set it to this part of optimizer.params.lr",
    "warmup_iter": _WARMUP,
    "warmup_iters": _WARMUP,
    "warmup_steps": _WARMUP,
    "batch_scheduling": "the batch has one size for the whole run. Set train_batch_size, and continue with load for "
    "another one",
    "sparsity": "attention_config is the key. Remove it where it is none",
    "geglu": "activation: geglu is the key",
    "detect_nvlink_pairs": "processes are laid out in the order of the hosts. Remove the key",
    "moe_expert_parallel_size": _MOE,
    "enable_expert_tensor_parallelism": _MOE,
    "moe_token_dropping": "no token is dropped. Remove the key",
    **dict.fromkeys(
        ("moe_type", "moe_train_capacity_factor", "moe_eval_capacity_factor", "moe_min_capacity", "moe_use_residual"),
        "experts have no capacity, and no token is dropped. Remove the key",
    ),
    "moe_loss_coeff": _AUX_LOSS,
    "moe_aux_loss_coeff": _AUX_LOSS,
    "moe_z_loss_coeff": _AUX_LOSS,
    "moe_glu": "experts are gated where activation is. Remove the key",
    "moe_normalize_expert_weights": "the router decides on it. Remove the key",
    "moe_weight_parallelism": _MOE,
    "moe_expert_capacity": "experts have no capacity, and no token is dropped. Remove the key",
    "gradient_noise_scale": "log_gradient_noise_scale is the key",
    "apply_residual_connection_post_layernorm": "blocks normalise before attention and before the feed-forward. "
    "Remove the key where it is false",
    "cache_dir": "index files lie beside the data. Remove the key",
    "train_data_path": "train_data_paths is the key; it holds a list",
    "valid_data_path": "valid_data_paths is the key; it holds a list",
    "test_data_path": "test_data_paths is the key; it holds a list",
}
