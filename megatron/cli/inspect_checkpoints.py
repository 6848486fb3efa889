"""`tools/ckpts/inspect_checkpoints.py`: list, show, verify and compare checkpoints.

One process, no process group; nothing is changed. Exit code: 0, 1 if compared checkpoints differ, 5 if one is damaged.
Invariant: every damage and every difference is named with its tensor.
"""

from __future__ import annotations

import argparse
import code
import fnmatch
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch

from megatron.checkpoint import Location, Reader, find, location
from megatron.checkpoint.difference import compare_random_states, compare_state, compare_tensors
from megatron.checkpoint.find import candidates, complete
from megatron.checkpoint.manifest import MANIFEST
from megatron.common.errors import CheckpointError
from megatron.launch.arguments import Parser

DIFFERENT, DAMAGED = 1, CheckpointError.exit_code
# What every save changes, and where a run lies: no difference of the runs themselves.
_EXPECTED = ("position.elapsed_s",)


def main(argv: Sequence[str] | None = None) -> int:
    """Inspect as the command line says. Raises: MegatronError for what the user can mend."""
    options = _parse(sys.argv[1:] if argv is None else argv)
    if options.compare:
        one, other = (Reader(find(folder, options.iteration)) for folder in options.dir)
        return _compare(one, other, only_differences=options.diff, as_json=options.json)
    root = location(options.dir[0])
    if options.verify:
        return _verify(root, options.iteration, as_json=options.json)
    is_one = options.iteration is not None or options.attributes or options.interactive
    if not is_one and not (root / MANIFEST).is_file():
        return _list(root, as_json=options.json)
    reader = Reader(find(root, options.iteration))
    if options.attributes:
        _query(reader, options.attributes, as_json=options.json)
    else:
        _show(reader, as_json=options.json)
    if options.interactive:
        code.interact(
            f"reader: {reader.folder}; reader.names(), reader.read(name, kind), reader.state",
            local={"reader": reader, "torch": torch},
            exitmsg="",
        )
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="inspect_checkpoints.py", description="What is in a checkpoint?", allow_abbrev=False)
    add = parser.add_argument
    add("dir", nargs="+", help="a run's save folder, or one checkpoint in it; two of them are compared")
    add("--iteration", type=int, metavar="STEP", help="the checkpoint of this step [the newest]")
    add("-a", "--attributes", nargs="+", metavar="A", help="show these: tensors (layers.0.*), or state/position/step")
    add("-i", "--interactive", action="store_true", help="a Python prompt behind the summary")
    add("-c", "--compare", action="store_true", help="compare two folders, given as two, or as one with a comma")
    add("-d", "--diff", action="store_true", help="when comparing, leave out what is identical")
    add("--verify", action="store_true", help="compare every byte with its checksum, of all checkpoints in the folder")
    add("--json", action="store_true", help="one JSON object instead of text")
    add("--debug", action="store_true", help="show tracebacks of errors")
    options = parser.parse_args(argv)
    if len(options.dir) == 1 and options.compare:
        options.dir = options.dir[0].split(",")
    options.compare = options.compare or len(options.dir) == 2
    if len(options.dir) != (2 if options.compare else 1):
        parser.error(f"{len(options.dir)} folders are given; one is shown, or two are compared")
    if options.diff and not options.compare:
        parser.error("--diff goes with two folders to compare")
    return options


def _list(root: Location, *, as_json: bool) -> int:
    found, notes = complete(root)
    if not found and not notes:
        candidates(root)  # says what is there instead
    newest = found and find(root).folder
    rows: list[dict[str, Any]] = []
    for checkpoint in sorted(found, key=lambda checkpoint: checkpoint.step):
        reader = Reader(checkpoint)
        summary = {"step": reader.step, "created": reader.created, "bytes": reader.num_bytes, **_position(reader)}
        rows.append({**summary, "layout": _layout(reader), "is_newest": checkpoint.folder == newest})
    if as_json:
        _print_json({"folder": str(root), "checkpoints": rows, "incomplete": notes})
        return 0
    print(f"{'step':>10}  {'written (UTC)':<20} {'size':>9}  {'samples':>14} {'tokens':>18}  layout")
    for row in rows:
        print(
            f"{row['step']:>10}  {row['created'][:19]:<20} {_size(row['bytes']):>9}  {row['consumed_samples']:>14,} "
            f"{row['consumed_tokens']:>18,}  {row['layout']}{'  <- newest' if row['is_newest'] else ''}"
        )
    for note in notes:
        print(f"incomplete: {note}")
    return 0


def _show(reader: Reader, *, as_json: bool) -> None:
    tensors: list[dict[str, Any]] = [
        {"name": name, "shape": list(spec.logical_shape), "dim": spec.dim, "kinds": _kinds(reader, name)}
        for name in reader.names()
        for spec in [reader.spec(name)]
    ]
    parameters = sum(math.prod(tensor["shape"]) for tensor in tensors)
    about = {"folder": str(reader.folder), "step": reader.step, "created": reader.created, "software": reader.software}
    about |= {"bytes": reader.num_bytes, "ranks": reader.num_ranks, "parameters": parameters}
    if as_json:
        _print_json({**about, "state": reader.state, "tensors": tensors, "configs": sorted(reader.source_files())})
        return
    versions = ", ".join(f"{name} {version}" for name, version in reader.software.items())
    print(f"{reader.folder}: step {reader.step}, written {reader.created} by {reader.num_ranks} ranks, {versions}")
    print(f"{parameters:,} parameters, {_size(reader.num_bytes)}, {_layout(reader)}")
    for key, value in reader.state.items():
        if key not in ("config", "anomalies"):
            print(f"  {key}: {json.dumps(value)[:200]}")
    print(f"  configs: {', '.join(reader.source_files()) or 'none'}")
    for tensor in tensors:
        divided = "" if tensor["dim"] is None else f", divided along {tensor['dim']}"
        kinds = ", ".join(f"{kind} {dtype}" for kind, dtype in tensor["kinds"].items())
        print(f"  {tensor['name']}  {tensor['shape']}{divided}: {kinds}")


