"""Every architecture switch equals one fp64 process when heads, layers, tokens and the vocabulary are divided."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megatron.model.spec import RopeScaling
from tests.distributed.cells import EPS
from tests.distributed.differences import run_and_compare
from tests.distributed.layout_cases import Case
from tests.distributed.oracle import oracle_run
from tests.distributed.tolerances import FP32, excesses

LLAMA = {"norm": "rmsnorm", "residual": "sequential", "attention_bias": False, "mlp_bias": False}
SWITCHES: dict[str, dict[str, Any]] = {
    "gemma": {
        **LLAMA, "norm_offset": True, "activation": "geglu_tanh", "embedding_scale": 24**0.5, "head_dim": 8,
        "num_kv_heads": 1, "tied_head": True, "rotary_dims": 8,
    },
    "qwen": {
        **LLAMA, "qk_norm": True, "num_kv_heads": 2, "activation": "swiglu", "qkv_bias": True,
        "rope_scaling": RopeScaling("llama3", 4.0, 8, 1.0, 3.0), "window": 3, "window_layers": (1, 2),
    },
    "gpt-j": {
        "residual": "parallel_tied", "rotary_interleaved": True, "head_bias": True, "activation": "gelu_tanh",
        "qkv_bias": False,
    },
    "alibi": {"residual": "sequential", "position": "alibi", "rotary_dims": 0, "num_kv_heads": 2, "window": 4},
    "rpe": {
        "position": "rpe", "rotary_dims": 0, "norm": "scalenorm", "activation": "bilinear", "rpe_buckets": 6,
        "rpe_max_distance": 9,
    },
    "sinusoidal": {
        "position": "sinusoidal", "rotary_dims": 0, "norm": "non_parametric_layernorm", "activation": "mish",
        "qk_norm": True,
    },
    "yarn": {"qk_norm": True, "rope_scaling": RopeScaling("yarn", 2.0, 8), "rotary_dims": 6, "activation": "softsign"},
}  # fmt: skip


@pytest.mark.parametrize("layout", [{"tp": 2, "pp": 2, "sequence_parallel": True}, {"tp": 2, "dp": 2}], ids=str)
@pytest.mark.parametrize("name", SWITCHES)
def test_equal_to_one_process(ranks: Callable[..., list[Any]], name: str, layout: dict[str, Any]) -> None:
    case = Case(**layout, spec=SWITCHES[name], steps=3, global_batch=4, eps=EPS)
    assert excesses(run_and_compare(ranks, case, oracle_run(case)), FP32) == []
