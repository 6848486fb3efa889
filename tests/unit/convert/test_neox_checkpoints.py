"""Upstream's checkpoint folders, written here by the rules of upstream's own mergers, read and written by ours."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.common.errors import CheckpointError
from megatron.convert.neox_export import export_neox
from megatron.convert.neox_files import find_neox_folder, open_neox
from megatron.convert.open import open_weights
from megatron.inference.load import load_model
from megatron.model.build import Transformer
from tests.unit.convert.small_models import save_model, small_model

LLAMA: dict[str, Any] = {
    "norm": "rmsnorm", "activation": "swiglu", "residual": "sequential", "attention_bias": False, "mlp_bias": False,
    "rotary_dims": 12, "ffn_size": 32,
}  # fmt: skip
GROUPED = LLAMA | {"num_kv_heads": 2}
NEW = {"up": "mlp.linear1", "down": "mlp.linear2"}
OLD = {"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}


def layer_states(model: Transformer, tp: int, names: dict[str, str], grouped: str = "blocks") -> list[dict[int, Any]]:
    """The state_dicts that upstream would hold, by tensor-parallel rank and layer, built head by head."""
    spec, weights = model.spec, {name: p.detach() for name, p in model.named_parameters()}
    norm = "scale" if spec.norm == "rmsnorm" else "weight"
    ranks: list[dict[int, Any]] = []
    for r in range(tp):

        def cut(name: str, dim: int = 0, r: int = r) -> torch.Tensor:
            return weights[name].chunk(tp, dim)[r].clone()

        layers: dict[int, Any] = {0: {"word_embeddings.weight": cut("embedding.word_embeddings.weight")}}
        if spec.position == "learned":
            layers[0]["position_embeddings.weight"] = weights["embedding.position_embeddings.weight"].clone()
        for i in range(spec.num_layers):
            mine = f"layers.{i}."
            state: dict[str, torch.Tensor] = {"attention.rotary_emb.inv_freq": torch.ones(3)}
            for which in ("input_layernorm", "post_attention_layernorm"):
                state[f"{which}.{norm}"] = weights[f"{mine}{which}.weight"].clone()
                if spec.norm == "layernorm":
                    state[f"{which}.bias"] = weights[f"{mine}{which}.bias"].clone()
            for leaf in ["weight"] + ["bias"] * spec.attention_bias:
                state[f"attention.query_key_value.{leaf}"] = attention_rows(weights, spec, mine, leaf, r, tp, grouped)
            state["attention.dense.weight"] = cut(f"{mine}attention.dense.weight", 1)
            state[f"{names['down']}.weight"] = cut(f"{mine}mlp.linear2.weight", 1)
            if spec.is_gated and "gate" in names:
                state[f"{names['gate']}.weight"] = cut(f"{mine}mlp.gate.weight")
                state[f"{names['up']}.weight"] = cut(f"{mine}mlp.up.weight")
            elif spec.is_gated:
                state[f"{names['up']}.weight"] = torch.cat([cut(f"{mine}mlp.up.weight"), cut(f"{mine}mlp.gate.weight")])
            else:
                state[f"{names['up']}.weight"] = cut(f"{mine}mlp.linear1.weight")
            if spec.mlp_bias:
                state[f"{names['up']}.bias"] = cut(f"{mine}mlp.linear1.bias")
            # Unequal shares, as training leaves them: only their sum is the model's where the residual is parallel.
            for theirs, ours, is_there in (
                ("attention.dense", "attention.dense", spec.attention_bias),
                (names["down"], "mlp.linear2", spec.mlp_bias),
            ):
                if is_there:
                    bias = weights[f"{mine}{ours}.bias"]
                    share = (r + 1) / sum(range(1, tp + 1)) if spec.residual != "sequential" else 1.0
                    state[f"{theirs}.bias"] = bias * share
            layers[i + 2] = state
        last = {f"norm.{norm}": weights["final_norm.weight"].clone()}
        if spec.norm == "layernorm":
            last["norm.bias"] = weights["final_norm.bias"].clone()
        layers[spec.num_layers + 3] = last
        if not spec.tied_head:
            layers[spec.num_layers + 4] = {"final_linear.weight": cut("head.weight")}
        ranks.append(layers)
    return ranks


def attention_rows(
    weights: dict[str, torch.Tensor], spec: Any, mine: str, leaf: str, r: int, tp: int, grouped: str
) -> torch.Tensor:
    """query_key_value of one rank, one head after another."""
    D, N, G = spec.head_dim, spec.num_heads // tp, spec.num_kv_heads // tp
    if spec.num_heads == spec.num_kv_heads:
        return weights[f"{mine}attention.query_key_value.{leaf}"].chunk(tp)[r].clone()
    query = [weights[f"{mine}attention.query.{leaf}"][(r * N + n) * D : (r * N + n + 1) * D] for n in range(N)]
    pairs = weights[f"{mine}attention.key_value.{leaf}"]
    key = [pairs[2 * (r * G + g) * D : (2 * (r * G + g) + 1) * D] for g in range(G)]
    value = [pairs[(2 * (r * G + g) + 1) * D : (2 * (r * G + g) + 2) * D] for g in range(G)]
    if grouped == "blocks":
        return torch.cat([*query, *key, *value])
    keys, values, share = torch.cat(key), torch.cat(value), D * G // N
    rows = []
    for n in range(N):
        rows += [query[n], keys[n * share : (n + 1) * share], values[n * share : (n + 1) * share]]
    return torch.cat(rows)


def write_layers(folder: Path, ranks: list[dict[int, Any]]) -> Path:
    """pipe_parallel_size >= 1: a file per layer, and mp_rank files without weights."""
    folder.mkdir(parents=True)
    for r, layers in enumerate(ranks):
        for number, state in layers.items():
            torch.save(state, folder / f"layer_{number:02d}-model_{r:02d}-model_states.pt")
        torch.save({"module": None, "iteration": 7}, folder / f"mp_rank_{r:02d}_model_states.pt")
    return folder


def write_ranks(folder: Path, ranks: list[dict[int, Any]]) -> Path:
    """pipe_parallel_size 0: a file per tensor-parallel rank, with more than weights in it."""
    import numpy

    folder.mkdir(parents=True)
    for r, layers in enumerate(ranks):
        module = {f"sequential.{number}.{key}": t for number, state in layers.items() for key, t in state.items()}
        state = {"module": module, "np_rng_state": numpy.random.default_rng(0).bit_generator.state}
        torch.save(state | {"np": numpy.ones(3), "args": {"a": 1}}, folder / f"mp_rank_{r:02d}_model_states.pt")
    return folder


def write_zero3(folder: Path, ranks: list[dict[int, Any]], dp: int) -> Path:
    """ZeRO stage 3: fp32 partitions of two groups of parameters, each padded to a multiple of dp."""
    folder.mkdir(parents=True)
    for r, layers in enumerate(ranks):
        module = {f"sequential.{number}.{key}": t for number, state in layers.items() for key, t in state.items()}
        module = {key: t for key, t in module.items() if not key.endswith("inv_freq")}
        keys = list(module)
        groups = [keys[: len(keys) // 2], keys[len(keys) // 2 :]]
        for d in range(dp):
            flats = []
            for group in groups:
                parts = []
                for key in group:
                    flat = module[key].flatten().float()
                    width = math.ceil(len(flat) / dp)
                    parts.append(torch.cat([flat, torch.full((width * dp - len(flat),), 9.0)])[d * width :][:width])
                flats.append(torch.cat(parts))
            stem = f"zero_pp_rank_{d}_mp_rank_{r:02d}"
            shapes = [{key: module[key].shape for key in group} for group in groups]
            torch.save({"module": {}, "param_shapes": shapes}, folder / f"{stem}_model_states.pt")
            optimizer = {"zero_stage": 3, "fp32_flat_groups": flats}
            torch.save({"optimizer_state_dict": optimizer}, folder / f"bf16_{stem}_optim_states.pt")
    return folder


def assert_same(folder: Path, model: Transformer, grouped: Any = None) -> None:
    reader = open_neox(folder, model.spec, grouped)
    reader.verify()
    loaded = load_model(reader)  # type: ignore[arg-type]
    for (name, ours), (other, theirs) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other
        used = model.spec.vocab_size if name.endswith(("word_embeddings.weight", "head.weight")) else len(ours)
        torch.testing.assert_close(theirs[:used], ours.detach()[:used], rtol=1e-6, atol=0)
    tokens = torch.randint(0, model.spec.vocab_size, (2, 17), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(loaded.logits(loaded(tokens)), model.logits(model(tokens)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("write", [write_layers, write_ranks])
@pytest.mark.parametrize("names", [NEW, OLD], ids=["new_names", "old_names"])
def test_neox(tmp_path: Path, tp: int, write: Any, names: dict[str, str]) -> None:
    model = small_model()
    assert_same(write(tmp_path / "global_step7", layer_states(model, tp, names)), model)


@pytest.mark.parametrize("changes", [
    {"residual": "sequential"}, {"tied_head": True}, {"position": "learned", "rotary_dims": 0}, LLAMA,
    {"attention_bias": False, "mlp_bias": False}, {"residual": "sequential", "norm": "rmsnorm"},
], ids=["sequential", "tied", "learned", "llama", "no_biases", "rmsnorm"])  # fmt: skip
def test_switches(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = small_model(**changes)
    assert_same(write_layers(tmp_path / "a", layer_states(model, 2, NEW)), model)
    assert_same(write_zero3(tmp_path / "b", layer_states(model, 2, NEW), dp=3), model)


def test_grouped_query_attention_in_both_layouts(tmp_path: Path) -> None:
    model = small_model(**GROUPED)
    w123 = {"gate": "mlp.w1", "up": "mlp.w3", "down": "mlp.w2"}
    assert_same(write_layers(tmp_path / "blocks", layer_states(model, 2, NEW)), model)
    assert_same(write_layers(tmp_path / "old", layer_states(model, 2, w123, "per_head")), model)
    between = write_layers(tmp_path / "between", layer_states(model, 2, NEW, "per_head"))
    assert_same(between, model, "per_head")
    with pytest.raises(AssertionError):
        assert_same(between, model)


def test_the_newest_folder_is_found(tmp_path: Path) -> None:
    assert find_neox_folder(tmp_path) is None
    states = layer_states(small_model(), 1, NEW)
    for step in (9, 10):
        write_layers(tmp_path / f"global_step{step}", states)
    assert find_neox_folder(tmp_path) == tmp_path / "global_step10"
    (tmp_path / "latest").write_text("global_step9")
    assert find_neox_folder(tmp_path) == tmp_path / "global_step9"
    assert find_neox_folder(tmp_path, 10) == find_neox_folder(tmp_path / "global_step10")
    assert find_neox_folder(tmp_path, 11) is None
    assert open_neox(tmp_path / "global_step10", small_model().spec).step == 10


@pytest.mark.parametrize(("tp", "with_layer_files"), [(1, True), (2, False), (4, True)])
@pytest.mark.parametrize("changes", [{}, GROUPED, {"residual": "sequential"}, {"residual": "parallel_tied"}])
def test_export_reads_back(tmp_path: Path, tp: int, with_layer_files: bool, changes: dict[str, Any]) -> None:
    if changes is GROUPED and tp == 4:
        tp = 2
    model = small_model(**changes)
    reader = save_model(tmp_path / "native", model, step=3)
    folder = export_neox(
        reader, model.spec, tmp_path / "neox", dtype=torch.float32, tp_size=tp, with_layer_files=with_layer_files
    )
    assert (tmp_path / "neox" / "latest").read_text() == "global_step3"
    assert_same(folder, model)
    if "parallel_tied" not in changes.values():
        expected = layer_states(model, tp, NEW)
        first = torch.load(sorted(folder.glob("layer_02-model_00*"))[0]) if with_layer_files else None
        for key, tensor in (first or {}).items():
            if not key.endswith("dense.bias") and not key.endswith("linear2.bias"):
                used = slice(None)
                torch.testing.assert_close(tensor[used], expected[0][2][key], rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="exists already"):
        export_neox(reader, model.spec, tmp_path / "neox", dtype=torch.float32)


def test_mistakes_are_named(tmp_path: Path) -> None:
    model = small_model()
    folder = write_layers(tmp_path / "global_step7", layer_states(model, 2, NEW))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"num_layers": 2}, "num_layers = 2"),
        ({"num_layers": 4}, "num_layers = 4"),
        ({"tied_head": True}, "final_linear"),
        ({"mlp_bias": False}, "mlp.linear1.bias"),
        ({"norm": "rmsnorm"}, "input_layernorm"),
        ({"hidden_size": 24, "num_heads": 2, "num_kv_heads": 2}, "embedding.word_embeddings.weight is"),
        ({"vocab_size": 70, "padded_vocab_size": 70}, "at least 70"),
    ]
    for changes, message in wrong:
        with pytest.raises(CheckpointError, match=message):
            load_model(open_neox(folder, small_model(**changes).spec))  # type: ignore[arg-type]
    (folder / "layer_03-model_01-model_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"layer_03-model_01-model_states\.pt missing"):
        open_neox(folder, model.spec)


def test_damage_is_named(tmp_path: Path) -> None:
    model = small_model()
    folder = write_layers(tmp_path / "global_step7", layer_states(model, 1, NEW))
    path = folder / "layer_03-model_00-model_states.pt"
    good = path.read_bytes()
    reader = open_neox(folder, model.spec)
    reader.verify()
    weights = torch.load(path)["attention.dense.weight"].numpy().tobytes()
    place = good.index(weights) + 5
    path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    with pytest.raises(CheckpointError, match=r"layer_03-model_00.*damaged"):
        open_neox(folder, model.spec).verify()
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(CheckpointError, match=r"layer_03-model_00.*cut short"):
        open_neox(folder, model.spec)


# What small_model() is, in upstream's words; the rest at upstream's defaults.
OWN_YAML = """
"num-layers": 3
"hidden-size": 48
"num-attention-heads": 4
"intermediate-size": 100
"seq-length": 40
"max-position-embeddings": 40
"layernorm-epsilon": 1.0e-6
"pos-emb": "rotary"
"rotary-pct": 0.34
"rotary-emb-base": 1000
"gpt-j-residual": true
"no-weight-tying": true
"init-method": "small_init"
"attention-config": [[["flash"], 3]]
"pipe-parallel-size": 4
"a-key-of-tomorrow": 1
"""


@pytest.mark.parametrize(("written", "changed", "told"), [
    ("", {"rotary_dims": 12}, r"rotary_pct: the checkpoint 0\.33.*, config 1\.0"),
    ("", {"rotary_base": 10000.0}, r"rotary_emb_base: the checkpoint 1000\.0, config 10000\.0"),
    ("", {"norm_eps": 1e-5}, "layernorm_epsilon: the checkpoint 1e-06, config 1e-05"),
    ("", {"residual": "sequential"}, "gpt_j_residual: the checkpoint True, config False"),
    ("", {"residual": "parallel_tied"}, "gpt_j_tied: the checkpoint False, config True"),
    ("", {"activation": "relu"}, "activation: the checkpoint 'gelu', config 'relu'"),
    ("", {"activation": "silu", "residual": "sequential"}, r"gpt_j_residual: .*\n|activation: .*'silu'"),
    ('"bias-gelu-fusion": true', {}, r"bias_gelu_fusion \(activation\): the checkpoint 'gelu_tanh', config 'gelu'"),
    ("", {"num_heads": 8, "num_kv_heads": 8, "rotary_dims": 2}, "num_attention_heads: the checkpoint 4, config 8"),
    ("", {"window": 7}, "sliding_window_width: the checkpoint None, config 7"),
    ("norm: rmsnorm", {}, "norm: the checkpoint 'rmsnorm', config 'layernorm'"),
    ("activation: softsign-of-old", {}, "activation"),
])  # fmt: skip
@pytest.mark.parametrize("beside", [False, True])
def test_what_the_checkpoint_says_of_itself_is_believed(
    tmp_path: Path, written: str, changed: dict[str, Any], told: str, beside: bool
) -> None:
    model = small_model()
    folder = write_layers(tmp_path / "global_step7", layer_states(model, 1, NEW))
    own = (tmp_path if beside else folder) / "configs"
    own.mkdir()
    (own / "own.yml").write_text(f"{OWN_YAML}{written}\n")
    notes: list[str] = []
    if not written:
        # Another tokenizer's vocabulary, and other kernels, are no other model.
        spec = dataclasses.replace(model.spec, vocab_size=60, init_method="normal", attention_dropout=0.1)
        assert open_weights(folder, spec, report=notes.append).step == 7
        assert notes[0].endswith(f"as the configured model, as {own / 'own.yml'} describes it")
    with pytest.raises(CheckpointError, match=told):
        open_weights(folder, dataclasses.replace(model.spec, **changed), report=notes.append)
    if beside:
        # A collection of configurations is not what this model was trained with.
        (own / "another.yml").write_text("")
        open_weights(folder, model.spec, report=notes.append)


def test_the_sizes_in_rank_files_are_believed(tmp_path: Path) -> None:
    model = small_model()
    folder = write_layers(tmp_path / "global_step7", layer_states(model, 1, NEW))
    arguments = {"num_layers": 3, "hidden_size": 48, "num_attention_heads": 8, "tokenizer_type": "HFTokenizer"}
    torch.save({"module": None, "args": arguments}, folder / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match="num_attention_heads: the mp_rank files 8, config 4"):
        open_weights(folder, model.spec)
