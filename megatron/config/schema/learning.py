"""The keys that say how the model learns: optimizer, learning-rate schedule, steps, validation, recomputation.

Invariant: `OptimizerSection` and `ScheduleSection` hold every number of the update rule, typed, defaults filled in.
"""

from __future__ import annotations

from typing import Any, Literal

from megatron.config.schema.base import Block, Bool, Float, Int, Section, key

OptimizerType = Literal["adam", "sgd", "lion", "madgrad_wd", "cpu_adam", "cpu_torch_adam"]
Recomputation = Literal["none", "selective", "full"]


class OptimizerBlock(Block):
    """Upstream's `optimizer` block."""

    type: OptimizerType = key(
        "adam",
        "Adam is AdamW (decoupled weight decay), as upstream's is; cpu_adam and cpu_torch_adam compute the same.",
    )
    params: dict[str, Any] = key({}, "lr, betas, eps, and what else the optimizer takes.")


class OptimizerSection(Section):
    """The update rule; lr, betas and eps come out of the `optimizer` block."""

    optimizer: OptimizerBlock | None = key(None, "The optimizer and its parameters. Required for training.")
    weight_decay: Float = key(0.1, "Decoupled weight decay; norms and biases are exempt.", ge=0)
    gradient_clipping: Float = key(
        1.0, "Largest global gradient norm; 0 turns clipping off.", deepspeed="gradient_clipping", ge=0
    )
    optimizer_type: str = key("adam", "The optimizer that runs.", derived="optimizer.type")
    lr: Float = key(None, "Peak learning rate.", derived="optimizer.params.lr")
    betas: tuple[Float, Float] = key(
        (0.9, 0.999), "Decay rates of the moments.", derived="optimizer.params.betas", ours=True
    )
    eps: Float = key(1e-8, "Added to Adam's denominator.", derived="optimizer.params.eps", ours=True)
    momentum: Float = key(0.0, "SGD's momentum.", derived="optimizer.params.momentum", ours=True)

    @property
    def type(self) -> str:
        """The optimizer's name, lower case."""
        return self.optimizer_type


class ScheduleSection(Section):
    """The learning rate over steps."""

    lr_decay_style: Literal["constant", "linear", "cosine", "exponential"] = key("linear", "Shape after warm-up.")
    lr_decay_iters: Int = key(
        None, "Steps until min_lr is reached. Unset: lr_decay_fraction * train_iters.", unit="steps", gt=0
    )
    lr_decay_fraction: Float | None = key(None, "lr_decay_iters as a part of train_iters. Unset: 1.", gt=0, le=1)
    min_lr: Float = key(0.0, "The rate never falls below this after warm-up.", ge=0)
    warmup: Float = key(0.01, "Part of lr_decay_iters over which the rate rises from 0.", ge=0, le=1)
    override_lr_scheduler: Bool = key(
        False,
        "When continuing, use this file's schedule (lr, min_lr, lr_decay_style, lr_decay_iters, warmup) where the "
        "checkpoint's differs. That is done without the key as well, with a warning.",
    )
    use_checkpoint_lr_scheduler: Bool = key(
        False, "When continuing, use the checkpoint's schedule where this file's differs."
    )


def decay_steps(train_iters: int, fraction: float | None) -> int:
    """What lr_decay_iters is where it is not set: a part of the run, by default all of it. Units: steps."""
    return train_iters if fraction is None else max(1, int(train_iters * fraction))


class TrainingSection(Section):
    """The run."""

    train_iters: Int | None = key(None, "Optimizer steps. Required for training.", unit="steps", ge=0)
    train_epochs: Int | None = key(
        None,
        "Passes over the training data, in place of train_iters: as many steps as they hold whole batches. Several "
        "prefixes are each passed over equally often, so weights do not go with it.",
        gt=0,
    )
    eval_interval: Int = key(1000, "Validate every so many steps.", unit="steps", gt=0)
    eval_iters: Int = key(100, "Batches of train_batch_size sequences per validation and per test.", ge=0)
    exit_interval: Int | None = key(None, "Save and stop at the next multiple of this.", unit="steps", gt=0)
    exit_duration_in_mins: Float | None = key(
        None,
        "Save and stop, with exit code 0, at the first step that ends this long after the job began.",
        unit="minutes",
        gt=0,
        ours=True,
    )
    seed: Int = key(1234, "Seed of initialisation, data order and dropout.", gt=0, lt=2**32)
    loss_normalization: Literal["micro_batch", "tokens"] = key(
        "micro_batch",
        "micro_batch: mean over the unmasked tokens of each micro-batch, then over micro-batches, as upstream does; "
        "tokens: one mean over all unmasked tokens of the step.",
        ours=True,
    )
    check_replicas: Int = key(
        0,
        "Every so many steps, compare replicated parameters and gradients across ranks; 0 is off.",
        unit="steps",
        ge=0,
        ours=True,
    )
    watchdog_timeout_s: Float = key(
        1200.0,
        "When no rank has made progress for so long, every rank shows its stacks, the missing one is named, and all "
        "end with exit code 7; 0 is off. A single micro-batch, read or write must not take as long.",
        unit="s",
        ge=0,
        ours=True,
    )
    anomaly_skips_in_a_row: Int = key(
        10,
        "A step whose loss or gradient norm is not finite (or leaps, see anomaly_loss_factor) is skipped: its data "
        "is passed over and no weight moves. So many in a row are borne; one more rolls back or stops (exit code 6).",
        unit="steps",
        ge=0,
        ours=True,
    )
    anomaly_skips_in_window: Int | None = key(
        32,
        "Skipped steps that are borne among the last anomaly_window; null: any number.",
        unit="steps",
        ge=0,
        ours=True,
    )
    anomaly_window: Int = key(
        128, "Steps over which skipped ones are counted and medians are taken.", unit="steps", gt=0, ours=True
    )
    anomaly_loss_factor: Float = key(
        0.0, "Skip a step whose loss is above so many times its running median; 0 is off.", ge=0, ours=True
    )
    anomaly_grad_norm_factor: Float = key(
        0.0,
        "Skip a step whose gradient norm (before clipping) is above so many times its running median; 0 is off.",
        ge=0,
        ours=True,
    )
    anomaly_rollbacks: Int = key(
        1,
        "Times that too many skipped steps send the run back to the newest checkpoint from before them, without "
        "anomaly_window good steps in a row between; then it stops. 0: stop at once.",
        ge=0,
        ours=True,
    )
    anomaly_skip_data: Bool = key(
        True,
        "After a roll-back, go on behind the data of the bad steps; false: with the same data again.",
        ours=True,
    )
    checkpoint_activations: Bool = key(False, "Recompute activations in the backward pass to save memory.")
    checkpoint_num_layers: Int = key(
        1,
        "With full recomputation, blocks that are recomputed as one group: only a group's input is kept. More save "
        "memory until the group's own activations outweigh the inputs saved.",
        ge=1,
    )
    torch_compile: Bool = key(
        False,
        "Compile every transformer block with torch.compile: a slower first step, faster ones after it.",
        ours=True,
    )
    recompute_activations: Recomputation = key(
        None,
        "What the backward pass computes again instead of keeping it. none; selective: attention, from its normed "
        "input to what enters its output projection; full: whole blocks. Unset: full with checkpoint_activations, "
        "else none.",
        ours=True,
    )

    @property
    def recompute(self) -> Recomputation:
        """What is recomputed, by whichever key it was asked for: none, selective or full."""
        return self.recompute_activations
