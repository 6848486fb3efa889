"""The runner of `make quickstart`: what is printed runs, what is done is not done again, the first failure ends it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tools import quickstart
from tools.quickstart import Step, main, run_steps

COPY = f"{sys.executable} -c 'import shutil, sys; shutil.copy(sys.argv[1], sys.argv[2])'"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_text("text")
    return tmp_path


def copy_step(source: str, target: str) -> Step:
    return Step(f"make {target}", f"{COPY} {source} {target}", [Path(source)], [Path(target)])


def test_every_command_is_printed_and_run_once(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    steps = [copy_step("a", "b"), copy_step("b", "c")]
    assert run_steps(steps) == 0
    assert (here / "c").read_text() == "text"
    first = capfd.readouterr().out
    assert all(f"$ {step.command}\n" in first for step in steps)
    assert run_steps(steps) == 0
    again = capfd.readouterr().out
    assert "$ " not in again
    assert again.count("already done") == 2


def test_a_changed_input_renews_what_depends_on_it(here: Path) -> None:
    steps = [copy_step("a", "b"), copy_step("b", "c")]
    run_steps(steps)
    (here / "a").write_text("new")
    now = (here / "c").stat().st_mtime
    os.utime(here / "a", (now + 5, now + 5))
    assert run_steps(steps) == 0
    assert (here / "c").read_text() == "new"


@pytest.mark.parametrize(
    ("ending", "code"), [("sys.exit(5)", 5), ("os.kill(os.getpid(), 15)", 143)], ids=["exit code", "signal"]
)
def test_the_first_failure_ends_it(here: Path, capfd: pytest.CaptureFixture[str], ending: str, code: int) -> None:
    bad = Step("fail", f"{sys.executable} -c 'import os, sys; {ending}'", [], [Path("never")])
    assert run_steps([bad, copy_step("a", "b")]) == code
    assert f"exit code {code}" in capfd.readouterr().out
    assert not (here / "b").exists()


def test_an_outdated_folder_is_replaced(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make = "import os, sys; os.mkdir(sys.argv[1]); open(sys.argv[1] + '/file', 'w').write('new')"
    step = Step("export", f'{sys.executable} -c "{make}" out', [Path("a")], [Path("out/file")], replaces=Path("out"))
    (here / "out").mkdir()
    (here / "out" / "stale").write_text("old")
    assert run_steps([step]) == 0
    assert "$ rm -r out\n" in capfd.readouterr().out
    assert [path.name for path in (here / "out").iterdir()] == ["file"]


@pytest.mark.parametrize(("reached", "is_done"), [(400, False), (600, True), (800, True)])
def test_training_is_done_when_its_last_step_is_saved(here: Path, reached: int, is_done: bool) -> None:
    (step,) = [step for step in quickstart.STEPS if "train.py" in step.command]
    assert not step.is_done()
    for path in (quickstart.CONFIG, *step.inputs, quickstart.CHECKPOINTS / "latest"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("x")
    Path(quickstart.CONFIG).write_text("train_iters: 600\n")
    (quickstart.CHECKPOINTS / "latest").write_text(f"global_step{reached}")
    assert step.is_done() == is_done


def test_the_summary_says_what_was_reached(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quickstart.LOG.parent.mkdir(parents=True)
    quickstart.OUT.mkdir()
    records = [
        {"step": 1, "time": 0.0, "train/lm_loss": 8.25, "runtime/tokens_per_sec": 100.0},
        {"step": 2, "time": 1.0, "train/lm_loss": 3.125, "validation/lm_loss": 3.5, "runtime/tokens_per_sec": 4321.0},
    ]
    quickstart.LOG.write_text("".join(json.dumps(record) + "\n" for record in records))
    scores = {"results": {"stdlib_completion": {"alias": "x", "acc,none": 0.625, "acc_stderr,none": 0.1}}}
    (quickstart.OUT / "stdlib_eval_results_1.json").write_text(json.dumps(scores))
    (quickstart.OUT / "samples.txt").write_text(json.dumps({"context": "def f(", "text": "self):"}) + "\n")
    assert quickstart._summarise() == 0
    said = capsys.readouterr().out
    for fact in ("3.125 after 2 steps", "it began at 8.250", "3.500", "4,321 tokens/s", "acc 0.625", "| def f(self):"):
        assert fact in said


def test_list_prints_commands_and_runs_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [step.command for step in quickstart.STEPS]
    assert [path.name for path in here.iterdir()] == ["a"]
