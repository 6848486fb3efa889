"""The keys that say what a run leaves behind: checkpoints, logs, generated text, evaluation results.

Invariant: no secret is ever a key; API keys are read from the environment by the libraries that need them.
"""

from __future__ import annotations

from typing import Any, Literal

from megatron.config.schema.base import Bool, Float, Int, Section, key


class CheckpointSection(Section):
    """Saving and loading."""

    save: str | None = key(
        None, "Folder or fsspec address (s3://bucket/run) for checkpoints. Needs checkpoint_factor or extra_save_iters."
    )
    load: str | None = key(
        None, "Folder or fsspec address to continue from. Finding none there is an error unless allow_fresh_start."
    )
    allow_fresh_start: Bool = key(False, "Start from step 0 when load holds no checkpoint yet.", ours=True)
    allow_changed_data: Bool = key(
        False,
        "Go on although the training data, or the order it is read in, is another than the checkpoint's.",
        ours=True,
    )
    iteration: Int | None = key(None, "Step of the checkpoint to load. Unset: the newest.", unit="steps", ge=0)
    checkpoint_scale: Literal["linear", "log"] = key(
        "linear", "linear: every checkpoint_factor steps; log: at its powers."
    )
    checkpoint_factor: Float | None = key(None, "Steps between checkpoints, or the base of checkpoint_scale log.", gt=0)
    extra_save_iters: list[Int] | None = key(None, "Further steps to save at; 0 is allowed.")
    keep_last_n_checkpoints: Int | None = key(
        None,
        "Remove older checkpoints, but never below two whose checksums were read back; extra_save_iters stay.",
        gt=0,
    )
    keep_checkpoint_every: Int | None = key(
        None, "Checkpoints of steps that are multiples of this are never removed.", unit="steps", gt=0, ours=True
    )
    async_save: Bool = key(
        False, "Write checkpoints in the background; training waits only for the copy to host memory.", ours=True
    )
    on_save_failure: Literal["stop", "continue"] = key(
        "stop", "After a failed save, stop the run, or go on training and try again at the next one.", ours=True
    )
    finetune: Bool = key(
        False,
        "Take only the weights of load, and start from step 0: step, data, optimizer, schedule and random states anew.",
    )
    no_load_optim: Bool = key(False, "Load without optimizer states; step, schedule and data go on.")
    no_load_rng: Bool = key(False, "Load without the state of the random generators: dropout then draws other numbers.")
    upstream_gqa_layout: Literal["blocks", "per_head"] | None = key(
        None,
        "Rows of grouped-query attention in an upstream checkpoint given as load: blocks since November 2024, "
        "per_head before. Unset: per_head if the MLP has its old names (before September 2024), else blocks.",
        ours=True,
    )
    no_save_rng: Bool = key(False, "Save without the state of the random generators.")
    checkpoint_validation_with_forward_pass: Bool = key(
        False,
        "Store with each checkpoint the loss of one made-up sequence, and refuse a checkpoint whose loss is another "
        "after loading than rounding explains.",
    )


class ObserveSection(Section):
    """Logging."""

    log_interval: Int = key(100, "Steps between progress lines.", unit="steps", gt=0)
    log_dir: str | None = key(None, "Folder of the run's log and of its JSONL metrics.")
    tensorboard_dir: str | None = key(None, "Write TensorBoard files here.")
    use_wandb: Bool | None = key(None, "Log to W&B. Unset: yes if an API key is found.")
    wandb_project: str = key("neox", "W&B project.")
    wandb_group: str | None = key(None, "W&B group.")
    wandb_run_name: str | None = key(None, "W&B run name.")
    wandb_team: str | None = key(None, "W&B team.")
    wandb_host: str = key("https://api.wandb.ai", "W&B server.")
    wandb_init_all_ranks: Bool = key(False, "A W&B run for every rank instead of rank 0 only.")
    use_comet: Bool | None = key(None, "Log to Comet. Unset: no.")
    comet_workspace: str | None = key(None, "Comet workspace.")
    comet_project: str | None = key(None, "Comet project.")
    comet_experiment_name: str | None = key(None, "Comet experiment name.")
    comet_tags: list[str] | None = key(None, "Comet tags.")
    comet_others: dict[str, Any] | None = key(None, "Further Comet metadata.")
    log_grad_norm: Bool = key(False, "Log every parameter's gradient norm, before clipping; the global one always is.")
    log_param_norm: Bool = key(False, "Log every parameter's norm.")
    log_grad_pct_zeros: Bool = key(False, "Log the percentage of zeros in every parameter's gradient.")
    log_optimizer_states: Bool = key(False, "Log the norms of every parameter's optimizer states.")
    log_gradient_noise_scale: Bool = key(
        False, "Log the gradient noise scale, in sequences: about the batch size beyond which larger ones gain little."
    )
    gradient_noise_scale_n_batches: Int = key(
        5, "Steps between noise scales, and in its large batch.", unit="steps", ge=2
    )
    gradient_noise_scale_cpu_offload: Bool = key(False, "Keep the noise scale's buffer in the host's memory.")
    char_level_ppl: Bool = key(False, "Also log the perplexity per character of validation and test.")
    profile: Bool = key(
        False, "Write a trace of the steps profile_step_start to profile_step_stop, for Perfetto or chrome://tracing."
    )
    profile_step_start: Int = key(10, "First profiled step.", unit="steps", ge=1)
    profile_step_stop: Int = key(12, "Last profiled step.", unit="steps", ge=1)
    memory_profiling: Bool = key(False, "Write a snapshot of CUDA memory after profile_step_stop.")
    memory_profiling_path: str | None = key(None, "Folder of the snapshot. Unset: tensorboard_dir, or beside the log.")
    peak_theoretical_tflops: Float | None = key(
        None, "Peak of one device; turns utilisation (MFU) logging on.", unit="TFLOP/s", gt=0
    )


class GenerationSection(Section):
    """generate.py."""

    text_gen_type: Literal["unconditional", "input-file", "interactive"] | None = key(
        None, "Where prompts come from. Unset: input-file if sample_input_file is given, else unconditional."
    )
    temperature: Float = key(0.0, "Sampling temperature; 0 with top_k 0 and top_p 0 is greedy.", ge=0)
    top_p: Float = key(0.0, "Sample from the smallest set of tokens with this probability; 0 is off.", ge=0, le=1)
    top_k: Int = key(0, "Sample from the k likeliest tokens; 0 is off.", ge=0)
    maximum_tokens: Int = key(64, "Most new tokens per prompt.", unit="tokens", gt=0)
    prompt_end: str = key("\n", "Separates prompts in a file or at the terminal.", min_length=1)
    sample_input_file: str | None = key(None, "File with prompts.")
    sample_output_file: str = key("samples.txt", "Where generated text goes, one JSON object per line.")
    num_samples: Int = key(1, "Samples to draw when unconditional.", gt=0)
    return_logits: Bool = key(False, "Write the logits of each new token as well.")
    recompute: Bool = key(False, "Run the whole sequence for each token instead of keeping keys and values.")


class EvaluationSection(Section):
    """evaluate.py."""

    eval_tasks: list[str] | None = key(None, "lm-eval tasks; also run at each validation while training.")
    eval_results_prefix: str = key("", "Stands before the name of the result file.")
