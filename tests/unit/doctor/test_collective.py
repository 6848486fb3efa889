"""torch and communication tried by two processes; and what is said where they fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron.doctor.collective import check_torch
from megatron.doctor.finding import Finding, Subject

ROOT = Path(__file__).resolve().parents[3]
FACTS: dict[str, Any] = {
    "import_s": 1.0,
    "torch": "2.13.0",
    "cuda_build": "13.0",
    "nccl": "2.29",
    "gpus": [],
    "backend": "gloo",
    "all_reduce_s": 0.001,
    "right": True,
}
GPU = {"name": "H", "bytes": 100, "free": 99, "works": True, "bf16": True}


def pretend(tmp_path: Path, body: str, *, gpus: int = 0, device: str = "auto", timeout_s: float = 20) -> list[Finding]:
    """The findings where `body` is what the two processes run."""
    script = tmp_path / "stand_in.py"
    script.write_text(body)
    python = (sys.executable, "-S", str(script))
    return check_torch(Subject(device=device), python=python, timeout_s=timeout_s, gpus=gpus)


def say(**facts: Any) -> str:
    return f"print({json.dumps({**FACTS, **facts})!r})"


def test_two_real_processes_agree() -> None:
    torch, reduced = check_torch(Subject(device="cpu"), gpus=0)
    assert torch.status == "ok"
    assert (reduced.name, reduced.status) == ("all-reduce (gloo)", "ok"), reduced


def test_a_real_interface_that_does_not_exist() -> None:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "nosuch0"}
    (finding,) = check_torch(Subject(device="cpu", environment=environment))
    assert (finding.name, finding.status) == ("all-reduce", "failure")
    assert "unset GLOO_SOCKET_IFNAME" in finding.mend


@pytest.mark.parametrize(
    ("facts", "gpus", "device", "name", "status", "text"),
    [
        ({}, 0, "auto", "torch", "note", "some hundred times slower"),
        ({}, 0, "cuda", "torch", "failure", "device: cuda cannot start here"),
        ({"cuda_build": None}, 2, "auto", "torch", "failure", "2 GPUs of this host are not used"),
        ({}, 1, "auto", "torch", "failure", "1 GPU of this host are not used"),
        ({"gpus": [GPU]}, 1, "auto", "GPU 0", "ok", ""),
        ({"gpus": [{**GPU, "free": 10}]}, 1, "auto", "GPU 0", "warning", "another program holds memory on it"),
        ({"gpus": [{**GPU, "bf16": False}]}, 1, "auto", "GPU 0", "warning", "emulated"),
        ({"gpus": [{**GPU, "works": False, "why": "ECC"}]}, 1, "auto", "GPU 0", "failure", "runs on it fail"),
        ({"right": False}, 0, "auto", "all-reduce (gloo)", "failure", "gradients would be wrong"),
    ],
)
def test_what_is_made_of_the_answers(
    tmp_path: Path, facts: dict[str, Any], gpus: int, device: str, name: str, status: str, text: str
) -> None:
    findings = {finding.name: finding for finding in pretend(tmp_path, say(**facts), gpus=gpus, device=device)}
    assert findings[name].status == status
    assert text in findings[name].cost


def test_processes_that_fail_or_hang(tmp_path: Path) -> None:
    (finding,) = pretend(tmp_path, "raise ModuleNotFoundError(\"No module named 'torch'\")")
    assert (finding.name, finding.status) == ("torch", "failure")
    (finding,) = pretend(tmp_path, "import time; time.sleep(60)", timeout_s=0.3)
    assert finding.found == "no answer in 0 s"
    (finding,) = pretend(tmp_path, "import os; os._exit(9)")
    assert finding.found == "ended with code 9"


def test_the_command(tmp_path: Path) -> None:
    """The whole report, once: as JSON, with a configuration whose data is missing."""
    (tmp_path / "my.yml").write_text(
        "num_layers: 2\nhidden_size: 64\nnum_attention_heads: 4\nseq_length: 32\ntokenizer_type: CharLevelTokenizer\n"
        "device: cpu\ndata_path: absent\nsave: checkpoints\ncheckpoint_factor: 10\n"
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "deepy.py"), "--doctor", "--json", "train.py", "my.yml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 1, done.stderr
    assert findings["data_path.bin"]["status"] == "failure"
    assert findings["save = checkpoints"]["status"] == "ok"
    assert findings["all-reduce (gloo)"]["status"] == "ok"
    assert findings["configuration"]["found"] == "my.yml"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my.yml"]


def test_the_report_for_a_person(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.cli import doctor

    monkeypatch.setattr(
        doctor, "examine", lambda subject: [Finding("a", "ok", "x"), Finding("b", "warning", "y", "slow", "do")]
    )
    assert doctor.main(["--doctor"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[:4] == ["ok      a x", "WARNING b y", "          slow", "          -> do"]
    assert "1 warning" in out
    monkeypatch.setattr(doctor, "examine", lambda subject: [Finding("a", "failure", "x", "c", "m")])
    assert doctor.main(["--doctor"]) == 1
    assert doctor.main(["--doctor", "no-such.yml"]) == 1
    assert "no-such.yml: there is no such configuration file" in capsys.readouterr().out
