"""`manifest.json`: what a checkpoint folder holds, and where.

Line one carries the checksum of all that follows, so that a damaged manifest is known from a whole one. Merging the
ranks' indices into one manifest happens here too; no tensor is touched. Invariant: a manifest that `merge` returns
covers every logical tensor exactly once.

Layout of the JSON object (format version 1):
    format_version, step, created (UTC), created_ns, software {package: version}
    files: [{name, bytes, header_bytes, header_crc32}]
        one safetensors file per rank; a rank's number is its position in this list
    suffix: "-1", "-2", ... where an attempt on object storage gave its files names of their own; else absent
    configs: {name: crc32}
        the sources of the run's configuration, under configs/ (configs<suffix>/)
    tensors: {name: {shape, dim, used_rows?, kinds: {kind: {dtype, tp_size, pieces}}}}
        pieces: [[file, tp_rank, start, stop, offset, crc32]], offset in bytes from the start of the file
    rank_tensors: [[{name, shape, dtype, offset, crc32}]]
        per rank: random generator states and the like
    state: {...}
        what the run gave: model spec, layout, consumed samples, schedule, loss scale, fingerprints
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import re
import time
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from megatron.checkpoint.layout import check_cover
from megatron.checkpoint.location import Location, file_sizes
from megatron.common.errors import CheckpointError
from megatron.parallel.sharding import ShardSpec

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CONFIGS = "configs"
_FIRST_LINE = re.compile(rb'\{"manifest_crc32": "([0-9a-f]{8})",\n')


def rank_file(rank: int, suffix: str = "") -> str:
    """Name of the safetensors file of one rank; `suffix` as in the manifest."""
    return f"rank_{rank:05d}{suffix}.safetensors"


def configs_folder(manifest: Mapping[str, Any]) -> str:
    """Name of the folder with the sources of the configuration."""
    return CONFIGS + str(manifest.get("suffix", ""))


def dumps(manifest: Mapping[str, Any]) -> bytes:
    """The file's bytes. Raises: ValueError for NaN, TypeError for what JSON cannot hold."""
    body = json.dumps(manifest, separators=(",", ":"), allow_nan=False)[1:].encode() + b"\n"
    return b'{"manifest_crc32": "%08x",\n' % zlib.crc32(body) + body


def load(folder: Location) -> dict[str, Any]:
    """Read and check a folder's manifest, and that every file it names is there with its size.

    Raises: CheckpointError naming the file that is missing, cut short or damaged.
    """
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} holds no {MANIFEST}: it is not a complete checkpoint of this program"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    first = _FIRST_LINE.match(data)
    if first is None:
        raise CheckpointError(f"{path} is damaged or another program's: it does not begin with a checksum")
    if int(first.group(1), 16) != zlib.crc32(data[first.end() :]):
        raise CheckpointError(f"{path} is damaged: its checksum does not fit its content")
    manifest: dict[str, Any] = json.loads(data)
    if manifest["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {manifest['format_version']}, this program reads up to {FORMAT_VERSION}. "
            "Use the version of the program that wrote it, or a newer one."
        )
    there = file_sizes(folder, [file["name"] for file in manifest["files"]])
    for file in manifest["files"]:
        check_size(folder / file["name"], file["bytes"], there.get(file["name"]))
    return manifest


def check_size(path: Location, expected: int, size: int | None) -> None:
    """Raises: CheckpointError if the file is missing (size None) or of another size."""
    if size is None:
        raise CheckpointError(f"{path} is missing")
    if size != expected:
        raise CheckpointError(f"{path} has {size} bytes, its manifest says {expected}: it was cut short or replaced")


def merge(
    indices: Sequence[Mapping[str, Any]],
    *,
    step: int,
    state: Mapping[str, Any],
    configs: Mapping[str, int],
    used_rows: Mapping[str, int],
    expected_names: Collection[str] | None,
) -> tuple[dict[str, Any], list[str]]:
    """Make one manifest of the ranks' indices; also return the names of tensors whose replicas differ.

    Raises: CheckpointError naming the tensors that are not covered exactly once, or that ranks describe differently.
    """
    tensors: dict[str, Any] = {}
    problems: list[str] = []
    written: dict[tuple[Any, ...], int] = {}
    for file, index in enumerate(indices):
        for piece in index["pieces"]:
            shape_and_dim = {"shape": piece["shape"], "dim": piece["dim"]}
            tensor = tensors.setdefault(piece["name"], {**shape_and_dim, "kinds": {}})
            kind = tensor["kinds"].setdefault(
                piece["kind"], {"dtype": piece["dtype"], "tp_size": piece["tp_size"], "pieces": []}
            )
            if any(tensor[k] != v for k, v in shape_and_dim.items()) or any(
                kind[k] != piece[k] for k in ("dtype", "tp_size")
            ):
                problems.append(f"{piece['name']} ({piece['kind']}): ranks give different shapes, types or layouts")
            where = [piece[k] for k in ("tp_rank", "start", "stop")]
            kind["pieces"].append([file, *where, piece["offset"], piece["crc32"]])
            written[_range_key(piece)] = piece["crc32"]
    for name, tensor in tensors.items():
        spec = ShardSpec(tuple(tensor["shape"]), tensor["dim"])
        if name in used_rows:
            tensor["used_rows"] = used_rows[name]
        for kind_name, kind in tensor["kinds"].items():
            kind["pieces"].sort(key=lambda piece: piece[1:3])
            problem = check_cover(f"{name} ({kind_name})", spec, kind["tp_size"], (p[1:4] for p in kind["pieces"]))
            problems += [problem] if problem else []
        if "weight" not in tensor["kinds"]:
            problems.append(f"{name}: {', '.join(tensor['kinds'])} given without its weight")
    for name in sorted(set(expected_names or tensors) ^ set(tensors)):
        problems.append(f"{name}: " + ("not part of the model" if name in tensors else "no rank gave it"))
    if problems:
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CheckpointError("the ranks' pieces do not make up the model:\n  " + "\n  ".join(problems[:10]) + more)
    replicas = [piece for index in indices for piece in index["replicas"]]
    differing = sorted(
        {piece["name"] for piece in replicas if written.get(_range_key(piece), piece["crc32"]) != piece["crc32"]}
    )
    now = time.time_ns()
    manifest = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "created": datetime.datetime.fromtimestamp(now / 1e9, datetime.UTC).isoformat(timespec="seconds"),
        "created_ns": now,
        "software": software_versions(),
        "files": [index["file"] for index in indices],
        "configs": dict(configs),
        "tensors": tensors,
        "rank_tensors": [index["rank_tensors"] for index in indices],
        "state": dict(state),
    }
    return manifest, differing


def _range_key(piece: Mapping[str, Any]) -> tuple[Any, ...]:
    tp_rank = 0 if piece["dim"] is None else piece["tp_rank"]
    return piece["name"], piece["kind"], tp_rank, piece["start"], piece["stop"]


def software_versions() -> dict[str, str]:
    """Versions of what shapes a run's numbers, as far as installed."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "deepspeed", "numpy", "tokenizers", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
