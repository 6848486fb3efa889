"""The function that upstream computes from its own checkpoint files, written down once more from its published facts.

Nothing of this project is used on the reference's side: it takes the state_dicts of the files as they lie, head by head
and token by token, in fp64. Facts: names and layouts of GPT-NeoX's layers; rotary halves turned (-x2, x1) over the
first int(D * rotary_pct) dimensions; ALiBi slopes 2^(-8 i / n); attention scaled by 1 / sqrt(D); y = act(gate) * up
with [up; gate] in linear1; row biases of tensor-parallel ranks summed with a parallel residual.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron.convert.neox_files import open_neox
from megatron.inference.load import load_model
from megatron.model.spec import ModelSpec

VOCAB, HIDDEN, HEADS, LAYERS, LENGTH = 31, 24, 4, 2, 11
BASE: dict[str, Any] = {
    "num_layers": LAYERS, "hidden_size": HIDDEN, "num_heads": HEADS, "num_kv_heads": HEADS, "ffn_size": 40,
    "vocab_size": VOCAB, "padded_vocab_size": 32, "max_positions": 16, "rotary_dims": 2, "residual": "parallel",
    "tied_head": False,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "neox": {},
    "neox-sequential-tanh": {"residual": "sequential", "activation": "gelu_tanh", "rotary_dims": 6},
    "grouped": {"num_kv_heads": 2},
    "llama": {
        "num_kv_heads": 2, "norm": "rmsnorm", "activation": "swiglu", "attention_bias": False, "mlp_bias": False,
        "residual": "sequential", "rotary_dims": 6, "norm_eps": 1e-6,
    },
    "geglu": {"activation": "geglu", "residual": "sequential"},
    "alibi": {"position": "alibi", "rotary_dims": 0, "residual": "sequential"},
    "alibi-six-heads": {"position": "alibi", "rotary_dims": 0, "num_heads": 6, "num_kv_heads": 6},
    "learned-tied": {"position": "learned", "rotary_dims": 0, "residual": "sequential", "tied_head": True},
}  # fmt: skip

State = dict[str, torch.Tensor]


def random_files(spec: ModelSpec, folder: Path, tp: int) -> list[dict[int, State]]:
    """Every tensor of upstream's layer files at random, each rank's own; what is replicated is alike on all ranks."""
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int, scale: float = 0.3) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale

    H, D = spec.hidden_size, spec.hidden_size // spec.num_heads
    rows = (spec.num_heads + 2 * spec.num_kv_heads) * D // tp
    inner, wide = spec.ffn_size // tp, spec.ffn_size // tp * (2 if spec.is_gated else 1)
    ranks: list[dict[int, State]] = [{} for _ in range(tp)]

    def norm(prefix: str) -> State:
        if spec.norm == "rmsnorm":
            return {f"{prefix}.scale": 1 + draw(H)}
        return {f"{prefix}.weight": 1 + draw(H), f"{prefix}.bias": draw(H)}

    numbers = [0, *range(2, spec.num_layers + 2), spec.num_layers + 3] + [spec.num_layers + 4] * (not spec.tied_head)
    for number in numbers:
        shared: State = {}
        if number == 0 and spec.position == "learned":
            shared = {"position_embeddings.weight": draw(spec.max_positions, H)}
        elif number == spec.num_layers + 3:
            shared = norm("norm")
        elif 2 <= number < spec.num_layers + 2:
            shared = {**norm("input_layernorm"), **norm("post_attention_layernorm")}
        bias = draw(H), draw(H)
        for layers in ranks:
            state = dict(shared)
            if number == 0:
                state["word_embeddings.weight"] = draw(spec.padded_vocab_size // tp, H, scale=1.0)
            elif number == spec.num_layers + 4:
                state["final_linear.weight"] = draw(spec.padded_vocab_size // tp, H)
            elif number < spec.num_layers + 2:
                state["attention.query_key_value.weight"] = draw(rows, H)
                state["attention.dense.weight"] = draw(H, H // tp)
                state["mlp.linear1.weight"], state["mlp.linear2.weight"] = draw(wide, H), draw(H, inner)
                is_parallel = spec.residual != "sequential"
                if spec.attention_bias:
                    state["attention.query_key_value.bias"] = draw(rows)
                    state["attention.dense.bias"] = draw(H) if is_parallel else bias[0]
                if spec.mlp_bias:
                    state["mlp.linear1.bias"] = draw(wide)
                    state["mlp.linear2.bias"] = draw(H) if is_parallel else bias[1]
            layers[number] = state
    folder.mkdir()
    for rank, layers in enumerate(ranks):
        for number, state in layers.items():
            torch.save(state, folder / f"layer_{number:02d}-model_{rank:02d}-model_states.pt")
    return [{number: {k: v.double() for k, v in s.items()} for number, s in layers.items()} for layers in ranks]


def normed(spec: ModelSpec, x: torch.Tensor, state: State, prefix: str) -> torch.Tensor:
    if spec.norm == "rmsnorm":
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + spec.norm_eps) * state[f"{prefix}.scale"]
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + spec.norm_eps)
    return scaled * state[f"{prefix}.weight"] + state[f"{prefix}.bias"]


def turned(spec: ModelSpec, vector: torch.Tensor, position: int) -> torch.Tensor:
    """One head's query or key at one position."""
    width = spec.rotary_dims
    if not width:
        return vector
    x, rest = vector[:width], vector[width:]
    angles = torch.tensor([position / 10000 ** (2 * i / width) for i in range(width // 2)] * 2, dtype=torch.float64)
    halves = torch.cat([-x[width // 2 :], x[: width // 2]])
    return torch.cat([x * angles.cos() + halves * angles.sin(), rest])


def slopes(heads: int) -> list[float]:
    """ALiBi's: powers of two's rule, and for other counts the odd ones of the next power."""
    power = 2 ** int(math.log2(heads))
    first = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    return first + [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]


def attended(spec: ModelSpec, x: torch.Tensor, state: State, rank: int, tp: int) -> torch.Tensor:
    """This rank's heads, side by side. Shapes: x [T, H] -> [T, H / tp]."""
    D, heads, groups = spec.hidden_size // spec.num_heads, spec.num_heads // tp, spec.num_kv_heads // tp
    rows = x @ state["attention.query_key_value.weight"].T
    if spec.attention_bias:
        rows = rows + state["attention.query_key_value.bias"]
    outputs = []
    for head in range(heads):
        group = head * groups // heads
        if heads == groups:
            query, key, value = rows[:, 3 * D * head :][:, : 3 * D].split(D, 1)
        else:
            query = rows[:, D * head :][:, :D]
            key = rows[:, D * (heads + group) :][:, :D]
            value = rows[:, D * (heads + groups + group) :][:, :D]
        slope = slopes(spec.num_heads)[rank * heads + head] if spec.position == "alibi" else 0.0
        output = []
        for t in range(len(x)):
            scores = torch.stack([
                turned(spec, query[t], t) @ turned(spec, key[s], s) / math.sqrt(D) - slope * (t - s)
                for s in range(t + 1)
            ])  # fmt: skip
            output.append(torch.softmax(scores, 0) @ value[: t + 1])
        outputs.append(torch.stack(output))
    return torch.cat(outputs, 1)


def inner(spec: ModelSpec, x: torch.Tensor, state: State) -> torch.Tensor:
    wide = x @ state["mlp.linear1.weight"].T
    if spec.mlp_bias:
        wide = wide + state["mlp.linear1.bias"]
    if spec.is_gated:
        up, gate = wide.chunk(2, -1)
        return (F.silu(gate) if spec.activation == "swiglu" else F.gelu(gate)) * up
    return F.gelu(wide, approximate="tanh" if spec.activation == "gelu_tanh" else "none")


def upstream_logits(spec: ModelSpec, ranks: list[dict[int, State]], tokens: torch.Tensor) -> torch.Tensor:
    """Logits over the real vocabulary for one sequence [T]."""
    tp, is_parallel = len(ranks), spec.residual != "sequential"

    def summed(number: int, name: str, parts: list[torch.Tensor], has_bias: bool) -> torch.Tensor:
        total = sum(part @ layers[number][f"{name}.weight"].T for part, layers in zip(parts, ranks, strict=True))
        biases = [layers[number][f"{name}.bias"] for layers in ranks] if has_bias else []
        return total + (sum(biases) if is_parallel else biases[0]) if has_bias else total

    table = torch.cat([layers[0]["word_embeddings.weight"] for layers in ranks])
    x = table[tokens]
    if spec.position == "learned":
        x = x + ranks[0][0]["position_embeddings.weight"][: len(tokens)]
    for number in range(2, spec.num_layers + 2):
        state = ranks[0][number]
        first = normed(spec, x, state, "input_layernorm")
        heads = [attended(spec, first, layers[number], rank, tp) for rank, layers in enumerate(ranks)]
        attention = summed(number, "attention.dense", heads, spec.attention_bias)
        second = normed(spec, x if is_parallel else x + attention, state, "post_attention_layernorm")
        wide = [inner(spec, second, layers[number]) for layers in ranks]
        x = x + attention + summed(number, "mlp.linear2", wide, spec.mlp_bias)
    x = normed(spec, x, ranks[0][spec.num_layers + 3], "norm")
    head = table if spec.tied_head else torch.cat([r[spec.num_layers + 4]["final_linear.weight"] for r in ranks])
    return (x @ head.T)[:, : spec.vocab_size]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_upstreams_files_mean_upstreams_function(tmp_path: Path, name: str, tp: int) -> None:
    spec = ModelSpec(**{**BASE, **CASES[name]})
    ranks = random_files(spec, tmp_path / "global_step9", tp)
    tokens = torch.randint(VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(5))
    expected = upstream_logits(spec, ranks, tokens)
    model = load_model(open_neox(tmp_path / "global_step9", spec))
    with torch.no_grad():
        found = model.logits(model(tokens[None]))[0].double()
    assert expected.abs().max() > 0.5
    assert (found - expected).abs().max() < 2e-5 * float(expected.abs().max())
