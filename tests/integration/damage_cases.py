"""Every way in which a file of a checkpoint can be spoilt, and what opens the checkpoint then; for ranks of a pool."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron.checkpoint import Reader
from megatron.common.errors import MegatronError
from megatron.config import load
from megatron.engine.distributed import stop_distributed
from megatron.training.setup import build_run


@dataclass(frozen=True)
class Damage:
    """One file spoilt. kind: what it holds, or how it is spoilt. path: below the save folder. data: its new content,
    None where it is gone. told: what has to be said. is_weight: whether a reader of weights alone must notice.
    """

    kind: str
    path: str
    data: bytes | None
    told: str
    is_weight: bool = True

    @contextlib.contextmanager
    def done_to(self, root: Path) -> Iterator[None]:
        """The damage is there within the block."""
        path = root / self.path
        whole = path.read_bytes()
        if self.data is None:
            path.unlink()
        else:
            path.write_bytes(self.data)
        yield
        path.write_bytes(whole)


def damages(root: Path, step: int, seed: int) -> list[Damage]:
    """One flipped bit in every kind of content of every file of a checkpoint, at random places; and each file cut short
    at a random place, gone, or in the form that another program gives it."""
    generator = random.Random(seed)
    folder = root / f"global_step{step}"
    found = []

    def flipped(kind: str, path: Path, start: int, stop: int, told: str, *, is_weight: bool = True) -> None:
        data = bytearray(path.read_bytes())
        data[generator.randrange(start, stop)] ^= 1 << generator.randrange(8)
        found.append(Damage(kind, str(path.relative_to(root)), bytes(data), told, is_weight))

    manifest = Reader(folder)._manifest
    for number, file in enumerate(manifest["files"]):
        path = folder / file["name"]
        flipped("header", path, 0, file["header_bytes"], f"{path} is damaged: the checksum of its header")
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            pieces = [
                (name, piece)
                for name, tensor in manifest["tensors"].items()
                for piece in tensor["kinds"][kind]["pieces"]
                if piece[0] == number and piece[2] < piece[3]
            ]
            name, (_, _, start, stop, offset, _) = generator.choice(pieces)
            told = f"{path} is damaged: the checksum of tensor {name} ({kind})"
            flipped(kind, path, offset, offset + 4 * (stop - start), told, is_weight=kind == "weight")
        state = generator.choice(manifest["rank_tensors"][number])
        flipped("rng", path, state["offset"], state["offset"] + 4, f"{path}: {state['name']} is damaged")
    for kind, path in (
        ("manifest", folder / "manifest.json"),
        *(("config", path) for path in sorted((folder / "configs").iterdir())),
    ):
        flipped(kind, path, 0, path.stat().st_size, f"{path} is damaged")
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        place, size = str(path.relative_to(root)), path.stat().st_size
        cut = path.read_bytes()[: generator.randrange(size)]
        found.append(Damage("cut short", place, cut, str(path)))
        found.append(Damage("gone", place, None, str(folder if path.name == "manifest.json" else path)))
    other = json.dumps({"format": "another program's"}).encode()
    found.append(
        Damage("foreign", f"{folder.name}/manifest.json", other, f"{folder}/manifest.json is damaged or anoth")
    )
    return found


def continued_from(config_path: str, step: int, seed: int) -> list[dict[str, Any]]:
    """For every damage: the step from which training goes on, and what it says; nothing is trained."""
    config = load([config_path], devices=int(os.environ["WORLD_SIZE"]))
    assert config.checkpoint.save is not None
    root = Path(config.checkpoint.save)
    results = []
    for damage in damages(root, step, seed):
        with contextlib.ExitStack() as stack:
            dist.barrier()
            if dist.get_rank() == 0:
                stack.enter_context(damage.done_to(root))
            dist.barrier()
            said = io.StringIO()
            try:
                with contextlib.redirect_stdout(said):
                    run = build_run(config)
                    run.close()
                result = {"step": run.position.step, "said": said.getvalue()}
            except MegatronError as error:
                result = {"step": None, "said": str(error)}
            dist.barrier()
        results.append({"kind": damage.kind, "told": damage.told, "path": damage.path, **result})
    stop_distributed()
    return results


def put_foreign(folder: Path) -> None:
    """What upstream leaves in a folder of the same name."""
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "mp_rank_00_model_states.pt").write_bytes(b"pickled")
    (folder / "layer_00-model_00-model_states.pt").write_bytes(b"pickled")
