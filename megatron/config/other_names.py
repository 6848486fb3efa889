"""What a key that does not exist was probably meant to be: a near name, another program's name, a key in a wrong place.

Knows how other programs call what is a key here; reads no value but to see whether it is a block. Invariant: what is
suggested is a key of the schema, or a dotted name inside one.
"""

from __future__ import annotations

from typing import Any

from megatron.config.deepspeed_blocks import REFUSED as DEEPSPEED_REFUSED
from megatron.config.deepspeed_blocks import table
from megatron.config.draft import near_names
from megatron.config.schema import FIELDS, field_extra
from megatron.config.syntax_hints import odd_characters
from megatron.config.upstream_keys import EVERY_OTHER_KEY

# Key here: what Megatron-LM, Hugging Face's libraries, nanoGPT and torchtitan call it.
_SAID_ELSEWHERE: dict[str, str] = {
    "num_layers": "num_hidden_layers n_layer n_layers",
    "hidden_size": "n_embd d_model dim embed_dim model_dim",
    "num_attention_heads": "n_head n_heads num_heads",
    "num_kv_heads": "num_key_value_heads n_kv_heads num_query_groups",
    "head_dim": "kv_channels",
    "intermediate_size": "ffn_hidden_size d_ff ffn_dim n_inner",
    "seq_length": "seq_len sequence_length context_length block_size n_ctx max_seq_len max_seq_length cutoff_len",
    "max_position_embeddings": "n_positions",
    "activation": "hidden_act activation_function swiglu geglu",
    "norm": "normalization norm_type",
    "rms_norm_epsilon": "rms_norm_eps norm_eps",
    "layernorm_epsilon": "layer_norm_eps layer_norm_epsilon layernorm_eps norm_epsilon",
    "pos_emb": "position_embedding_type alibi rotary use_rotary_position_embeddings",
    "rotary_pct": "rotary_percent partial_rotary_factor",
    "rotary_emb_base": "rope_theta rotary_base",
    "sliding_window_width": "sliding_window window_size",
    "no_weight_tying": "tie_word_embeddings untie_embeddings_and_output_weights",
    "use_bias_in_attn_linear": "add_qkv_bias attention_bias",
    "use_bias_in_mlp": "add_bias_linear mlp_bias",
    "attention_config": "use_flash_attn use_flash_attention flash_attention flash_attn attn_implementation",
    "attention_dropout": "attn_dropout attn_pdrop",
    "hidden_dropout": "resid_pdrop dropout embd_pdrop",
    "init_method_std": "initializer_range",
    "padded_vocab_size": "vocabulary_size",
    "vocab_file": "tokenizer_model tokenizer_file tokenizer_path tokenizer",
    "precision": "torch_dtype dtype mixed_precision params_dtype",
    "model_parallel_size": "tensor_model_parallel_size tensor_parallel_size tensor_parallel_degree tp_size tp",
    "pipe_parallel_size": "pipeline_model_parallel_size pipeline_parallel_size pipeline_parallel_degree pp_size pp",
    "train_micro_batch_size_per_gpu": "micro_batch_size per_device_train_batch_size per_gpu_train_batch_size "
    "train_micro_batch_size local_batch_size",
    "train_batch_size": "global_batch_size",
    "gradient_accumulation_steps": "grad_accum_steps accumulate_grad_batches gradient_accumulation",
    "optimizer.params.lr": "learning_rate max_lr",
    "optimizer.params.betas": "adam_beta1 adam_beta2 beta1 beta2 betas",
    "optimizer.params.eps": "adam_epsilon adam_eps epsilon",
    "gradient_clipping": "max_grad_norm grad_clip max_norm clip_grad_norm",
    "lr_decay_style": "lr_scheduler_type lr_scheduler lr_schedule",
    "warmup": "warmup_ratio lr_warmup_fraction warmup_fraction",
    "train_iters": "max_steps max_iters num_steps num_train_steps total_steps train_steps steps",
    "train_epochs": "num_train_epochs num_epochs epochs max_epochs",
    "log_interval": "logging_steps log_every log_freq",
    "eval_interval": "eval_steps eval_every eval_freq val_check_interval",
    "checkpoint_factor": "save_steps save_every checkpoint_interval save_freq",
    "save": "output_dir save_dir checkpoint_dir out_dir",
    "load": "load_dir resume_from_checkpoint pretrained_checkpoint",
    "keep_last_n_checkpoints": "save_total_limit",
    "wandb_team": "wandb_entity",
    "wandb_run_name": "wandb_name run_name",
    "use_wandb": "report_to",
    "checkpoint_activations": "gradient_checkpointing activation_checkpoint",
    "recompute_activations": "recompute_granularity",
    "zero_optimization.stage": "zero",
    "launcher": "deepspeed_launcher",
}
OTHER_NAMES: dict[str, str] = {other: name for name, others in _SAID_ELSEWHERE.items() for other in others.split()}


def about_unknown_key(name: str, value: Any) -> tuple[str, list[str]]:
    """` What to do.` about a key that does not exist, or nothing; and the keys that were probably meant."""
    odd = odd_characters(name)
    if odd:
        near = near_names("".join(letter for letter in name if ord(letter) < 127), _known())
        return f" Its name holds {odd}." + _did_you_mean(near), near
    if name.lower() in OTHER_NAMES and name.lower() not in FIELDS:
        meant = OTHER_NAMES[name.lower()]
        return f" Here it is {meant}.", [meant]
    if name in table()["keys"]:
        return _of_deepspeed(name), []
    block, dot, _ = name.partition(".")
    if dot and block in FIELDS:
        return " Dots reach into blocks on the command line only (--set). In a file, write the blocks.", [block]
    if isinstance(value, dict):
        inside = [str(key) for key in value if str(key) in FIELDS and not field_extra(str(key), "derived")]
        if inside:
            return f" Keys stand in no sections: write {_listed(inside)} at the beginning of a line.", inside
    near = near_names(name, _known())
    return _did_you_mean(near), near


def _of_deepspeed(name: str) -> str:
    if name in DEEPSPEED_REFUSED:
        return f" It is DeepSpeed's, and {DEEPSPEED_REFUSED[name][1]}. Remove it."
    return " It is DeepSpeed's: write it into deepspeed_extra_args."


def _known() -> list[str]:
    return [*FIELDS, *EVERY_OTHER_KEY]


def _did_you_mean(near: list[str]) -> str:
    return f" Did you mean {' or '.join(near)}?" if near else ""


def _listed(names: list[str]) -> str:
    shown = names[:3]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(shown)}{more}"
