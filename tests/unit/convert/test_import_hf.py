"""What does not fit is named and leaves nothing behind; what fits comes with its YAML, tokenizer and types."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.checkpoint import Reader
from megatron.cli import convert_hf_to_neox, convert_neox_to_hf
from megatron.common.errors import CheckpointError
from megatron.config import load
from megatron.convert import hf_folder, import_hf, publish
from megatron.convert.export import export_checkpoint
from megatron.convert.families import FAMILIES
from megatron.convert.hf_folder import INDEX, SINGLE, HFWeights
from megatron.convert.import_hf import import_folder, read_spec, read_weights
from megatron.convert.logit_check import check_logits, prompts
from megatron.convert.yaml_config import yaml_text
from megatron.model.from_config import model_spec
from tests.parity.hf_models import MODELS, VOCAB, make

TOKENIZER = {
    "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": None,
    "post_processor": None, "decoder": None,
    "added_tokens": [{
        "id": 2, "content": "</s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
        "special": True,
    }],
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "</s>": 2}, "unk_token": "a"},
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in several files, with a tokenizer."""
    folder = tmp_path_factory.mktemp("saved") / "tiny-llama"
    make("llama-2", folder, torch.bfloat16)
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    settings = {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1], "top_p": 0.9}))
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "tiny-llama"))


