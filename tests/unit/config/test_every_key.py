"""Every key of upstream's is answered, and every key that is accepted is read by something."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.config import Config
from megatron.config.former_keys import GONE, RENAMED
from megatron.config.schema import FIELDS, SECTIONS, field_extra
from megatron.config.upstream_keys import EVERY_OTHER_KEY, MEANWHILE, NO_EFFECT, NOT_YET, REFUSED
from tests.unit.config.readers import keys_read

# All fields of upstream's argument classes (state of 2026-05), names only.
UPSTREAM = Path(__file__).with_name("upstream_keys.txt").read_text().split()

# Read, but not by `config.<section>.<key>`: where, as a pattern that must stand there.
READ_OTHERWISE = {
    **{
        f"{part}_{kind}": ("megatron/data/setup.py", f"_{kind}")
        for part in ("train", "valid", "test")
        for kind in ("data_paths", "data_weights", "label_data_paths")
        if (part, kind) not in (("train", "data_paths"), ("train", "data_weights"))
    },
    "zero_stage": ("megatron/config/schema/execution.py", r"return self\.zero_stage"),
}
# Accepted with one value only, which a rule holds it to: there is nothing to read.
ONE_VALUE = {"deepspeed", "dataset_impl"}


def test_every_upstream_key_is_answered() -> None:
    assert len(UPSTREAM) == len(set(UPSTREAM)) == 318
    assert set(UPSTREAM) - set(FIELDS) - EVERY_OTHER_KEY == set()


def test_keys_that_are_not_upstreams_say_so() -> None:
    ours = {name for name in FIELDS if field_extra(name, "ours")}
    assert (set(FIELDS) | EVERY_OTHER_KEY) - set(UPSTREAM) == ours


def test_former_keys_are_no_present_ones() -> None:
    assert not (set(GONE) | set(RENAMED)) & (set(FIELDS) | EVERY_OTHER_KEY)
    assert set(RENAMED.values()) <= set(FIELDS) | EVERY_OTHER_KEY


def test_no_accepted_key_is_ignored() -> None:
    read = keys_read(Path("megatron"))
    passed_on = set(SECTIONS["deepspeed"].model_fields)
    silent = set(FIELDS) - read - passed_on - set(READ_OTHERWISE) - ONE_VALUE
    assert silent == set(), "nothing reads them: read them, or put them where unsupported keys are"
    assert not read & set(READ_OTHERWISE), "the exception is no longer needed"
    for name, (file, pattern) in READ_OTHERWISE.items():
        assert re.search(pattern, Path(file).read_text()), name


def test_a_key_that_nothing_reads_is_found(tmp_path: Path) -> None:
    (tmp_path / "part.py").write_text(
        "def f(config, schedule: ScheduleSection):\n"
        "    training, other = config.training, 3\n"
        "    return training.seed, config.model.norm, schedule.min_lr, other.warmup, draft['lr']\n"
    )
    assert keys_read(tmp_path) == {"seed", "norm", "min_lr"}


def test_reasons_are_whole_sentences() -> None:
    for reason in (*(why for _, why in NO_EFFECT.values()), *(why for _, why in REFUSED.values()), *GONE.values()):
        assert len(reason) > 15
        assert not reason.endswith(".")
    assert set(MEANWHILE) <= {what for _, what in NOT_YET.values()}


@pytest.mark.parametrize("name", sorted(GONE))
def test_keys_of_other_versions_are_explained(refused: Callable[..., str], name: str) -> None:
    assert f"{name} is no key of this version: {GONE[name]}." in refused(**{name: 1})


def test_an_old_name_is_read_as_the_present_one(tiny: Callable[..., Config], refused: Callable[..., str]) -> None:
    config = tiny(gas=3)
    assert config.batch.gradient_accumulation_steps == 3
    assert "gas is the old name of gradient_accumulation_steps" in config.warnings[0]
    assert "moe_num_experts = 4" in refused(num_experts=4)
