"""What a configuration costs, worked out without torch: parameters, FLOPs, memory, tokens, time; and better layouts."""

from megatron.config.plan.flops import flops_per_token, flops_terms
from megatron.config.plan.inference_report import inference_plan_text, inference_plan_values
from megatron.config.plan.layouts import configured, search_config
from megatron.config.plan.memory import MemoryEstimate, estimate_memory, estimate_stage
from megatron.config.plan.parameters import ParameterCount, count_parameters
from megatron.config.plan.report import Hardware, plan_text, plan_values, search_text, search_values
from megatron.config.plan.speed import Cluster

__all__ = [
    "Cluster",
    "Hardware",
    "MemoryEstimate",
    "ParameterCount",
    "configured",
    "count_parameters",
    "estimate_memory",
    "estimate_stage",
    "flops_per_token",
    "flops_terms",
    "inference_plan_text",
    "inference_plan_values",
    "plan_text",
    "plan_values",
    "search_config",
    "search_text",
    "search_values",
]
