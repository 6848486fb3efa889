"""generate.py: upstream's keys and records, one message for bad input, output all at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron.cli.generate import main
from megatron.common.errors import CheckpointError, ConfigError, DataError, MegatronError, Stopped
from megatron.model.build import Transformer
from megatron.tokenizer.build import make_tokenizer
from tests.pool import RankFailure
from tests.unit.convert.small_models import save_model, small_model

ROOT = Path(__file__).parents[3]


@pytest.fixture
def model() -> Transformer:
    return small_model(vocab_size=258, padded_vocab_size=384)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Transformer) -> Path:
    """A working directory with run.yml, tokenizer.json, prompts.txt and checkpoints/."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|endoftext|>", "<|padding|>"]
    library.train_from_iterator([""], trainers.BpeTrainer(special_tokens=specials, initial_alphabet=alphabet))
    library.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path)
    (tmp_path / "prompts.txt").write_text("def main\n\n  import os \nx\n")
    fingerprint = make_tokenizer("HFTokenizer", "tokenizer.json").fingerprint
    save_model(tmp_path / "checkpoints", model, step=5, facts={"tokenizer": fingerprint})
    return tmp_path


def write_config(folder: Path, **changes: Any) -> None:
    values = {
        "num_layers": 3, "hidden_size": 48, "num_attention_heads": 4, "seq_length": 40, "max_position_embeddings": 40,
        "train_micro_batch_size_per_gpu": 1, "tokenizer_type": "HFTokenizer", "vocab_file": "tokenizer.json",
        "train_iters": 1, "pos_emb": "rotary", "save": "checkpoints", "checkpoint_factor": 1, "maximum_tokens": 6,
    }  # fmt: skip
    (folder / "run.yml").write_text(json.dumps(values | changes))


