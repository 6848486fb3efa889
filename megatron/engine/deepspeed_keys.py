"""`python -m megatron.engine.deepspeed_keys`: names and types of DeepSpeed's configuration, as a table for `config`.

A configuration is checked without importing torch, hence without DeepSpeed; so what the installed DeepSpeed accepts is
written down once, in megatron/config/deepspeed_keys.json. pydantic blocks tell it themselves; for the older ones, which
are read key by key, the reading is watched. Invariant: equal to what the pinned DeepSpeed says (a test compares).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import deepspeed
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime import config as runtime
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel, TypeAdapter

from megatron.common.files import atomic_write_text

TABLE = Path(__file__).parents[1] / "config" / "deepspeed_keys.json"

# Blocks with a pydantic model; a dotted name lies in a block that has none.
MODELS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "fp16": DeepSpeedFP16Config,
    "bf16": DeepSpeedBF16Config,
    "comms_logger": CommsLoggerConfig,
    "tensorboard": TensorBoardConfig,
    "wandb": WandbConfig,
    "csv_monitor": CSVConfig,
    "comet": CometConfig,
    "compile": CompileConfig,
    "hybrid_engine": runtime.HybridEngineConfig,
    "weight_quantization": runtime.WeightQuantConfig,
    "timers.throughput": DeepSpeedThroughputTimerConfig,
}
# Blocks that are read key by key.
WATCHED = (
    "activation_checkpointing",
    "aio",
    "autotuning",
    "checkpoint",
    "checkpoint.parallel_write",
    "checkpoint.writer",
    "data_efficiency",
    "data_efficiency.data_sampling",
    "data_efficiency.data_routing",
    "data_types",
    "flops_profiler",
    "timers",
    "torch_autocast",
)


class Watched(dict[str, Any]):
    """A dictionary that notes which keys are asked for, and the default given with each."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.asked: dict[str, Any] = {}

    def get(self, name: str, default: Any = None) -> Any:
        """The value, noted."""
        self.asked[name] = default if self.asked.get(name) is None else self.asked[name]
        return super().get(name, default)

    def __contains__(self, name: object) -> bool:
        self.asked.setdefault(str(name), None)
        return super().__contains__(name)

    def __getitem__(self, name: str) -> Any:
        self.asked.setdefault(name, None)
        return super().__getitem__(name)

    def keys(self) -> Any:
        """DeepSpeed asks `name in block.keys()`; iteration sees the content."""
        return _Names(self)

    def __copy__(self) -> Watched:
        return self


class _Names:
    def __init__(self, owner: Watched) -> None:
        self.owner = owner

    def __contains__(self, name: object) -> bool:
        return name in self.owner

    def __iter__(self) -> Iterator[str]:
        return dict.__iter__(self.owner)


def deepspeed_keys() -> dict[str, Any]:
    """The table: DeepSpeed's version, its keys, and the keys that it had in earlier versions.

    A key is `{}` where any value goes, else it has `types` (JSON schema's names), and `choices`, `minimum`, `above` or,
    for a block, `keys` where they apply.
    """
    top = _watch("")
    removed = runtime._REMOVED_TOP_LEVEL_CONFIG_KEYS
    keys = {name: _by_default(default) for name, default in top.items() if name not in removed}
    for path in WATCHED:
        block = {name: _by_default(default) for name, default in _watch(path).items()}
        _put(keys, path, {"types": ["object"], "keys": block})
    for path, model in MODELS.items():
        _put(keys, path, _model(model))
    keys["pipeline"] = {
        "types": ["object"],
        "keys": {name: _by_default(default) for name, default in runtime.get_pipeline_config({}).items()},
    }
    return {
        "deepspeed": deepspeed.__version__,
        "keys": dict(sorted(keys.items())),
        "removed": sorted(removed),
        "removed_zero": sorted(runtime._REMOVED_ZERO_CONFIG_KEYS),
    }


def _watch(path: str) -> dict[str, Any]:
    """The keys that DeepSpeed asks the block at `path` for, with their defaults."""
    block = Watched({"train_micro_batch_size_per_gpu": 1} if not path else {})
    content: Any = block
    for part in reversed(path.split(".") if path else []):
        content = {part: content}
    if path:
        content = {**content, "train_micro_batch_size_per_gpu": 1}
        if path.startswith("autotuning"):
            block["enabled"] = True
        if path.startswith("data_efficiency"):
            content["data_efficiency"]["enabled"] = True
    runtime.DeepSpeedConfig(content)
    return block.asked


def _put(keys: dict[str, Any], path: str, entry: dict[str, Any]) -> None:
    *outer, name = path.split(".")
    for part in outer:
        keys = keys.setdefault(part, {}).setdefault("keys", {})
    keys[name] = entry


def _by_default(default: Any) -> dict[str, Any]:
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    kind = kinds.get(type(default))
    if kind is None or default == "auto":
        return {}
    # A default such as 1.0 may stand for a whole number and the reverse: DeepSpeed checks neither.
    return {"types": ["number" if kind == "integer" else kind]}


def _model(model: type[BaseModel]) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        # Field by field, without the extras that DeepSpeed hangs on them, which hold functions.
        kind: Any = Annotated[field.annotation, None, *field.metadata]
        schema = TypeAdapter(kind).json_schema()
        entry = _entry(schema, schema.get("$defs", {}))
        keys.update(dict.fromkeys((name, field.alias or name), entry))
    return {"types": ["object"], "keys": dict(sorted(keys.items()))}


def _entry(described: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """One field of a JSON schema in the table's form."""
    if "$ref" in described:
        target = definitions[described["$ref"].rpartition("/")[2]]
        if "properties" in target:
            inner = {name: _entry(field, definitions) for name, field in target["properties"].items()}
            return {"types": ["object"], "keys": dict(sorted(inner.items()))}
        return _entry(target, definitions)
    entry: dict[str, Any] = {}
    for part in described.get("anyOf", described.get("allOf", [])):
        inner = _entry(part, definitions)
        if not inner:
            return {}
        entry["types"] = sorted({*entry.get("types", ()), *inner.get("types", ())})
        entry.update({name: value for name, value in inner.items() if name != "types"})
    if "type" in described:
        entry["types"] = [described["type"]]
    for own, name in (("enum", "choices"), ("minimum", "minimum"), ("exclusiveMinimum", "above")):
        if own in described:
            entry[name] = described[own]
    return entry


def table_text() -> str:
    """The table as the file holds it."""
    return json.dumps(deepspeed_keys(), indent=1, default=str) + "\n"


if __name__ == "__main__":
    atomic_write_text(TABLE, table_text())
    print(TABLE, file=sys.stderr)
