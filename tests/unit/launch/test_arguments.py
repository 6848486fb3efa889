"""What the shared command line says of arguments that it does not know."""

from __future__ import annotations

import pytest

from megatron.common.errors import ConfigError
from megatron.launch.arguments import Parser, add_flags, overrides_of


def parser() -> Parser:
    made = Parser(prog="deepy.py", allow_abbrev=False)
    made.add_argument("user_script")
    made.add_argument("conf_file", nargs="+")
    add_flags(made)
    return made


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--set", "a=1", "lr=3", "seed=4"], "--set takes one KEY=VALUE, and is repeated: --set lr=3 --set seed=4"),
        (["--hostfil", "hosts"], "Did you mean --hostfile?"),
        (["--train-iters", "5"], "Keys of the configuration are set so: --set train_iters=VALUE"),
        (["--train_iters=5"], "Keys of the configuration are set so: --set train_iters=5"),
        (["--debug", "more.yml"], "Configuration files stand together, right behind the script"),
    ],
)
def test_the_answer_says_what_was_probably_meant(arguments: list[str], answer: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parser().parse_args(["train.py", "a.yml", *arguments])
    assert str(raised.value).splitlines()[0].endswith(answer)


def test_known_arguments_are_taken() -> None:
    options = parser().parse_args(["train.py", "a.yml", "b.yml", "--set", "a=1", "--set", "b.c=x", "-i", "prompts"])
    assert options.conf_file == ["a.yml", "b.yml"]
    assert set(overrides_of(options)) >= {"a", "sample_input_file"}
