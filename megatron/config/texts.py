"""Text values that would be taken literally though something else is meant: `None`, `~/data`, `${SAVE}`.

Invariant: what passes is used as it stands, as a name of a file or a run.
"""

from __future__ import annotations

import re
from typing import Any

from megatron.config.draft import Draft

_PATHS = (
    "save",
    "load",
    "data_path",
    *(f"{part}{label}_data_paths" for part in ("train", "valid", "test") for label in ("", "_label")),
    "vocab_file",
    "merge_file",
    "log_dir",
    "tensorboard_dir",
    "hostfile",
    "sample_input_file",
    "sample_output_file",
)
_VARIABLE = re.compile(r"\$\{?\w+\}?")


def check_texts(draft: Draft) -> None:
    """Python's None is text in YAML; neither `~` nor variables are expanded."""
    for name in sorted(draft.given - draft.failed):
        if draft[name] == "None":
            draft.problem(name, f'{name} = "None" is text in YAML. Write null for nothing, or remove the key.')
    for name in _PATHS:
        if name in draft.failed:
            continue
        for path in _listed(draft[name]):
            if path.startswith("~"):
                draft.problem(name, f"{name} = {path}: ~ is not expanded. Write the whole path.")
            elif match := _VARIABLE.search(path):
                draft.problem(
                    name,
                    f"{name} = {path}: variables are not expanded. Write the whole path, or give it on the command "
                    f'line, where the shell expands it: --set {name}="{match[0]}..."',
                )


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())
