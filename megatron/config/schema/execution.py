"""The keys that say how the work is divided and computed: layout, batch, precision, ZeRO, DeepSpeed blocks, launching.

Invariant: changing any of these, the batch triple aside, changes the result by no more than rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict

from megatron.config.schema.base import Block, Bool, Float, Int, Section, key


class ParallelSection(Section):
    """The layout: world_size = pipe_parallel_size * data_parallel_size * model_parallel_size."""

    pipe_parallel_size: Int = key(0, "Pipeline stages. 0 and 1 both mean one stage.", ge=0)
    model_parallel_size: Int = key(1, "Tensor-parallel ranks that share every matrix.", ge=1)
    pipe_partition_method: str = key(
        "type:transformer|mlp", "How layers are dealt to pipeline stages: type:<regex>, parameters or uniform."
    )
    sequence_parallel: Bool = key(
        False, "Also divide norms and dropouts along the sequence over the tensor-parallel ranks."
    )
    global_num_gpus: Int | None = key(
        None, "Processes in all. Unset: from the hosts, the GPUs found, or cpu_processes.", ge=1
    )
    world_size: Int = key(None, "Processes in all.", derived="global_num_gpus, num_gpus or cpu_processes")
    data_parallel_size: Int = key(
        None, "Replicas of the model.", derived="global_num_gpus, pipe_parallel_size and model_parallel_size", ours=True
    )

    @property
    def is_pipe_parallel(self) -> bool:
        """Whether there is more than one pipeline stage."""
        return self.pipe_parallel_size >= 2

    @property
    def num_stages(self) -> int:
        """Pipeline stages, at least 1."""
        return max(1, self.pipe_parallel_size)


class BatchSection(Section):
    """The batch triple: train_batch_size = train_micro_batch_size_per_gpu * gradient_accumulation_steps * dp."""

    train_batch_size: Int = key(
        None, "Sequences per optimizer step over all processes.", unit="sequences", deepspeed="train_batch_size", gt=0
    )
    train_micro_batch_size_per_gpu: Int = key(
        None,
        "Sequences per forward pass of one replica.",
        unit="sequences",
        deepspeed="train_micro_batch_size_per_gpu",
        gt=0,
    )
    gradient_accumulation_steps: Int = key(
        None,
        "Forward passes per optimizer step. Unset: solved from the other two, or 1.",
        deepspeed="gradient_accumulation_steps",
        gt=0,
    )


class Fp16Block(Block):
    """DeepSpeed's loss scaling."""

    enabled: Bool = key(True, "Train in fp16.")
    type: str | None = key(None, "Remnant of old files: fp16, or bfloat16 to mean precision: bfloat16.")
    fp16: Bool | None = key(None, "Remnant of old files: the same as enabled.")
    auto_cast: Bool | None = key(None, "Cast floating-point inputs to fp16.")
    loss_scale: Float = key(0, "Fixed loss scale; 0 means dynamic.", ge=0)
    loss_scale_window: Int = key(1000, "Steps without overflow before the scale doubles.", gt=0)
    initial_scale_power: Int = key(16, "The first dynamic scale is 2 to this power.", ge=0)
    hysteresis: Int = key(2, "Overflows in a row before the scale halves.", ge=1)
    consecutive_hysteresis: Bool = key(False, "Refill the hysteresis after every step without overflow.")
    min_loss_scale: Int = key(1, "The scale never falls below this.", gt=0)
    fp16_master_weights_and_grads: Bool = key(False, "Only false: master weights are kept in fp32.")


class Bf16Block(Block):
    """Training in bfloat16."""

    enabled: Bool = key(True, "Train in bfloat16.")
    immediate_grad_update: Bool | None = key(None, "Update the gradients' fp32 sum as they come, not at the step.")
    check_grad_overflow: Bool | None = key(None, "Look for overflow before every step.")
    bf16_master_weights_and_grads: Bool = key(False, "Only false: master weights are kept in fp32.")
    bf16_optimizer_states: Bool = key(False, "Only false: optimizer states are kept in fp32.")


if TYPE_CHECKING:
    # What a loaded configuration holds; `auto` is only ever written in a file.
    Precision = Literal["fp32", "fp16", "bfloat16"]
else:
    Precision = Literal["fp32", "fp16", "bfloat16", "auto"]


