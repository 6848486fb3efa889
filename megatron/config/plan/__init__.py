"""What a configuration costs, worked out without torch: parameters, FLOPs, memory, tokens."""

from megatron.config.plan.flops import flops_per_token, flops_terms
from megatron.config.plan.memory import MemoryEstimate, estimate_memory
from megatron.config.plan.parameters import ParameterCount, count_parameters
from megatron.config.plan.report import plan_text

__all__ = [
    "MemoryEstimate",
    "ParameterCount",
    "count_parameters",
    "estimate_memory",
    "flops_per_token",
    "flops_terms",
    "plan_text",
]
