"""A checkpoint with a soft prompt, read as the model that the prompt was trained for.

No format of weights alone has a place for a prompt, so that leaving it behind must be asked for; PEFT's adapter folders
have one (megatron.convert.peft_adapter). Invariant: no exporter drops a prompt in silence.
"""

from __future__ import annotations

import dataclasses

from megatron.common.errors import CheckpointError
from megatron.convert.foreign import AnyReader, ForeignReader
from megatron.model.spec import ModelSpec


def without_prompt(reader: AnyReader, *, is_asked: bool) -> AnyReader:
    """The reader itself if there is no soft prompt, else one of the model alone.

    Raises: CheckpointError if there is one and `is_asked` is false.
    """
    spec = ModelSpec.from_dict(reader.state["model_spec"])
    if spec.soft_prompt is None:
        return reader
    if not is_asked:
        raise CheckpointError(
            f"{reader.folder} has a soft prompt of {spec.num_virtual_tokens} tokens, which this format has no place "
            "for. tools/ckpts/convert_neox_to_hf.py --adapter writes the prompt as a PEFT adapter, and "
            "--without-soft-prompt the model that it belongs to."
        )
    base = dataclasses.replace(spec, soft_prompt=None)
    plain = ForeignReader(reader.folder, base, reader.read, what="model without its soft prompt", step=reader.step)
    plain.state = {**reader.state, "model_spec": plain.state["model_spec"]}
    return plain
