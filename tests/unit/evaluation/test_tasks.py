"""Finding tasks and their data, and what is said when either is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron.common.errors import ConfigError, DataError
from megatron.evaluation import local_data
from megatron.evaluation.harness import select_tasks


def names(loaded: Any) -> list[str]:
    return sorted(loaded["tasks"])


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATA_DIR", raising=False)
    monkeypatch.setattr(local_data, "PROJECT", tmp_path / "project")


def test_names_groups_and_files_are_found_from_any_folder(data_dir: Path, tmp_path: Path) -> None:
    both = ["stdlib_completion_choice", "stdlib_perplexity"]
    assert names(select_tasks(["stdlib_completion"], str(data_dir))) == both
    assert names(select_tasks(["stdlib_perplexity"], str(data_dir))) == ["stdlib_perplexity"]
    (tmp_path / "rows.jsonl").write_text('{"text": "one two"}\n')
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ncustom_dataset: !function megatron.evaluation.local_data.jsonl\n"
        "dataset_kwargs: {file: rows.jsonl}\noutput_type: loglikelihood_rolling\ntest_split: test\n"
        'doc_to_text: ""\ndoc_to_target: text\nmetric_list: [{metric: byte_perplexity}]\n'
    )
    assert names(select_tasks(["mine.yaml"], str(tmp_path))) == ["mine"]


def test_patterns_select_tasks_and_typos_are_met_with_a_guess(data_dir: Path) -> None:
    assert names(select_tasks(["stdlib_*"], str(data_dir))) == ["stdlib_completion_choice", "stdlib_perplexity"]
    assert names(select_tasks(["stdlib_perp?exity"], str(data_dir))) == ["stdlib_perplexity"]
    with pytest.raises(ConfigError, match=r"no task is called 'stdlib_compltion'\. Did you mean stdlib_completion"):
        select_tasks(["stdlib_compltion"], str(data_dir))
    with pytest.raises(ConfigError, match=r"'hella_swag'.*hellaswag"):
        select_tasks(["hella_swag"], str(data_dir))


def test_group_and_its_own_task_together_are_refused(data_dir: Path) -> None:
    with pytest.raises(ConfigError, match="names a task twice"):
        select_tasks(["stdlib_completion", "stdlib_perplexity"], str(data_dir))


def test_missing_yaml_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such file"):
        select_tasks(["absent.yaml"])


def test_task_that_needs_the_network_says_so_offline() -> None:
    with pytest.raises(DataError, match=r"(?s)tasks piqa cannot be loaded.*is set, so nothing") as caught:
        select_tasks(["piqa"])
    assert caught.value.exit_code == 4


def test_missing_data_names_the_places_and_the_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"prepare_data\.py stdlib") as caught:
        select_tasks(["stdlib_completion"])
    assert str(tmp_path / "data/stdlib/stdlib_completion.jsonl") in str(caught.value)
    assert str(tmp_path / "project/data/stdlib/stdlib_completion.jsonl") in str(caught.value)


def test_data_folder_is_found_by_argument_variable_or_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("given", "variable", "data", "project/data"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "rows.jsonl").write_text(f'{{"text": "{folder}"}}\n')
    assert local_data.find("rows.jsonl") == tmp_path / "data/rows.jsonl"
    (tmp_path / "data/rows.jsonl").unlink()
    assert local_data.find("rows.jsonl") == tmp_path / "project/data/rows.jsonl"
    monkeypatch.setenv("DATA_DIR", "variable")
    assert local_data.find("rows.jsonl") == tmp_path / "variable/rows.jsonl"
    assert local_data.jsonl("rows.jsonl", "given", version=1)["test"][0] == {"text": "given"}


@pytest.mark.parametrize(
    ("content", "message"), [("", "is empty"), ('{"text": 1}\n{"te', r"rows\.jsonl:2: not a JSON object")]
)
def test_damaged_data_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        local_data.jsonl("rows.jsonl", str(tmp_path))


def test_without_lm_eval_the_requirements_file_is_named() -> None:
    program = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from megatron.common.errors import MegatronError\n"
        "try:\n    import megatron.evaluation.harness\n"
        "except MegatronError as error:\n    print(error)\n"
    )
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=120)
    assert "requirements/requirements-eval.txt" in done.stdout
