"""Memory of converting a model: the peak of anonymous memory of import and export, beside 2 GB + the largest tensor.

    python benchmarks/convert_memory.py [--gigabytes 3 6] [--hidden 4096] [--vocab 128256] [--folder DIR]

Makes a random Llama of about so many gigabytes in bf16 (blocks of Llama 3 8B's shape by default), a layer at a time,
converts it to a checkpoint and back by the commands that users call, each in a process of its own, and reads that
process' RssAnon every few milliseconds. Pages of mapped files do not count: the kernel takes them back when it must.
Needs about twice the size on the disk. Exits with 1 if a peak is over the bound.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from megatron.convert.export import config_json
from megatron.convert.families import FAMILIES
from megatron.convert.hf_folder import CONFIG, write_weights
from megatron.convert.import_hf import parameter_specs
from megatron.model.spec import ModelSpec

ROOT = Path(__file__).resolve().parents[1]
ALLOWANCE = 2 * 10**9


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[3.0, 6.0])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--precision", default="auto", help="of both conversions: auto keeps bf16")
    parser.add_argument("--folder", type=Path, default=None, help="on a disk with room")
    options = parser.parse_args()
    is_within = True
    print("weights   largest    conversion   peak of anonymous memory   bound    seconds")
    for gigabytes in options.gigabytes:
        folder = Path(tempfile.mkdtemp(prefix="convert-memory-", dir=options.folder))
        try:
            is_within &= _convert(folder, gigabytes, options)
        finally:
            shutil.rmtree(folder)
    return 0 if is_within else 1


def _convert(folder: Path, gigabytes: float, options: argparse.Namespace) -> bool:
    total, largest = make_model(folder / "hf", gigabytes, options.hidden, options.vocab)
    largest *= 2 if options.precision == "fp32" else 1
    tools = ROOT / "tools/ckpts"
    there = ["convert_hf_to_neox.py", "--hf-input", folder / "hf", "--output", folder / "native"]
    back = ["convert_neox_to_hf.py", "--input_dir", folder / "native", "--output_dir", folder / "back"]
    is_within = True
    for name, (tool, *arguments) in (("import", there), ("export", back)):
        command = [sys.executable, str(tools / str(tool)), *map(str, arguments), "--precision", options.precision]
        peak, seconds = peak_of(command + (["--no_save_tokenizer"] if name == "export" else []))
        if name == "import":
            shutil.rmtree(folder / "hf")
        bound = ALLOWANCE + largest
        is_within &= peak <= bound
        print(
            f"{total / 1e9:5.1f} GB  {largest / 1e9:5.2f} GB   {name:10}   {peak / 1e9:5.2f} GB                   "
            f"{bound / 1e9:5.2f} GB  {seconds:5.0f}",
            flush=True,
        )
    return is_within


def make_model(folder: Path, gigabytes: float, hidden: int, vocab: int) -> tuple[int, int]:
    """Write a random Llama in bf16; its bytes and those of its largest tensor."""
    heads = hidden // 128
    shape = {
        "hidden_size": hidden, "num_heads": heads, "num_kv_heads": max(1, heads // 4), "ffn_size": hidden * 7 // 2,
        "vocab_size": vocab, "padded_vocab_size": vocab, "max_positions": 2048,
    }  # fmt: skip
    spec = ModelSpec(
        **shape, num_layers=1, norm="rmsnorm", norm_eps=1e-5, activation="swiglu", rotary_dims=128, rotary_base=5e5,
        tied_head=False, attention_bias=False, mlp_bias=False,
    )  # fmt: skip
    sizes = {name: 2 * math.prod(one.logical_shape) for name, one in parameter_specs(spec).items()}
    layer = sum(size for name, size in sizes.items() if name.startswith("layers."))
    layers = max(1, round((gigabytes * 1e9 - sum(sizes.values())) / layer) + 1)
    spec = ModelSpec.from_dict({**spec.to_dict(), "num_layers": layers})
    family = FAMILIES["llama"]
    specs, described = parameter_specs(spec), {}
    for group in family.all_groups(spec):
        native = [torch.empty(specs[name].logical_shape, device="meta") for name in group.ours]
        for theirs, tensor in zip(group.theirs, group.recipe.to_hf(native), strict=True):
            described[theirs] = (tuple(tensor.shape), torch.bfloat16)
    generator = torch.Generator().manual_seed(0)

    def tensor(name: str) -> torch.Tensor:
        of_shape = described[name][0]
        if len(of_shape) == 1:
            return torch.ones(of_shape, dtype=torch.bfloat16)
        return torch.empty(of_shape, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)

    folder.mkdir()
    total = write_weights(folder, described, tensor)
    config = config_json(family, spec, dtype=torch.bfloat16, ids={"bos_token_id": 0, "eos_token_id": 0})
    (folder / CONFIG).write_text(json.dumps(config))
    return total, max(sizes.values())


def peak_of(command: list[str]) -> tuple[int, float]:
    """Run the command; the largest RssAnon that was seen, in bytes, and its seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    start, peak = time.monotonic(), 0
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                break
            found = [line for line in status.splitlines() if line.startswith("RssAnon:")]
            peak = max(peak, int(found[0].split()[1]) * 1024 if found else 0)
            time.sleep(0.005)
        told = process.communicate()[0].decode()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{told}")
    return peak, time.monotonic() - start


if __name__ == "__main__":
    raise SystemExit(main())