class PrecisionSection(Section):
    """Number formats. All ways of saying it end in one resolved `precision`."""

    precision: Precision = key(
        None,
        "Number format of weights and activations; auto is bfloat16 on CUDA and fp32 on a CPU. "
        "Unset: what the fp16 or bf16 block says, else fp32.",
    )
    fp16: Fp16Block | None = key(None, "fp16 training and its loss scale.", deepspeed="fp16")
    bf16: Bf16Block | None = key(None, "bfloat16 training.", deepspeed="bf16")
    fp32_allreduce: Bool = key(
        False,
        "Reduce in fp32 what half precision would add up in its own format: gradients over the replicas "
        "(communication_data_type: fp32) and the sums of activations and of their gradients over tensor-parallel "
        "ranks. Twice the traffic.",
    )


class OpenBlock(Block):
    """A block whose further names are DeepSpeed's own, checked by `config.deepspeed_blocks`."""

    model_config = ConfigDict(extra="allow")


class OffloadBlock(OpenBlock):
    """Where ZeRO parks what it does not need at the moment."""

    device: Literal["none", "cpu", "nvme"] = key("none", "none or cpu; nvme is not supported yet.")
    nvme_path: str | None = key(None, "Folder on the local disk for nvme.")
    pin_memory: Bool = key(False, "Use page-locked memory.")
    buffer_count: Int | None = key(None, "Buffers in the pool.")
    buffer_size: Float | None = key(None, "Elements of one buffer.")
    max_in_cpu: Float | None = key(None, "Parameter elements kept in memory when parking on disk.")
    fast_init: Bool | None = key(None, "Faster start when parking on disk.")
    pipeline_read: Bool | None = key(None, "Overlap reading with computing.")
    pipeline_write: Bool | None = key(None, "Overlap writing with computing.")
    ratio: Float | None = key(None, "Part of the optimizer's work done on the CPU.")


class ZeroBlock(OpenBlock):
    """DeepSpeed's `zero_optimization`."""

    stage: Int = key(0, "1 partitions optimizer states, 2 gradients too, 3 weights too. 0 runs as 1.", ge=0, le=3)
    allgather_partitions: Bool = key(True, "Collect updated weights by all-gather.")
    allgather_bucket_size: Int = key(500_000_000, "Elements gathered at once.", gt=0)
    overlap_comm: Bool = key(False, "Reduce gradients while the backward pass runs.")
    reduce_scatter: Bool = key(True, "Reduce gradients by reduce-scatter.")
    reduce_bucket_size: Int = key(500_000_000, "Elements reduced at once.", gt=0)
    contiguous_gradients: Bool = key(False, "Copy gradients into one buffer as they come.")
    cpu_offload: Bool = key(False, "Old spelling of offload_optimizer: {device: cpu}.")
    cpu_offload_param: Bool = key(False, "Old spelling of offload_param: {device: cpu}.")
    cpu_offload_params: Bool = key(False, "The same.")
    offload_optimizer: OffloadBlock | None = key(
        None, "Keep optimizer states and fp32 weights in the host's memory, and update there."
    )
    offload_param: OffloadBlock | None = key(None, "Park weights (stage 3).")
    sub_group_size: Int | None = key(None, "Elements updated at once (stage 3).")
    round_robin_gradients: Bool | None = key(None, "Spread gradient copies over ranks (stages 1 and 2).")
    load_from_fp32_weights: Bool | None = key(None, "Initialise the master weights from the checkpoint's.")
    elastic_checkpoint: Bool | None = key(None, "Remnant of old files.")
    stage3_max_live_parameters: Float | None = key(None, "Parameters held at once (stage 3).")
    stage3_max_reuse_distance: Float | None = key(None, "Keep a parameter that is needed again within this distance.")
    stage3_prefetch_bucket_size: Float | None = key(None, "Elements fetched ahead.")
    stage3_param_persistence_threshold: Float | None = key(None, "Smaller parameters are never partitioned.")
    stage3_gather_16bit_weights_on_model_save: Bool | None = key(None, "Gather whole weights when saving.")


class ZeroSection(Section):
    """ZeRO, DeepSpeed's partitioning over data-parallel ranks."""

    zero_optimization: ZeroBlock | None = key(
        None,
        "ZeRO's block. Unset: stage 0, which runs as stage 1 (same result, less memory).",
        deepspeed="zero_optimization",
    )
    zero_stage: Int = key(None, "The stage that runs.", derived="zero_optimization.stage")

    @property
    def stage(self) -> int:
        """The stage that runs: 1, 2 or 3."""
        return self.zero_stage


