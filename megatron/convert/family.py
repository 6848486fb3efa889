"""What one family of Hugging Face models is: its config.json and its tensors, in both directions.

Only plain values here; no file, no transformers. Invariant: a spec that a family accepts is what comes back when its
config.json is read again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

from megatron.common.errors import CheckpointError
from megatron.convert.recipes import SAME, Group, Recipe, grouped, interleaved
from megatron.model.spec import ModelSpec, RopeScaling, Task

EMBEDDING, HEAD, HEAD_BIAS = "embedding.word_embeddings.weight", "head.weight", "head.bias"
# They change how a model is trained, not which function its weights are.
FREE_FIELDS = frozenset(
    {"padded_vocab_size", "attention_dropout", "hidden_dropout", "init_method", "output_init_method", "init_std"}
)
# Fields that say nothing unless positions are of this kind.
_UNUSED_WITHOUT = {
    "rpe_buckets": "rpe",
    "rpe_max_distance": "rpe",
    "rotary_base": "rotary",
    "rotary_dims": "rotary",
    "rotary_interleaved": "rotary",
    "position_offset": "learned",
}


# The head of another task than predicting tokens, as transformers names it. All families have the first.
_SEQUENCE = {"sequence_classification": ("ForSequenceClassification", "score")}
NEOX_HEADS = {
    **_SEQUENCE,
    "token_classification": ("ForTokenClassification", "classifier"),
    "question_answering": ("ForQuestionAnswering", "qa_outputs"),
}
_HAS_BIAS = {"sequence_classification": False, "token_classification": True, "question_answering": True}


@dataclass(frozen=True)
class Family:
    """One model_type.

    read: config.json -> spec, defaults as transformers has them; raises CheckpointError for what is not known.
    write: spec -> the keys of config.json that describe the model. groups: all tensors, in the order of the model.
    prefix: stands before all names but the head's; older files may lack it. buffers: endings of constants that old
    versions wrote. as_expressed: the spec in the family's own terms, where it has another form of the same function.
    heads: task -> (ending of the class, name of the head).
    """

    model_type: str
    architecture: str
    read: Callable[[Mapping[str, Any]], ModelSpec]
    write: Callable[[ModelSpec], dict[str, Any]]
    groups: Callable[[ModelSpec], list[Group]]
    prefix: str
    buffers: tuple[str, ...] = ()
    head_name: str = "lm_head.weight"
    as_expressed: Callable[[ModelSpec], ModelSpec] = lambda spec: spec
    heads: Mapping[str, tuple[str, str]] = field(default_factory=lambda: _SEQUENCE)

    def refusals(self, spec: ModelSpec) -> list[str]:
        """Why the family cannot compute this model; empty if it can.

        Not a list of conditions, which a new switch could slip through: what would be read back is compared.
        """
        wanted = self.as_expressed(spec)
        try:
            back = self.read_model(self.config(wanted))
        except CheckpointError as error:
            return [str(error)]
        return [
            f"{field.name} is {getattr(spec, field.name)}, there it would be {getattr(back, field.name, field.default)}"
            for field in fields(wanted)
            if field.name not in FREE_FIELDS
            and getattr(back, field.name, field.default) != getattr(wanted, field.name)
            and _UNUSED_WITHOUT.get(field.name, spec.position) == spec.position
        ]

    def config(self, spec: ModelSpec) -> dict[str, Any]:
        """What config.json says of the model. Raises: CheckpointError for a task that the family has no head for."""
        spec = self.as_expressed(spec)
        return {
            "architectures": [self._class_name(spec)],
            "model_type": self.model_type,
            **self.write(spec),
            "tie_word_embeddings": spec.tied_head,
            **self._label_keys(spec),
        }

    def read_model(self, config: Mapping[str, Any]) -> ModelSpec:
        """The spec that config.json describes, with the task of its class. Raises: CheckpointError as `read`."""
        spec = self.read(config)
        name = (config.get("architectures") or [self.architecture])[0]
        for task, (ending, _) in self.heads.items():
            if name.endswith(ending):
                labels = 2 if task == "question_answering" else len(config.get("id2label") or ()) or 2
                return replace(
                    spec,
                    task=cast(Task, task),
                    num_labels=labels,
                    label_names=() if task == "question_answering" else _given_names(config),
                    tied_head=False,
                    head_bias=_HAS_BIAS[task],
                )
        return spec

    def _class_name(self, spec: ModelSpec) -> str:
        if spec.task == "causal_lm":
            return self.architecture
        if spec.task not in self.heads:
            raise CheckpointError(f"{self.model_type} has no class for task {spec.task} that is known here")
        stem = self.architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
        return stem + self.heads[spec.task][0]

    def _label_keys(self, spec: ModelSpec) -> dict[str, Any]:
        if spec.task == "causal_lm":
            return {}
        names = spec.label_names or _unnamed(spec.num_labels)
        return {
            "id2label": {str(number): name for number, name in enumerate(names)},
            "label2id": {name: number for number, name in enumerate(names)},
            # Ours has none in the head.
            **({"classifier_dropout": 0.0} if spec.task == "token_classification" else {}),
        }

    def all_groups(self, spec: ModelSpec) -> list[Group]:
        """The groups, with the head's where it has a matrix of its own."""
        groups = self.groups(spec)
        if spec.task != "causal_lm":
            name = self.heads[spec.task][1]
            return [*groups, *pair(name, HEAD.removesuffix(".weight"), bias=spec.head_bias)]
        if not spec.tied_head:
            groups.append(Group((self.head_name,), (HEAD,), SAME))
        if spec.head_bias:
            groups.append(Group((self.head_name.replace(".weight", ".bias"),), (HEAD_BIAS,), SAME))
        return groups


