"""Files as people write them: upstream's dialect loads, and every mistake is told with its line and what to do."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.common.errors import ConfigError
from megatron.config import Config, load

Write = Callable[[str, str], Path]
ROOT = Path(__file__).resolve().parents[3]
BASE = "num_layers: 2\nhidden_size: 64\nnum_attention_heads: 4\nseq_length: 32\ntokenizer_type: CharLevelTokenizer\n"

# Upstream's habits, in one file: braces, quoted and dashed keys, trailing commas, comments, Python's booleans.
DIALECT = """# GPT-2 pretraining setup
{
   # parallelism settings
   "pipe-parallel-size": 1,
   "model-parallel-size": 1,
   "num-layers": 2, "hidden-size": 64, "num-attention-heads": 4,   # sizes
   "seq-length": 32, "max-position-embeddings": 32,
   "norm": "layernorm", "pos-emb": "rotary", "rotary-pct": 0.25,
   "no-weight-tying": true, "gpt_j_residual": True, "output_layer_parallelism": "column",
   "attention-config": [[["flash"], 2]],
   "scaled-upper-triang-masked-softmax-fusion": false,
   "init_method": "small_init", "output_layer_init_method": "wang_init",
   "optimizer": {
     "type": "Adam",
     "params": {
       "lr": 0.97e-4,
       "betas": [0.9, 0.95],
       "eps":  1.0e-8,
     }
   },
   "min_lr": 1e-5,
   "zero_optimization": {
    "stage": 1,
    "allgather_partitions": True,
    "allgather_bucket_size": 5e8,
    "overlap_comm": True,
    "reduce_scatter": True,
    "reduce_bucket_size": 500000000,
    "contiguous_gradients": True,
    "cpu_offload": False
  },
   "train_micro_batch_size_per_gpu": 4,
   "gas": 2,
   "data-impl": "mmap", "tokenizer-type": "CharLevelTokenizer",
   "checkpoint-activations": true, "partition-activations": false,
   "fp16": {
     "fp16": true,
     "enabled": true,
     "loss_scale": 0,
     "loss_scale_window": 1000,
     "hysteresis": 2,
     "min_loss_scale": 1,
   },
   "train-iters": 320000, "lr-decay-style": "cosine", "extra-save-iters": [0,1,2,],
   "deepspeed_extra_args": { "comms_logger": { "enabled": true, "prof_all": True } },
   "steps_per_print": 10,
}
"""


def test_upstreams_dialect_loads_as_it_stands(write: Write) -> None:
    config = load([write("old.yml", DIALECT)], devices=1)
    assert config.optimizer.lr == 0.97e-4
    assert config.batch.gradient_accumulation_steps == 2
    assert config.precision.precision == "fp16"
    assert config.deepspeed.comms_logger == {"enabled": True, "prof_all": True}
    assert config.zero.zero_optimization is not None
    assert config.zero.zero_optimization.allgather_bucket_size == 500_000_000
    assert config.origin("comms_logger").endswith("old.yml:45")
    assert config.warnings == (
        f"{tmp(config)}:33: gas is the old name of gradient_accumulation_steps, and is read as it",
    )


def tmp(config: Config) -> str:
    return config.files[0].path


@pytest.mark.parametrize("text", [BASE.replace("\n", "\r\n"), "\ufeff" + BASE, "---\n" + BASE + "...\n"])
def test_line_ends_marks_and_document_starts(write: Write, text: str) -> None:
    assert load([write("a.yml", text)], devices=1).model.num_layers == 2


# (what stands after BASE, line, part of the message)
SYNTAX = [
    ("- seed: 3\n", 6, "A list item stands among `key: value` lines."),
    ("seed:3\n", 6, "A space is missing after the colon."),
    ("seed = 3\n", 6, "Write `key: value`, with a colon."),
    ("checkpoint_activations\n", 6, "Write `key: value`."),
    ("fp16:\n\tenabled: true\n", 7, "The line holds a tab; indent with spaces."),
    ("fp16:\n  enabled: true\n   loss_scale: 0\n", 8, "Lines of one block begin in the same column"),
    ("data_path: C:\\data: x\n", 6, "Quote the value: it holds a colon."),
    ("seed: 1; hidden_dropout: 0.1\n", 6, "without semicolons"),
    ('wandb_run_name: "my run\n', 6, "The quote that begins here is not closed."),
    ("extra_save_iters: [1, 2\nseed: 3\n", 6, "The bracket that begins here is not closed."),
    ("extra_save_iters: [1, 2\n", 6, "bracket that begins here is not closed"),
    ("fp16: *other\n", 6, "`*name` repeats what `&name` marks"),
    ("---\nseed: 3\n", 6, "A file holds one document."),
    ("<<<<<<< HEAD\nseed: 3\n=======\nseed: 4\n>>>>>>> x\n", 6, "A merge conflict is left in the file."),
    ("seed: \x013\n", 6, "control character \\x01"),
    ("{seed: 3} // comment\n", 6, "Comments begin with #."),
]


@pytest.mark.parametrize(("text", "line", "message"), SYNTAX)
def test_syntax_is_explained(write: Write, text: str, line: int, message: str) -> None:
    path = write("my.yml", BASE + text)
    with pytest.raises(ConfigError) as caught:
        load([path], devices=1)
    assert str(caught.value).startswith(f"{path}:{line}: not valid YAML: ")
    assert message in str(caught.value)


def test_json_is_explained(write: Write) -> None:
    path = write("my.json", '{\n  "num-layers": 2\n  "hidden-size": 64,\n}\n')
    with pytest.raises(ConfigError) as caught:
        load([path], devices=1)
    assert str(caught.value).startswith(f"{path}:2: not valid YAML")
    with pytest.raises(ConfigError, match=r":1: .*bracket that begins here is not closed"):
        load([write("b.json", '{\n  "num-layers": 2,\n')], devices=1)
    with pytest.raises(ConfigError, match=r":1: this is a web page"):
        load([write("c.yml", "<!DOCTYPE html><html>404</html>")], devices=1)


# (what stands after BASE, the whole message after `file:6: `)
VALUES = [
    ("train_batch_size: 1k\n", 'train_batch_size = "1k" must be a whole number. Write 1000.'),
    ("train_iters: 143,000\n", 'train_iters = "143,000" must be a whole number. Write 143000.'),
    (
        "train_iters: 2**10\n",
        'train_iters = "2**10" must be a whole number. Nothing is computed in a file: write the result.',
    ),
    ("rotary_pct: 25%\n", 'rotary_pct = "25%" must be a number. Write 0.25.'),
    ("warmup: 100\n", "warmup = 100 must be at most 1. It is a part of lr_decay_iters, not a number of steps."),
    ("train_data_paths: a, b\n", 'train_data_paths = "a, b" must be a list. Write [a, b].'),
    ("attention_config: flash\n", 'attention_config = "flash" must be a list. Write [[["flash"], "all"]].'),
    ("split: [969, 30, 1]\n", 'split = [969, 30, 1] must be text. Write it as text: "969, 30, 1".'),
    ("load: None\n", 'load = "None" is text in YAML. Write null for nothing, or remove the key.'),
    ("train_iters: None\n", 'train_iters = "None" must be a whole number. Write null for nothing, or remove the key.'),
    ("load: ~/ckpt\n", "load = ~/ckpt: ~ is not expanded. Write the whole path."),
    (
        "load: ${SAVE}/x\n",
        "load = ${SAVE}/x: variables are not expanded. Write the whole path, or give it on the command line, where the "
        'shell expands it: --set load="${SAVE}..."',
    ),
    ("seed: 99999999999999999999\n", "seed = 99999999999999999999 must be below 4294967296."),
    ("min_lr: .inf\n", "min_lr = inf must be a finite number."),
    ("NUM_KV_HEADS: 2\n", "unknown key NUM_KV_HEADS. Did you mean num_kv_heads?"),
    ("lr: 1e-4\n", "lr is worked out by the program and cannot be set. Set optimizer.params.lr instead."),
    (
        "optimizer: Adam\n",
        'optimizer = "Adam" must be a block of `key: value` lines. Write {type: Adam, params: {lr: 1e-4}}.',
    ),
    ("optimizer: {type: Adam, lr: 1}\n", "unknown key lr in optimizer: it holds type and params. Move lr into params."),
    (
        "optimizer: {type: Adam, params: {betas: (0.9, 0.95)}}\n",
        "optimizer.params.betas: a list stands in square brackets, as in [0.9, 0.95].",
    ),
    ("fp16: {loss_scale: dynamic}\n", 'fp16.loss_scale = "dynamic" must be a number. 0 means dynamic.'),
    ("[a, b]: 3\n", "a key is one word, not a list or a block. Quote it if the brackets belong to it."),
    ("wandb_group: !env NAME\n", "wandb_group has the tag !env, and tags are not read. Write the value itself."),
    ("seed: {a: 1}\n", 'seed = {"a": 1} must be a whole number.'),
]


@pytest.mark.parametrize(("text", "message"), VALUES)
def test_values_are_explained(write: Write, text: str, message: str) -> None:
    path = write("my.yml", BASE + text)
    with pytest.raises(ConfigError) as caught:
        load([path], devices=1)
    assert str(caught.value) == f"{path}:6: {message}"


TEN_MISTAKES = [
    ("num_layerz: 2", "unknown key num_layerz. Did you mean num_layers?"),
    ("hidden_size: 64k", 'hidden_size = "64k" must be a whole number. Write 64000.'),
    ("norm: batchnorm", 'norm = "batchnorm" is not one of'),
    ("fp16: {enabeld: true}", "unknown key enabeld in fp16. Did you mean enabled?"),
    ("zero_optimization: {stage: 4}", "zero_optimization.stage = 4 must be at most 3."),
    ("mlp_type: llama", "mlp_type is no key of this version: the feed-forward follows from activation."),
    ("split: 1,2,3,4", 'split = "1,2,3,4" is not up to three shares'),
    ("amp: {enabled: true}", "Apex AMP is gone from DeepSpeed."),
    ("comms_logger: {enabled: 1}", "comms_logger.enabled = 1 must be true or false."),
    ("load: ~/x", "load = ~/x: ~ is not expanded."),
]


def test_ten_mistakes_ten_messages_in_order_quickly_and_without_torch(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    (tmp_path / "my.yml").write_text(
        "num_layers: 2\nnum_attention_heads: 4\nseq_length: 32\ntokenizer_type: CharLevelTokenizer\n"
        + "".join(f"{line}\n" for line, _ in TEN_MISTAKES)
    )
    code = (
        "import sys; sys.argv[0] = 'deepy.py'\n"
        "from megatron.common.errors import run_main\n"
        "from megatron.cli.deepy import main\n"
        "try: run_main(main)\n"
        "except SystemExit as stop: code = stop.code\n"
        "assert not {'torch', 'deepspeed', 'transformers', 'numpy'} & set(sys.modules), 'imports torch'\n"
        "sys.exit(code)\n"
    )
    # Processor time: on a quiet machine the user waits as long, and on a busy one the test means the same.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [sys.executable, "-c", code, "train.py", "my.yml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    lines = result.stderr.splitlines()
    assert result.returncode == 2, result.stderr
    assert len(lines) == 10, result.stderr
    for number, (line, (_, message)) in enumerate(zip(lines, TEN_MISTAKES, strict=True), 5):
        assert f"my.yml:{number}: " in line
        assert message in line
    assert seconds < 1.5
