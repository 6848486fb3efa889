"""What is exported is, for transformers, the same function; what is not the same is not written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXForCausalLM

from megatron.checkpoint import Reader
from megatron.common.errors import CheckpointError
from megatron.convert import export as export_module
from megatron.convert.export import config_json, export_checkpoint
from megatron.convert.families import FAMILIES, family_for
from megatron.convert.families.neox import GPT_NEOX
from megatron.convert.hf_folder import HFWeights
from megatron.convert.import_hf import read_spec, read_weights
from megatron.convert.recipes import Group
from megatron.model.spec import ModelSpec
from megatron.tokenizer.build import make_tokenizer
from tests.unit.convert.small_models import BASE, save_model, small_model

VARIANTS: dict[str, dict[str, Any]] = {
    "pythia-like": {},
    "sequential": {"residual": "sequential"},
    "one norm for both branches": {"residual": "parallel_tied"},
    "tied head": {"tied_head": True},
    "tanh": {"activation": "gelu_tanh"},
    "all dims rotated": {"rotary_dims": 12},
    "no attention bias": {"attention_bias": False},
    "relu": {"activation": "relu"},
}


def transformers_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert isinstance(model, GPTNeoXForCausalLM)
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
@torch.no_grad()
def test_logits_equal(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = small_model(**changes)
    result = export_checkpoint(save_model(tmp_path, model), tmp_path / "hf", "fp32", eod_id=0)
    tokens = torch.randint(61, (3, 40), generator=torch.Generator().manual_seed(3))
    logits = model.logits(model(tokens))
    theirs = transformers_logits(tmp_path / "hf", tokens)
    assert theirs.shape == logits.shape
    assert (theirs - logits).abs().max() < 1e-4
    assert logits.abs().max() > 1, "a model this flat would hide differences"
    assert result.check.difference < 1e-4


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_is_rounded_once(tmp_path: Path, precision: str, dtype: torch.dtype) -> None:
    model = small_model()
    result = export_checkpoint(save_model(tmp_path, model), tmp_path / "hf", precision, eod_id=0)
    weights = HFWeights(tmp_path / "hf")
    assert torch.equal(weights.read("embed_out.weight"), model.get_parameter("head.weight")[:61].to(dtype))
    assert 0 < result.check.rounding < 1
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_weights_come_back_bitwise_through_several_files(tmp_path: Path) -> None:
    model = small_model()
    export_checkpoint(save_model(tmp_path, model), tmp_path / "hf", "fp32", eod_id=0, max_file_bytes=40_000)
    files = list((tmp_path / "hf").glob("model-*.safetensors"))
    assert len(files) > 3
    spec = read_spec(tmp_path / "hf")
    assert spec == dataclasses.replace(
        model.spec, padded_vocab_size=61, init_method="normal", output_init_method="scaled_normal"
    )
    back = dict(read_weights(tmp_path / "hf", spec))
    own = dict(model.named_parameters())
    assert set(back) == set(own)
    for name, tensor in back.items():
        assert torch.equal(tensor, own[name][: tensor.shape[0]]), name
    transformers_logits(tmp_path / "hf", torch.zeros(1, 2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"norm": "rmsnorm"}, "norm is rmsnorm, there it would be layernorm"),
        ({"position": "alibi"}, "position is alibi, there it would be rotary"),
        ({"num_kv_heads": 2}, "num_kv_heads is 2, there it would be 4"),
        ({"activation": "swiglu"}, "config.json has hidden_act 'swiglu'"),
        ({"mlp_bias": False}, "mlp_bias is False"),
        ({"embedding_scale": 2.0}, "embedding_scale is 2.0"),
        ({"window": 3}, "window is 3, there it would be None"),
    ],
)
def test_another_architecture_is_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    reader = save_model(tmp_path, small_model(**changes))
    with pytest.raises(CheckpointError, match=f"this model is not a GPTNeoXForCausalLM: .*{told}"):
        export_checkpoint(reader, tmp_path / "hf", "fp32", model_type="gpt_neox")
    assert [path.name for path in tmp_path.iterdir() if "hf" in path.name] == []


def test_a_field_that_the_exporter_has_not_heard_of_is_refused() -> None:
    @dataclasses.dataclass(frozen=True)
    class LaterSpec(ModelSpec):
        sinks: bool = False

    assert GPT_NEOX.refusals(LaterSpec(**BASE)) == []
    assert GPT_NEOX.refusals(LaterSpec(**BASE, sinks=True)) == ["sinks is True, there it would be False"]


def test_the_nearest_architecture_is_named_where_none_fits() -> None:
    with pytest.raises(CheckpointError, match=r"Nearest is GPTNeoXForCausalLM, but: qk_norm is True, there"):
        family_for(ModelSpec(**BASE, qk_norm=True))
    with pytest.raises(CheckpointError, match="None of them has activation bilinear"):
        family_for(ModelSpec(**(BASE | {"activation": "bilinear"})))
    assert family_for(ModelSpec(**(BASE | {"residual": "parallel_tied"}))) is GPT_NEOX


def test_a_wrong_mapping_is_caught_and_its_layer_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = save_model(tmp_path, small_model())

    def swapped(spec: ModelSpec) -> list[Group]:
        groups = GPT_NEOX.groups(spec)
        places = {group.ours[0]: place for place, group in enumerate(groups)}
        names = [f"layers.1.{norm}.bias" for norm in ("input_layernorm", "post_attention_layernorm")]
        first, second = (places[name] for name in names)
        groups[first], groups[second] = (
            dataclasses.replace(groups[first], ours=(names[1],)), dataclasses.replace(groups[second], ours=(names[0],)),
        )  # fmt: skip
        return groups

    monkeypatch.setitem(FAMILIES, "gpt_neox", dataclasses.replace(GPT_NEOX, groups=swapped))
    with pytest.raises(CheckpointError, match=r"differ.*the first to differ is layer 1, by"):
        export_checkpoint(reader, tmp_path / "hf", "fp32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step5", "latest"]


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("use_parallel_residual", False, "layer 0"),
        ("layer_norm_eps", 1e-2, "layer 0"),
        ("hidden_act", "relu", "layer 0"),
        ("rotary_emb_base", 77.0, "layer 0"),
    ],
)
def test_a_wrong_config_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any, told: str
) -> None:
    def wrong(*args: Any, **kwargs: Any) -> dict[str, Any]:
        config = config_json(*args, **kwargs) | {key: value}
        del config["rope_parameters"]
        return config

    monkeypatch.setattr(export_module, "config_json", wrong)
    with pytest.raises(CheckpointError, match=f"the first to differ is {told}"):
        export_checkpoint(save_model(tmp_path, small_model()), tmp_path / "hf", "fp32")


def test_values_beyond_half_precision_are_refused(tmp_path: Path) -> None:
    model = small_model()
    with torch.no_grad():
        model.get_parameter("layers.2.mlp.linear1.weight")[3, 4] = 1e5
    reader = save_model(tmp_path, model)
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.linear1\.weight.*beyond the range of torch\.float16"):
        export_checkpoint(reader, tmp_path / "hf", "fp16")
    assert not (tmp_path / "hf").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    reader = save_model(tmp_path, small_model())
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        export_checkpoint(reader, tmp_path / "hf", "fp32")
    assert (tmp_path / "hf" / "mine.txt").read_text() == "mine"


def test_a_checkpoint_without_an_architecture_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path, small_model(), model_spec={"layers": 3})
    with pytest.raises(CheckpointError, match="states no model that this version knows"):
        export_checkpoint(Reader(tmp_path / "global_step5"), tmp_path / "hf", "fp32")


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = LibraryTokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>", "<|padding|>"], initial_alphabet=alphabet
    )
    library.train_from_iterator(["def main() -> int: return 0"] * 3, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    library.save(str(folder / "tokenizer.json"))
    library.model.save(str(folder))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("kind", ["HFTokenizer", "GPT2BPETokenizer"])
def test_the_tokenizer_comes_along(tmp_path: Path, tokenizer_json: Path, kind: str) -> None:
    folder = tokenizer_json.parent
    files = [tokenizer_json] if kind == "HFTokenizer" else [folder / "vocab.json", folder / "merges.txt"]
    tokenizer = make_tokenizer(kind, *map(str, files))
    model = small_model(vocab_size=tokenizer.vocab_size, padded_vocab_size=320)
    export_checkpoint(save_model(tmp_path, model), tmp_path / "hf", "fp32", tokenizer=tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "def mein() ->  int:\n\treturn 漢 0<|endoftext|>"
    ids = tokenizer.encode(text)
    assert theirs.encode(text) == ids
    assert theirs.decode(ids) == text
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eod_id, tokenizer.pad_id) == (0, 1)
    assert theirs.model_max_length == 40
    if kind == "HFTokenizer":
        merges, own = (
            json.loads(path.read_text())["model"]["merges"] for path in (tmp_path / "hf/tokenizer.json", tokenizer_json)
        )
        # As versions before 4.45 read them.
        assert merges
        assert merges == [" ".join(pair) for pair in own]
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (0, 0, 1)
    written = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert "Backend" not in written["tokenizer_class"], "transformers 4 knows no such class"


def test_a_tokenizer_that_transformers_reads_otherwise_is_refused(tmp_path: Path, tokenizer_json: Path) -> None:
    tokenizer = make_tokenizer("HFTokenizer", str(tokenizer_json))
    model = small_model(vocab_size=tokenizer.vocab_size, padded_vocab_size=320)
    tokenizer.encode = lambda text: [5]  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match=r"transformers encodes 'def.*this tokenizer as \[5\]"):
        export_checkpoint(save_model(tmp_path, model), tmp_path / "hf", "fp32", tokenizer=tokenizer)
    assert not (tmp_path / "hf").exists()


def test_a_tokenizer_without_such_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"CharLevelTokenizer made of no file .*no_save_tokenizer"):
        export_checkpoint(
            save_model(tmp_path, small_model()), tmp_path / "hf", "fp32", tokenizer=make_tokenizer("CharLevelTokenizer")
        )


def test_old_and_new_config_files_are_understood() -> None:
    config = config_json(GPT_NEOX, ModelSpec(**BASE), dtype=torch.float32, ids={"eos_token_id": 0})
    old = {key: value for key, value in config.items() if key != "rope_parameters"}
    new = {key: value for key, value in config.items() if not key.startswith("rotary")}
    for version in (config, old, new):
        read = GPT_NEOX.read(version)
        assert (read.rotary_dims, read.rotary_base) == (4, 1000.0)
    assert GPT_NEOX.read(config | {"hidden_act": "gelu_fast"}).activation == "gelu_tanh"
    for change, told in (
        ({"hidden_act": "softsign"}, "hidden_act 'softsign'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "'longrope'"),
    ):
        with pytest.raises(CheckpointError, match=told):
            GPT_NEOX.read(config | change)