class Values:
    """config.json with the family's name in every complaint."""

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        self.config, self.name = config, name

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or the default where it is absent or null."""
        value = self.config.get(key)
        return default if value is None else value

    def need(self, key: str, wanted: Any, default: Any = None) -> None:
        """Raises: CheckpointError unless the key has the one value that is computed here."""
        if self.get(key, wanted if default is None else default) != wanted:
            raise CheckpointError(
                f"config.json of this {self.name} has {key} = {self.config[key]!r}; only {wanted!r} is known here"
            )

    def choice(self, key: str, default: str, known: Mapping[str, str]) -> str:
        """What a word means here. Raises: CheckpointError naming the known ones."""
        word = self.get(key, default)
        if word not in known:
            raise CheckpointError(f"config.json has {key} {word!r}; known are {', '.join(known)}")
        return known[word]

    def rope(self, default_base: float = 10000.0, base_key: str = "rope_theta") -> dict[str, Any]:
        """Base and scaling in the spec's terms: rope_parameters of transformers 5, or the keys of 4."""
        block = self.get("rope_parameters") or self.get("rope_scaling") or {}
        kind = block.get("rope_type", block.get("type", "default"))
        scaling = None
        if kind != "default":
            if kind not in ("linear", "llama3", "yarn"):
                raise CheckpointError(
                    f"config.json scales rotary positions by {kind!r}; known are default, linear, llama3 and yarn"
                )
            if block.get("mscale") or block.get("mscale_all_dim") or block.get("truncate") is False:
                raise CheckpointError("config.json's yarn has mscale or truncate, which is not known here")
            length = self.get("max_position_embeddings", 2048)
            original = block.get("original_max_position_embeddings") or length
            scaling = RopeScaling(
                kind,
                float(block["factor"]),
                0 if kind == "linear" else original,
                float(block.get("low_freq_factor") or 1.0),
                float(block.get("high_freq_factor") or 4.0),
                float(block.get("beta_fast") or 32.0),
                float(block.get("beta_slow") or 1.0),
                block.get("attention_factor"),
            )
        base = block.get("rope_theta", self.get(base_key, default_base))
        return {"rotary_base": float(base), "rope_scaling": scaling}


def rope_keys(spec: ModelSpec, base_key: str = "rope_theta", **more: Any) -> dict[str, Any]:
    """Base and scaling as transformers 4 and 5 look for them: under different keys, so both are written."""
    block: dict[str, Any] = {}
    if (scaling := spec.rope_scaling) is not None:
        block = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind != "linear":
            block["original_max_position_embeddings"] = scaling.original_positions
        if scaling.kind == "llama3":
            block |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
        if scaling.kind == "yarn":
            block |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
            if scaling.attention_factor is not None:
                block["attention_factor"] = scaling.attention_factor
    old: dict[str, Any] | None = dict(block) or None
    if old is not None and old["rope_type"] == "linear":
        # transformers 4.38 refuses any third key, and knows `type` only.
        old = {"type": "linear", "factor": old["factor"]}
    return {
        base_key: spec.rotary_base,
        "rope_scaling": old,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rotary_base, **more, **block},
    }


def pair(theirs: str, ours: str, recipe: Recipe = SAME, *, bias: bool = True, of_bias: Recipe = SAME) -> list[Group]:
    """The groups of a layer's weight, and of its bias where it has one."""
    groups = [Group((f"{theirs}.weight",), (f"{ours}.weight",), recipe)]
    if bias:
        groups.append(Group((f"{theirs}.bias",), (f"{ours}.bias",), of_bias))
    return groups


def joint(theirs: Sequence[str], ours: Sequence[str], recipe: Recipe, *, bias: bool) -> list[Group]:
    """The groups of several layers that one recipe joins, weights and biases alike."""
    return [
        Group(tuple(f"{name}.{part}" for name in theirs), tuple(f"{name}.{part}" for name in ours), recipe)
        for part in ("weight", "bias")
        if part == "weight" or bias
    ]


def separate_projections(spec: ModelSpec, theirs: str, ours: str) -> list[Group]:
    """Queries, keys and values that lie apart in the file as q_proj, k_proj, v_proj."""
    bias = bool(spec.qkv_bias)
    names = [f"{theirs}.{letter}_proj" for letter in "qkv"]
    if spec.num_kv_heads == spec.num_heads:
        recipe = interleaved(3, spec.num_heads, spec.head_dim)
        return joint(names, [f"{ours}.query_key_value"], recipe, bias=bias)
    recipe = interleaved(2, spec.num_kv_heads, spec.head_dim)
    return [
        *pair(names[0], f"{ours}.query", bias=bias),
        *joint(names[1:], [f"{ours}.key_value"], recipe, bias=bias),
    ]


def grouped_projection(spec: ModelSpec, theirs: str, ours: str) -> list[Group]:
    """Queries, keys and values of each kv head together in one matrix."""
    bias = bool(spec.qkv_bias)
    if spec.num_kv_heads == spec.num_heads:
        return pair(theirs, f"{ours}.query_key_value", bias=bias)
    recipe = grouped(spec.num_heads, spec.num_kv_heads, spec.head_dim)
    return joint([theirs], [f"{ours}.query", f"{ours}.key_value"], recipe, bias=bias)


def _unnamed(num_labels: int) -> tuple[str, ...]:
    """What transformers calls labels that nobody named."""
    return tuple(f"LABEL_{number}" for number in range(num_labels))


def _given_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names in config.json, in the order of their numbers; none where they are transformers' own."""
    by_number = {int(number): str(name) for number, name in (config.get("id2label") or {}).items()}
    names = tuple(by_number[number] for number in sorted(by_number))
    return () if names == _unnamed(len(names)) else names