def records(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_the_command_answers_every_prompt_in_order(run: Path) -> None:
    command = [sys.executable, str(ROOT / "generate.py"), "run.yml", "-i", "prompts.txt", "-o", "out/samples.txt"]
    done = subprocess.run(command, cwd=run, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    found = records("out/samples.txt")
    assert [record["context"] for record in found] == ["def main", "import os", "x"]
    for record in found:
        assert list(record) == ["context", "text", "length", "finished", "message", "duration_seconds"]
        assert record["duration_seconds"] > 0
        assert record["finished"] or record["length"] == 6
        assert f"{record['context']}{record['text']}" in done.stdout
    assert "written: out/samples.txt" in done.stdout


def test_samples_depend_on_the_seed_alone(run: Path) -> None:
    texts = []
    for changes in ({}, {"recompute": True}, {"seed": 7}):
        write_config(run, temperature=1.0, **changes)
        assert main(["run.yml", "-i", "prompts.txt"]) == 0
        texts.append([record["text"] for record in records("samples.txt")])
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("tp_size", [1, 2])
def test_ranks_share_the_prompts(run: Path, ranks: Callable[..., list[Any]], tp_size: int) -> None:
    write_config(run, temperature=1.0, model_parallel_size=tp_size)
    arguments = ["run.yml", "-i", "prompts.txt", "-o", "together.txt"]
    assert ranks(main, 2, arguments) == [0, 0]
    write_config(run, temperature=1.0)
    assert main([*arguments[:-1], "alone.txt"]) == 0
    texts = [
        [(record["context"], record["text"]) for record in records(name)] for name in ("together.txt", "alone.txt")
    ]
    assert texts[0] == texts[1]
    (run / "long.txt").write_text("a\n" + "z" * 50 + "\nb")
    with pytest.raises(RankFailure, match=r"prompt 2 .* has 50 tokens"):
        ranks(main, 2, ["run.yml", "-i", "long.txt", "-o", "none.txt"])
    assert not (run / "none.txt").exists()


def test_unconditional_samples_begin_a_document(run: Path, model: Transformer) -> None:
    write_config(run, num_samples=3, return_logits=True)
    assert main(["run.yml"]) == 0
    found = records("samples.txt")
    assert [record["context"] for record in found] == [""] * 3
    with torch.no_grad():
        expected = model.logits(model(torch.tensor([[0]])))[0, 0]
    torch.testing.assert_close(torch.tensor(found[1]["logits"][0]), expected, rtol=1e-4, atol=1e-4)


def test_the_end_of_document_is_told(run: Path, model: Transformer) -> None:
    with torch.no_grad():
        model.get_parameter("head.weight").zero_()  # all logits equal: the first id, which ends a document, is chosen
    save_model(run / "checkpoints", model, step=6)
    assert main(["run.yml", "-i", "prompts.txt"]) == 0
    for record in records("samples.txt"):
        assert (record["text"], record["length"], record["finished"]) == (None, 0, True)
        assert record["message"].startswith("WARNING: text generation did not start")


def test_the_model_s_last_position_is_told(run: Path) -> None:
    (run / "prompts.txt").write_text("x" * 38)
    assert main(["run.yml", "-i", "prompts.txt"]) == 0
    (record,) = records("samples.txt")
    assert record["length"] == 2
    assert record["message"] == "stopped at the model's last position"


def test_interactive(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(run, text_gen_type="interactive", prompt_end="END")
    lines = iter(["ab", "c END", "z" * 50 + "END", "d"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, None) or (_ for _ in ()).throw(EOFError))
    assert main(["run.yml"]) == 0
    interactive = capsys.readouterr()
    assert "has 50 tokens, and the model has 40 positions" in interactive.err
    (run / "prompts.txt").write_text("ab\nc END d")
    write_config(run, prompt_end="END")
    assert main(["run.yml", "-i", "prompts.txt"]) == 0
    for record in records("samples.txt"):
        assert record["text"] in interactive.out


@pytest.mark.parametrize(
    ("arguments", "changes", "error", "told"),
    [
        (["-i", "absent.txt"], {}, DataError, r"absent\.txt does not exist.*one prompt per line"),
        (["-i", "empty.txt"], {}, DataError, r"empty\.txt holds no prompt"),
        (["-i", "binary.txt"], {}, DataError, r"binary\.txt cannot be read as UTF-8"),
        (["-i", "long.txt"], {}, DataError, r"prompt 2 \('zzz.* has 50 tokens, and the model has 40 positions"),
        (["-i", "prompts.txt"], {"load": "elsewhere"}, CheckpointError, "elsewhere does not exist"),
        (
            ["-i", "prompts.txt", "--iteration", "4"],
            {"load": "checkpoints"},
            CheckpointError,
            "no checkpoint of step 4; those there: 5",
        ),
        (["-i", "prompts.txt"], {"save": None, "checkpoint_factor": None}, ConfigError, "neither load nor save"),
        (["-i", "prompts.txt"], {"vocab_file": "other.json"}, CheckpointError, "trained with another tokenizer"),
        (["-i", "prompts.txt", "-o", "checkpoints"], {}, DataError, "checkpoints cannot be written"),
        ([], {"text_gen_type": "input-file"}, DataError, "needs sample_input_file"),
    ],
)
def test_bad_input(
    run: Path, arguments: list[str], changes: dict[str, Any], error: type[MegatronError], told: str
) -> None:
    (run / "empty.txt").write_text("\n \n")
    (run / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (run / "long.txt").write_text("a\n" + "z" * 50)
    (run / "other.json").write_text((run / "tokenizer.json").read_text().replace("<|padding|>", "<|other|>"))
    (run / "samples.txt").write_text("from before")
    write_config(run, **changes)
    with pytest.raises(error, match=told):
        main(["run.yml", *arguments])
    assert (run / "samples.txt").read_text() == "from before"
    assert not list(run.glob(".*.tmp"))


def test_a_failure_is_one_message_and_its_exit_code(run: Path) -> None:
    command = [sys.executable, str(ROOT / "generate.py"), "run.yml", "-i", "absent.txt"]
    environment = {key: value for key, value in os.environ.items() if key != "MEGATRON_DEBUG"}
    done = subprocess.run(command, cwd=run, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == DataError.exit_code
    assert done.stderr.startswith("error: prompt file absent.txt does not exist")
    assert done.stderr.count("\n") == 1


def stopped_main(arguments: list[str], rank: int, num_forwards: int) -> int:
    """`generate.py`, of which one rank gets SIGTERM before a forward pass. Returns the exit code."""
    forward, calls = Transformer.forward, 0

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == num_forwards and int(os.environ.get("RANK", "0")) == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(*args, **kwargs)

    Transformer.forward = watched  # type: ignore[method-assign]
    try:
        return main(arguments)
    except Stopped as stop:
        return stop.exit_code
    finally:
        Transformer.forward = forward  # type: ignore[method-assign]


def write_prompts(run: Path) -> list[str]:
    """Prompts of one length, more than a batch of eight."""
    prompts = [f"prompt {letter}" for letter in "abcdefghijklm"]
    (run / "many.txt").write_text("\n".join(prompts))
    return prompts


def test_a_stopped_run_keeps_complete_samples_under_another_name(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prompts = write_prompts(run)
    # Six tokens a prompt: the eighth forward pass is in the second batch.
    assert stopped_main(["run.yml", "-i", "many.txt", "-o", "out.txt"], 0, 8) == 143
    assert not (run / "out.txt").exists()
    kept = records("out.txt.partial")
    assert [record["context"] for record in kept] == prompts[:8]
    output = capfd.readouterr()
    assert "8 of 13 samples are complete, and written: out.txt.partial" in output.out
    assert "SIGTERM: stopping after this token; samples that are complete are kept" in output.err
    assert main(["run.yml", "-i", "many.txt", "-o", "out.txt"]) == 0
    whole = [record["text"] for record in records("out.txt")]
    assert [record["text"] for record in kept] == whole[:8]


def test_a_run_stopped_before_its_first_sample_writes_nothing(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert stopped_main(["run.yml", "-i", "prompts.txt", "-o", "out.txt"], 0, 2) == 143
    assert not list(run.glob("out.txt*"))
    assert "none of 3 samples is complete" in capfd.readouterr().out


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_signal_to_one_rank_stops_generation_on_all(run: Path, ranks: Callable[..., list[Any]], tp_size: int) -> None:
    prompts = write_prompts(run)
    write_config(run, model_parallel_size=tp_size)
    # The replica of rank 1 has six prompts, one batch; with tensor parallelism both ranks have all of them.
    arguments = ["run.yml", "-i", "many.txt", "-o", "out.txt"]
    assert ranks(stopped_main, 2, arguments, 1, 3 if tp_size == 1 else 8) == [143, 143]
    kept = [record["context"] for record in records("out.txt.partial")]
    assert kept == (prompts[::2] if tp_size == 1 else prompts[:8])
    assert not (run / "out.txt").exists()