class DeepSpeedSection(Section):
    """Blocks that go to DeepSpeed as they are."""

    deepspeed: Bool = key(True, "Must be true: training runs over DeepSpeed.")
    steps_per_print: Int = key(
        10, "DeepSpeed's own progress line every so many steps.", deepspeed="steps_per_print", gt=0
    )
    wall_clock_breakdown: Bool = key(False, "DeepSpeed's timers of each phase.", deepspeed="wall_clock_breakdown")
    dump_state: Bool = key(False, "Print DeepSpeed's state at start.", deepspeed="dump_state")
    prescale_gradients: Bool = key(False, "Divide gradients before reducing them.", deepspeed="prescale_gradients")
    gradient_predivide_factor: Float = key(
        1.0, "Divisor before reducing, with prescale_gradients.", deepspeed="gradient_predivide_factor", gt=0
    )
    communication_data_type: Literal["fp16", "bf16", "fp32"] | None = key(
        None,
        "Number format in which gradients travel between replicas. Unset: that of the weights.",
        deepspeed="communication_data_type",
    )
    data_types: dict[str, Any] | None = key(None, "For example {grad_accum_dtype: fp32}.", deepspeed="data_types")
    flops_profiler: dict[str, Any] | None = key(None, "DeepSpeed's FLOPs profiler.", deepspeed="flops_profiler")
    comms_logger: dict[str, Any] | None = key(None, "DeepSpeed's log of collectives.", deepspeed="comms_logger")
    tensorboard: dict[str, Any] | None = key(None, "DeepSpeed's own TensorBoard monitor.", deepspeed="tensorboard")
    wandb: dict[str, Any] | None = key(None, "DeepSpeed's own W&B monitor.", deepspeed="wandb")
    csv_monitor: dict[str, Any] | None = key(None, "DeepSpeed's own CSV monitor.", deepspeed="csv_monitor")
    deepspeed_extra_args: dict[str, Any] | None = key(
        None, "Anything else for DeepSpeed's configuration. A key that is set elsewhere is refused."
    )


class LauncherSection(Section):
    """Where and how processes start."""

    launcher: Literal["pdsh", "openmpi", "mpich", "mvapich", "impi", "slurm"] = key(
        "pdsh",
        "What starts processes on other hosts: pdsh or mpirun on those of a hostfile, slurm on those of an allocation. "
        "Processes of this host alone need none.",
    )
    deepspeed_slurm: Bool = key(False, "The same as launcher: slurm.")
    deepspeed_mpi: Bool = key(False, "The same as launcher: openmpi, unless launcher names another MPI.")
    launcher_args: str | None = key(None, "Further arguments for pdsh, mpirun or srun.", ours=True)
    force_multi: Bool = key(False, "Use the launcher even where the hostfile names one host only.")
    no_ssh_check: Bool = key(False, "Do not try every host by ssh before anything starts.")
    ssh_port: Int | None = key(
        None, "Port of ssh on the hosts. Unset: as ssh is configured.", ours=True, gt=0, lt=65536
    )
    account: str | None = key(None, "Account that Slurm jobs run under.")
    comment: str | None = key(None, "Comment that Slurm jobs carry.")
    hostfile: str | None = key(
        None, "File with `host slots=N` lines. Unset: DLTS_HOSTFILE, or /job/hostfile where that exists."
    )
    include: str | None = key(None, "Hosts and slots to use: NODE[:SLOT,...][@NODE...].")
    exclude: str | None = key(None, "Hosts and slots to leave out, in the same form.")
    num_nodes: Int = key(-1, "Use the first N hosts; -1 means all.", ge=-1)
    num_gpus: Int | None = key(None, "Processes per host. Unset: all its GPUs.", ge=1)
    cpu_processes: Int | None = key(
        None, "Processes per host where there is no GPU. Unset: just enough for one replica.", ours=True, ge=1
    )
    device: Literal["auto", "cpu", "cuda"] = key(
        "auto", "What to compute on; auto is cuda where a GPU is found.", ours=True
    )
    exit_grace_in_mins: Float = key(
        10.0,
        "How long processes that were asked to stop may take to save and leave before the launcher ends them.",
        unit="minutes",
        gt=0,
        ours=True,
    )
    master_addr: str | None = key(None, "Address of rank 0. Unset: this host, or MASTER_ADDR.")
    master_port: Int | None = key(None, "Port of the rendezvous. Unset: a free one, or MASTER_PORT.", gt=0, lt=65536)