def first_file(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Join the files into one and change what it holds."""
    tensors = {name: t for path in folder.glob("model-*.safetensors") for name, t in load_file(path).items()}
    for path in [*folder.glob("model-*.safetensors"), folder / INDEX]:
        path.unlink()
    change(tensors)
    save_file(tensors, folder / SINGLE, {"format": "pt"})


def change_config(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def cut(folder: Path) -> None:
    path = first_file(folder)
    path.write_bytes(path.read_bytes()[:-40])


MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file cut short": (cut, r"model-00001-of-\d+\.safetensors is damaged or cut short .*Download it again"),
    "a file missing": (
        lambda f: first_file(f).unlink(), r"model-00001-of-\d+\.safetensors is missing; model.safetensors.index.json"
    ),
    "a tensor missing": (
        lambda f: change_tensors(f, lambda t: t.pop("model.layers.2.mlp.up_proj.weight")),
        r"holds no tensor model\.layers\.2\.mlp\.up_proj\.weight, which its config.json asks for",
    ),
    "a tensor too many": (
        lambda f: change_tensors(f, lambda t: t.update({"model.layers.9.mlp.up_proj.weight": torch.ones(2)})),
        r"holds model\.layers\.9\.mlp\.up_proj\.weight, no part of a LlamaForCausalLM",
    ),
    "a wrong shape": (
        lambda f: change_config(f, intermediate_size=48),
        r"model\.layers\.0\.mlp\.gate_proj\.weight in .* has shape \[44, 32\]; its config.json asks for \[48, 32\]",
    ),
    "fewer kv heads": (
        lambda f: change_config(f, num_key_value_heads=1),
        r"layers\.0\.self_attn\.k_proj\.weight in .* has shape \[16, 32\]; its config.json asks for \[8, 32\]",
    ),
    "fewer layers": (
        lambda f: change_config(f, num_hidden_layers=3), r"holds model\.layers\.3\..* and 8 more, no part"
    ),
    "another architecture": (
        lambda f: change_config(f, model_type="gpt2"), r"holds no tensor transformer\.wte\.weight"
    ),
    "an unknown one": (
        lambda f: change_config(f, model_type="mixtral"), "model_type 'mixtral'; known are gpt_neox, gpt2"
    ),
    "an unknown activation": (lambda f: change_config(f, hidden_act="laplace"), "hidden_act 'laplace'; known are silu"),
    "an unknown scaling": (
        lambda f: change_config(f, rope_parameters={"rope_type": "longrope"}),
        "scales rotary positions by 'longrope'; known are default, linear, llama3 and yarn",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), r"holds no config\.json.* Download the whole model"),
    "a broken config": (lambda f: (f / "config.json").write_text("{"), "config.json is no JSON"),
    "no weights": (
        lambda f: [path.unlink() for path in f.glob("model*")], "holds neither model.safetensors nor model.safetensors"
    ),
    "a head that is not the tied embedding": (
        lambda f: change_config(f, tie_word_embeddings=True),
        r"lm_head\.weight differs from model\.embed_tokens\.weight",
    ),
    "values that are not finite": (
        lambda f: change_tensors(f, lambda t: t["model.norm.weight"].__setitem__(3, float("nan"))),
        r"tensor final_norm\.weight of .*: it is not finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "told"), MISTAKES.values(), ids=MISTAKES)
def test_what_does_not_fit_is_named(folder: Path, tmp_path: Path, spoil: Callable[[Path], object], told: str) -> None:
    spoil(folder)
    with pytest.raises(CheckpointError, match=told):
        import_folder(folder, tmp_path / "native")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-llama"], "something half-written was left behind"


def test_a_wrong_mapping_is_caught_and_its_layer_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = FAMILIES["llama"]

    def swapped(spec: Any) -> Any:
        groups = llama.groups(spec)
        places = {group.theirs[0]: place for place, group in enumerate(groups)}
        gate, up = (places[f"model.layers.2.mlp.{name}_proj.weight"] for name in ("gate", "up"))
        theirs = groups[gate].theirs
        groups[gate] = dataclasses.replace(groups[gate], theirs=groups[up].theirs)
        groups[up] = dataclasses.replace(groups[up], theirs=theirs)
        return groups

    monkeypatch.setitem(FAMILIES, "llama", dataclasses.replace(llama, groups=swapped))
    with pytest.raises(CheckpointError, match="the first to differ is layer 2, by"):
        import_folder(folder, tmp_path / "native")
    assert not (tmp_path / "native").exists()


@pytest.mark.parametrize("run_bytes", [1, 60_000])
def test_a_large_model_is_compared_in_runs_of_layers(tmp_path: Path, run_bytes: int) -> None:
    make("qwen2-window", tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "native")
    reader, spec = Reader(tmp_path / "native/global_step0"), read_spec(tmp_path / "hf")
    check = check_logits(reader, spec, FAMILIES["qwen2"], tmp_path / "hf", None, scratch=tmp_path, run_bytes=run_bytes)
    assert check.difference < 1e-4
    change_config(tmp_path / "hf", layer_types=["full_attention"] * 3 + ["sliding_attention"])
    with pytest.raises(CheckpointError, match="the first to differ is layer 2"):
        check_logits(reader, spec, FAMILIES["qwen2"], tmp_path / "hf", None, scratch=tmp_path, run_bytes=run_bytes)
    assert not list(tmp_path.glob("layers-*"))


@pytest.mark.parametrize(("tensor", "ours"), [("model.embed_tokens", "embedding.word"), ("lm_head", "head.weight")])
def test_rows_that_no_prompt_has_are_compared_too(tmp_path: Path, tensor: str, ours: str) -> None:
    make("llama-2", tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "native")
    reader, spec = Reader(tmp_path / "native/global_step0"), read_spec(tmp_path / "hf")
    row = next(number for number in range(VOCAB) if number not in prompts(spec, 1234))
    change_tensors(tmp_path / "hf", lambda tensors: tensors[f"{tensor}.weight"][row, 3:].neg_())
    with pytest.raises(CheckpointError, match=rf"row {row} of {ours}.* is not that of {tensor}\.weight"):
        check_logits(reader, spec, FAMILIES["llama"], tmp_path / "hf", None, scratch=tmp_path, run_bytes=1)


@pytest.mark.parametrize("name", MODELS)
def test_the_yaml_says_the_same_model(tmp_path: Path, name: str) -> None:
    from transformers import AutoConfig

    model_type, keys = MODELS[name]
    AutoConfig.for_model(model_type, **keys).save_pretrained(tmp_path)
    spec = read_spec(tmp_path)
    text = yaml_text(spec, tmp_path / "native", [], tmp_path / "tiny", torch.bfloat16)
    assert all("  # " in line for line in text.split("\n") if ":" in line and not line.startswith("#"))
    text = text.replace("vocab_size: 75", "vocab_size: 512")
    (tmp_path / "model.yml").write_text(text.replace("padded_vocab_size: null", "tokenizer_type: CharLevelTokenizer"))
    config = load([tmp_path / "model.yml"], planning=True)
    read = model_spec(config)
    expected = vars(spec) | {"vocab_size": 512, "padded_vocab_size": read.padded_vocab_size}
    assert vars(read) == expected
    assert not [warning for warning in config.warnings if "no effect" in warning]


def test_types_stay_or_are_converted_as_asked(folder: Path, tmp_path: Path) -> None:
    import_folder(folder, tmp_path / "kept")
    assert Reader(tmp_path / "kept/global_step0").dtype("final_norm.weight") == torch.bfloat16
    result = import_folder(folder, tmp_path / "wide", dtype=torch.float32)
    reader = Reader(tmp_path / "wide/global_step0")
    assert reader.dtype("layers.0.attention.key_value.weight") == torch.float32
    assert result.check.rounding == 0
    export_checkpoint(reader, tmp_path / "back", "bf16")
    before, after = HFWeights(folder), HFWeights(tmp_path / "back")
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.names())
    half = import_folder(tmp_path / "back", tmp_path / "half", dtype=torch.float16)
    assert Reader(tmp_path / "half/global_step0").dtype("final_norm.weight") == torch.float16
    assert half.check.difference < 1e-4


def test_pickled_files_are_read_without_running_them(folder: Path, tmp_path: Path) -> None:
    weights = HFWeights(folder)
    tensors = {name: weights.read(name) for name in weights.names()}
    for path in folder.glob("model*"):
        path.unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    read = dict(read_weights(folder))
    assert torch.equal(read["head.weight"], tensors["lm_head.weight"])
    torch.save({"lm_head.weight": Harmful()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be read as plain tensors"):
        import_folder(folder, tmp_path / "native")
    assert not Harmful.ran


class Harmful:
    """Would run code when it is unpickled."""

    ran = False

    def __reduce__(self) -> tuple[Any, ...]:
        return (setattr, (Harmful, "ran", True))


def test_the_commands_there_and_back(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--hf-input", str(folder), "--output", str(tmp_path / "native")]
    assert convert_hf_to_neox.main([*arguments, "--config-out", str(tmp_path / "my.yml")]) == 0
    shown = capsys.readouterr().out
    assert "checked: transformers' logits equal the native ones" in shown
    assert f"written: {tmp_path / 'my.yml'}" in shown
    config = load([tmp_path / "my.yml"], planning=True)
    assert config.checkpoint.load == str(tmp_path / "native")
    assert (config.tokenizer.vocab_size, config.tokenizer.padded_vocab_size) == (75, 128)
    assert config.precision.precision == "bfloat16"
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        convert_hf_to_neox.main(arguments)
    with pytest.raises(CheckpointError, match=r"is no folder\. --hf-input is a model's folder"):
        convert_hf_to_neox.main(["--hf-input", str(tmp_path / "nowhere"), "--output", str(tmp_path / "x")])
    back = ["--input_dir", str(tmp_path / "native"), "--output_dir", str(tmp_path / "back")]
    assert convert_neox_to_hf.main([*back, "--no_save_tokenizer"]) == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out
    before, after = HFWeights(folder), HFWeights(tmp_path / "back")
    assert set(before.names()) == set(after.names())
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.names())
    settings = json.loads((tmp_path / "back/tokenizer_config.json").read_text())
    assert settings == {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    assert json.loads((tmp_path / "back/generation_config.json").read_text())["top_p"] == 0.9
    config_json = json.loads((tmp_path / "back/config.json").read_text())
    assert (config_json["bos_token_id"], config_json["eos_token_id"]) == (1, 2)
    assert config_json["torch_dtype"] == config_json["dtype"] == "bfloat16"


def test_a_stop_before_the_rename_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(import_hf, "check_logits", stopped)
    with pytest.raises(KeyboardInterrupt):
        import_folder(folder, tmp_path / "native")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-llama"]


def test_other_folders_are_told_what_they_are(folder: Path, tmp_path: Path) -> None:
    import_folder(folder, tmp_path / "native")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    for given, told in (
        (tmp_path / "native", "It is a checkpoint already"),
        (tmp_path / "native/global_step0", "It is a checkpoint already"),
        (tmp_path, "these have one: tiny-llama"),
        (adapter, "It is a PEFT adapter"),
    ):
        with pytest.raises(CheckpointError, match=told):
            import_folder(given, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_tokenizer_that_does_not_fit_is_told(folder: Path, tmp_path: Path) -> None:
    assert import_folder(folder, tmp_path / "own").warnings == []
    (folder / "tokenizer.json").unlink()
    (without,) = import_folder(folder, tmp_path / "without").warnings
    assert "no tokenizer in the folder" in without
    tokenizer: dict[str, Any] = {"model": {"vocab": {"a": 0, "b": VOCAB - 1}}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert import_folder(folder, tmp_path / "fits").warnings == []
    tokenizer["added_tokens"] = [{"id": VOCAB + 2, "content": "<x>"}]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (told,) = import_folder(folder, tmp_path / "large").warnings
    assert f"ids up to {VOCAB + 2}, the model rows for {VOCAB}" in told


@pytest.mark.parametrize("moment", ["before", "while writing"])
def test_a_full_disk_is_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    import_folder(folder, tmp_path / "native")
    reader = Reader(tmp_path / "native/global_step0")
    if moment == "before":
        monkeypatch.setattr(publish.shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
        told = r"back needs 68\.\d+ kB and 10\.00 kB are free there; nothing was written"
    else:

        def full(tensor: torch.Tensor) -> Any:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(hf_folder, "host_bytes", full)
        told = "back could not be made: No space left on device. Nothing was left behind"
    with pytest.raises(CheckpointError, match=told):
        export_checkpoint(reader, tmp_path / "back", "stored")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["native", "tiny-llama"]
