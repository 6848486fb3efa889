"""A small model, its tokenizer, and its twin in transformers: the same weights seen by two programs."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron.model.build import Transformer, build_model
from megatron.model.spec import ModelSpec, SoftPrompt
from megatron.parallel.init import fill_from
from megatron.parallel.process_groups import ProcessGroups
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.build import make_tokenizer

MAX_POSITIONS = 32
TEXTS = [
    "def add(first, second):\n    return first + second\n",
    "for index in range(10):\n    print(index, index * index)\n",
    "import os\nimport sys\n\nprint(os.getcwd(), sys.argv)\n",
    "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n",
]


def write_tokenizer(folder: Path) -> Path:
    """A byte-level BPE of about 300 entries."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(TEXTS, trainer)
    path = folder / "tokenizer.json"
    raw.save(str(path))
    return path


def tokenizer(path: Path) -> Tokenizer:
    """Ours, from that file."""
    return make_tokenizer("HFTokenizer", str(path))


def model(
    groups: ProcessGroups | None = None, *, tied: bool = False, dropout: float = 0.0, prompt: SoftPrompt | None = None
) -> Transformer:
    """A GPT-NeoX with large random weights, so that scores differ clearly; its vocabulary is padded from 300 to 384."""
    spec = ModelSpec(
        num_layers=2,
        hidden_size=32,
        num_heads=4,
        num_kv_heads=4,
        ffn_size=128,
        vocab_size=300,
        padded_vocab_size=384,
        max_positions=MAX_POSITIONS,
        rotary_dims=2,
        residual="parallel",
        tied_head=tied,
        hidden_dropout=dropout,
        soft_prompt=prompt,
    )
    groups = groups or ProcessGroups.single()
    built = build_model(spec, groups)
    for name, parameter in built.named_parameters():
        fill_from(parameter, name, _draw, seed=11, tp_rank=groups.tp_rank, tp_size=groups.tp_size)
    return built.eval()


def _draw(tensor: torch.Tensor, generator: torch.Generator) -> None:
    tensor.normal_(1.0 if tensor.dim() == 1 else 0.0, 0.3, generator=generator)


@torch.no_grad()
def twin(ours: Transformer) -> torch.nn.Module:
    """The same function of the same weights in transformers; the head's padding rows are cut off."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    spec = ours.spec
    config = GPTNeoXConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        intermediate_size=spec.ffn_size,
        max_position_embeddings=spec.max_positions,
        hidden_act="gelu",
        rotary_pct=spec.rotary_dims / spec.head_dim,
        use_parallel_residual=True,
        tie_word_embeddings=False,
        layer_norm_eps=spec.norm_eps,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    theirs = GPTNeoXForCausalLM(config).eval()
    renamed = {
        "embedding.word_embeddings.": "gpt_neox.embed_in.",
        "layers.": "gpt_neox.layers.",
        "mlp.linear1.": "mlp.dense_h_to_4h.",
        "mlp.linear2.": "mlp.dense_4h_to_h.",
        "final_norm.": "gpt_neox.final_layer_norm.",
        "head.": "lm_head.",
    }
    target = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        for old, new in renamed.items():
            name = name.replace(old, new)
        target.pop(name).copy_(parameter[: spec.vocab_size] if "embed" in name or "head" in name else parameter)
    assert not target, f"left as they were: {list(target)}"
    return theirs


def write_data(folder: Path, documents: int = 9) -> Path:
    """Files as prepare_data.py writes them, under `folder`; returns `folder`."""
    draw = random.Random(5)
    rows = []
    for _ in range(documents):
        choices = draw.sample([f"{word}({number})\n" for word in ("print", "range", "len") for number in range(4)], 4)
        context = draw.choice(TEXTS)
        answer = draw.randrange(4)
        rows.append({"context": context, "choices": choices, "answer": answer})
    target = folder / "stdlib"
    target.mkdir(parents=True)
    (target / "stdlib_completion.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = [{"text": text, "meta": {"file": f"{index}.py"}} for index, text in enumerate([*TEXTS, TEXTS[0] * 5])]
    (target / "stdlib_heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    return folder
