"""Checkpoints against the disk and torch.save: bandwidth of saving and loading, and the stall of a background save.

    python benchmarks/checkpoint.py [--megabytes 1024] [--rounds 7] [--folder DIR] [--device cpu]

Every round does each of these once, in a new order: `dd` with fsync; a plain write and fsync of the same tensors'
bytes; torch.save and fsync; our save (checksums, manifest, fsync of files and folders, rename); the copy of a
background save and then its writing. And for loading: a plain read, torch.load, our verified read, our read alone.
Files are read from the page cache unless --cold gives the kernel leave to drop them first.
Prints medians and ratios of medians; a ratio of 1 is the disk's own speed.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from megatron.checkpoint import Piece, Reader, open_checkpoint, save
from megatron.checkpoint.piece import host_bytes
from megatron.checkpoint.snapshot import Snapshot
from megatron.parallel.sharding import ShardSpec

KINDS = ("weight", "exp_avg", "exp_avg_sq")


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to be measured")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before each read")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-benchmark-", dir=options.folder))
    try:
        _compare(folder, options)
    finally:
        shutil.rmtree(folder)


def make_pieces(megabytes: int, device: str) -> list[Piece]:
    """Weights and moments like those of a model: a few large matrices, many small vectors, random values."""
    generator = torch.Generator().manual_seed(0)
    width = 1024
    layers = max(1, int(megabytes * 1e6 / (3 * 4 * (width * width * 4 + 2 * width))))
    pieces = []
    for layer in range(layers):
        for name, shape in {"linear": (4 * width, width), "norm": (width,), "bias": (width,)}.items():
            spec = ShardSpec(shape)
            for kind in KINDS:
                tensor = torch.randn(shape, generator=generator).to(device)
                pieces.append(Piece.whole(f"layers.{layer}.{name}", kind, spec, tensor))
    return pieces


def _compare(folder: Path, options: argparse.Namespace) -> None:
    pieces = make_pieces(options.megabytes, options.device)
    tensors = {piece.key: piece.tensor for piece in pieces}
    num_bytes = sum(tensor.numel() * 4 for tensor in tensors.values())
    snapshot, ours = Snapshot(), folder / "run"
    taken: list[Piece] = []

    def dd() -> None:
        blocks = str(num_bytes // (1 << 24))
        command = ["dd", "if=/dev/zero", f"of={folder / 'dd'}", "bs=16M", f"count={blocks}", "conv=fsync"]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)

    def plain() -> None:
        with open(folder / "plain", "wb", buffering=0) as file:
            for tensor in tensors.values():
                file.write(host_bytes(tensor))
            os.fsync(file.fileno())

    def torch_save() -> None:
        with open(folder / "torch.pt", "wb") as file:
            torch.save(tensors, file)
            file.flush()
            os.fsync(file.fileno())

    def copy() -> None:
        taken[:] = snapshot.take(pieces)

    def clean(name: str) -> None:
        # What was there is removed outside of the measurement: every writer makes new files.
        for path in {
            "dd with fsync": ["dd"],
            "plain write and fsync": ["plain"],
            "torch.save and fsync": ["torch.pt"],
            "our save": ["run"],
            "background: writing": ["background"],
        }.get(name, []):
            shutil.rmtree(folder / path, ignore_errors=True)
            (folder / path).unlink(missing_ok=True)

    writers: dict[str, Callable[[], object]] = {
        "dd with fsync": dd,
        "plain write and fsync": plain,
        "torch.save and fsync": torch_save,
        "our save": lambda: save(ours, 1, pieces, {}),
        "background: the copy": copy,
        "background: writing": lambda: save(folder / "background", 1, taken or pieces, {}),
    }

    def read_plain() -> None:
        target = torch.empty(num_bytes, dtype=torch.uint8)
        view, done = target.numpy().data, 0
        with open(folder / "plain", "rb", buffering=0) as file:
            while done < num_bytes:
                done += file.readinto(view[done:]) or num_bytes

    def read_ours(verified: bool) -> None:
        reader = open_checkpoint(ours) if verified else Reader(ours / "global_step1")
        for name in reader.names():
            for kind in reader.kinds(name):
                reader.read(name, kind)

    readers: dict[str, Callable[[], object]] = {
        "plain read": read_plain,
        "torch.load": lambda: torch.load(folder / "torch.pt", weights_only=True),
        "our load, verified": lambda: read_ours(True),
        "our load alone": lambda: read_ours(False),
    }
    print(f"{len(tensors)} tensors, {num_bytes / 1e6:.0f} MB on {options.device}, {options.rounds} rounds, in {folder}")
    medians = _measure(writers, options.rounds, clean)
    _show(medians, num_bytes, "plain write and fsync")
    stall = medians["background: the copy"] / medians["our save"]
    print(f"stall of a background save: {stall:.3f} of one that training waits for")
    medians = _measure(readers, options.rounds, lambda name: _drop(folder) if options.cold else None)
    _show(medians, num_bytes, "plain read")


def _measure(group: dict[str, Callable[[], object]], rounds: int, before: Callable[[str], object]) -> dict[str, float]:
    """The median seconds of each, in rounds of a new order; the first round warms up and does not count."""
    shuffled, seconds = random.Random(0), {name: list[float]() for name in group}
    for number in range(rounds + 1):
        for name in shuffled.sample(list(group), len(group)):
            before(name)
            started = time.perf_counter()
            group[name]()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _show(medians: dict[str, float], num_bytes: int, first: str) -> None:
    for name, median in medians.items():
        rate = num_bytes / median / 1e6
        print(f"{name:>22}: {median:7.3f} s, {rate:7.0f} MB/s, {medians[first] / median:5.2f} x {first}")


def _drop(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


if __name__ == "__main__":
    main()