def _query(reader: Reader, attributes: Sequence[str], *, as_json: bool) -> None:
    """Tensors by pattern, with their sizes; or a value of the state, nested ones separated by `/` as upstream's are."""
    answers: dict[str, Any] = {}
    for attribute in attributes:
        names = fnmatch.filter(reader.names(), attribute)
        for name in names:
            for kind in reader.kinds(name):
                answers[f"{name} ({kind})"] = _statistics(reader.read(name, kind).double())
        if not names:
            answers[attribute] = _lookup(reader, attribute)
    if as_json:
        _print_json(answers)
        return
    for attribute, value in answers.items():
        print(f"{attribute}: {json.dumps(value)}")


def _statistics(tensor: torch.Tensor) -> dict[str, Any]:
    values = {"mean": tensor.mean(), "rms": tensor.square().mean().sqrt(), "min": tensor.min(), "max": tensor.max()}
    finite = {"not_finite": int((~tensor.isfinite()).sum())}
    return {"shape": list(tensor.shape), **{name: float(value) for name, value in values.items()}, **finite}


def _lookup(reader: Reader, attribute: str) -> Any:
    value: Any = {"state": reader.state, "step": reader.step, "software": reader.software, **reader.state}
    for part in attribute.split("/"):
        if not isinstance(value, dict) or part not in value:
            there = ", ".join(value) if isinstance(value, dict) else "no further names"
            raise CheckpointError(
                f"{reader.folder}: no tensor and no value is called {attribute} (at {part!r} there are: {there}). "
                "Patterns such as layers.0.* name tensors; without --attributes everything is listed."
            )
        value = value[part]
    return value


def _verify(root: Location, step: int | None, *, as_json: bool) -> int:
    if (root / MANIFEST).is_file() or step is not None:
        readers, incomplete = [Reader(find(root, step))], list[str]()
    else:
        found, incomplete = complete(root)
        if not found and not incomplete:
            candidates(root)
        readers = [Reader(checkpoint) for checkpoint in sorted(found, key=lambda checkpoint: checkpoint.step)]
    report: list[dict[str, Any]] = []
    for reader in readers:
        here = list(reader.damages())
        report.append({"folder": str(reader.folder), "bytes": reader.num_bytes, "damages": here})
        if not as_json:
            print(f"{reader.folder}: {_size(reader.num_bytes)}, {'DAMAGED' if here else 'every checksum fits'}")
            print("".join(f"  {damage}\n" for damage in here), end="")
    if as_json:
        _print_json({"checkpoints": report, "incomplete": incomplete})
    else:
        print("".join(f"incomplete: {note}\n" for note in incomplete), end="")
    return DAMAGED if incomplete or any(entry["damages"] for entry in report) else 0


def _compare(one: Reader, other: Reader, *, only_differences: bool, as_json: bool) -> int:
    values = [entry for entry in compare_state(one.state, other.state) if entry[0] not in _EXPECTED]
    states = compare_random_states(one, other)
    differing, total = [], 0
    if not as_json:
        print(f"first: {one.folder} (step {one.step}); second: {other.folder} (step {other.step})")
        for key, then, now in values:
            print(f"{key}: {json.dumps(then)[:80]} and {json.dumps(now)[:80]}")
        for state in states:
            print(f"{state}: differs")
    for finding in compare_tensors(one, other):
        total += 1
        if not finding.is_identical:
            differing.append(finding)
        if not as_json and not (only_differences and finding.is_identical):
            print(finding)
    is_same = not (values or states or differing)
    if as_json:
        fields = ("name", "kind", "reason", "num_differing", "num_elements", "largest", "relative", "first_at")
        _print_json(
            {
                "identical": is_same,
                "tensors_compared": total,
                "tensors": [{field: getattr(finding, field) for field in fields} for finding in differing],
                "state": {key: [then, now] for key, then, now in values},
                "random_states": states,
            }
        )
    else:
        print(f"{len(differing)} of {total} tensors differ, {len(values)} values of the state")
    return 0 if is_same else DIFFERENT


def _kinds(reader: Reader, name: str) -> dict[str, str]:
    return {kind: str(reader.dtype(name, kind)).removeprefix("torch.") for kind in reader.kinds(name)}


def _position(reader: Reader) -> dict[str, int]:
    position = reader.state.get("position", {})
    return {key: position.get(key, 0) for key in ("consumed_samples", "consumed_tokens")}


def _layout(reader: Reader) -> str:
    layout = reader.state.get("layout", {})
    sizes = " x ".join(f"{axis} {layout[axis]}" for axis in ("tp", "pp", "dp") if axis in layout)
    return f"{sizes}, {layout.get('precision', '')}"


def _size(num_bytes: int) -> str:
    size, units = float(num_bytes), iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while size >= 1024 and unit != "TiB":
        size, unit = size / 1024, next(units)
    return f"{size:.4g} {unit}"


def _print_json(value: dict[str, Any]) -> None:
    # An infinite difference (NaN in one of the two) has no JSON number.
    print(json.dumps(_finite(value), indent=1, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
