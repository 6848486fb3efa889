"""The generated files are current and complete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron.config.editor_schema import editor_schema
from megatron.config.former_keys import RENAMED
from megatron.config.reference import PAGE, SCHEMA, reference_page
from megatron.config.schema import FIELDS, field_extra
from megatron.config.upstream_keys import EVERY_OTHER_KEY, SET_BY_PROGRAM


@pytest.mark.parametrize(("name", "make"), [(PAGE, reference_page), (SCHEMA, editor_schema)])
def test_current(name: str, make: object) -> None:
    assert callable(make)
    assert Path("configs", name).read_text() == make(), "run `python -m megatron.config.reference`"


def test_every_key_has_a_line_and_a_sentence() -> None:
    page = reference_page()
    for name in (*FIELDS, *EVERY_OTHER_KEY):
        assert f"| `{name}` |" in page
    for name, field in FIELDS.items():
        assert field.description, name
        assert field.description.endswith((".", ")")), name


def test_editor_schema_takes_what_the_loader_takes() -> None:
    schema = json.loads(editor_schema())
    expected = {name for name in FIELDS if not field_extra(name, "derived")} | (EVERY_OTHER_KEY - set(SET_BY_PROGRAM))
    expected |= set(RENAMED)
    assert set(schema["properties"]) == expected
    assert schema["additionalProperties"] is False
