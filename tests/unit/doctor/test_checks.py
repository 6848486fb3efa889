"""Every check of the doctor, with the fault that it is for."""

from __future__ import annotations

import os
import resource
import socket
import sys
import time
from pathlib import Path

import pytest

from megatron.doctor import machine, network, software, storage
from megatron.doctor.finding import Finding, Subject, size


def one(findings: Finding | list[Finding]) -> Finding:
    if isinstance(findings, Finding):
        return findings
    (finding,) = findings
    return finding


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e9, "2.5 GB"), (3e13, "30.0 TB")]
)
def test_size(number: float, text: str) -> None:
    assert size(number) == text


def test_python() -> None:
    assert software.check_python().status == "ok"
    assert software.check_python((3, 9), "/usr").status == "failure"
    assert "3.11 to 3.13" in software.check_python((3, 14), "/usr").cost


def test_packages() -> None:
    assert one(software.check_packages()).status == "ok"
    required = software.required_versions()
    assert {"torch", "deepspeed", "pydantic"} <= set(required)
    missing, other = software.check_packages({**required, "pydantic": "1.0", "no-such-package": "2"})
    assert (missing.status, missing.found) == ("failure", "missing: no-such-package")
    assert other.status == "warning"
    assert "pydantic" in other.found
    assert "(tested: 1.0)" in other.found
    assert "pip install -r requirements/requirements.txt" in other.mend or "activate" in other.mend


def test_optional_packages_name_their_requirements_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "installed_version", lambda name: None if name == "wandb" else "1")
    note, there = software.check_optional()
    assert (note.name, note.status, note.cost) == ("wandb", "note", "use_wandb does not work")
    assert note.mend.endswith("requirements/requirements-wandb.txt")
    assert "lm_eval" in there.found
    for _, file in software.OPTIONAL.values():
        assert (software.ROOT / "requirements" / file).is_file()


def test_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "installed_version", lambda name: None)
    assert software.check_flash_attention(Subject(device="cpu"), gpus=1).status == "ok"
    assert software.check_flash_attention(Subject(), gpus=0).status == "ok"
    assert software.check_flash_attention(Subject(device="cuda"), gpus=1).status == "note"
    monkeypatch.setattr(software, "installed_version", lambda name: "2.8")
    assert software.check_flash_attention(Subject(), gpus=1).found == "2.8"


def test_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert software.check_compiler(Subject()) == []
    monkeypatch.setenv("PATH", str(tmp_path))
    assert one(software.check_compiler(Subject(torch_compile=True, environment={}))).status == "failure"
    (tmp_path / "g++").write_text("#!/bin/sh\n")
    (tmp_path / "g++").chmod(0o755)
    assert one(software.check_compiler(Subject(torch_compile=True, environment={}))).found == "g++"


def test_locks_of_killed_builds(tmp_path: Path) -> None:
    (tmp_path / "cpu_adam").mkdir()
    lock = tmp_path / "cpu_adam" / "lock"
    lock.write_text("")
    assert software.check_extension_locks(tmp_path) == []
    finding = one(software.check_extension_locks(tmp_path, now=time.time() + 700))
    assert finding.status == "warning"
    assert finding.mend == f"rm {lock}"
    assert software.check_extension_locks(tmp_path / "absent") == []


def test_cores() -> None:
    assert machine.check_cores(Subject(num_processes=4), cores=4).status == "ok"
    finding = machine.check_cores(Subject(num_processes=5), cores=4)
    assert (finding.status, finding.mend) == ("warning", "cpu_processes: 4")
    assert machine.check_cores(Subject(num_processes=8, device="cuda"), cores=4).status == "ok"


def test_memory_within_the_containers_limit(tmp_path: Path) -> None:
    meminfo, limit = tmp_path / "meminfo", tmp_path / "memory.max"
    meminfo.write_text("MemTotal: 99 kB\nMemAvailable:   8000000 kB\n")
    limit.write_text("max\n")
    (tmp_path / "memory.current").write_text("1000000000\n")
    assert machine.check_memory(meminfo, limit).found == "8.2 GB free"
    limit.write_text("2000000000\n")
    finding = machine.check_memory(meminfo, limit)
    assert (finding.status, finding.found) == ("warning", "1.0 GB free")
    assert machine.check_memory(tmp_path / "absent").status == "note"


def test_limits() -> None:
    unlimited = resource.RLIM_INFINITY
    assert one(machine.check_limits((65536, 65536), (unlimited, unlimited))).status == "ok"
    files, processes = machine.check_limits((1024, 4096), (100, 100), num_processes=8)
    assert (files.status, files.mend) == ("warning", "ulimit -n 4096")
    assert (processes.status, processes.mend) == ("failure", "ulimit -u 2720")
    assert "limits.conf" in one(machine.check_limits((1024, 1024), (unlimited, unlimited))).mend


def test_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert one(machine.check_shared_memory(Subject(), tmp_path / "absent")).status == "warning"
    assert one(machine.check_shared_memory(Subject(device="cpu"), tmp_path / "absent")).status == "note"
    monkeypatch.setattr(machine, "SHARED_MEMORY_BYTES", 0)
    old = tmp_path / "deepspeed_allreduce_buffer_0"
    old.write_bytes(b"x" * 3000)
    os.utime(old, (1, 1))
    (tmp_path / "torch_1_2").write_bytes(b"fresh")
    (tmp_path / "another").write_bytes(b"not ours to judge")
    room, left = machine.check_shared_memory(Subject(), tmp_path)
    assert room.status == "ok"
    assert (left.status, left.found) == ("warning", "1 files, 3.0 kB, older than an hour")
    monkeypatch.setattr(machine, "SHARED_MEMORY_BYTES", 1 << 62)
    assert "--shm-size" in machine.check_shared_memory(Subject(), tmp_path)[0].mend
    assert machine.check_shared_memory(Subject(device="cpu"), tmp_path)[0].status == "ok"


def test_environment() -> None:
    assert one(machine.check_environment(Subject(environment={}))).status == "ok"
    finding = one(machine.check_environment(Subject(environment={"RANK": "0", "MASTER_ADDR": "x"})))
    assert (finding.status, finding.mend) == ("failure", "unset RANK MASTER_ADDR")
    assert one(machine.check_environment(Subject(environment={"OMP_NUM_THREADS": "9999"}))).status == "warning"
    assert one(machine.check_environment(Subject(environment={"CUDA_LAUNCH_BLOCKING": "1"}))).status == "warning"


def test_a_folder_that_can_be_written(tmp_path: Path) -> None:
    finding = storage.check_folder("save", tmp_path / "new" / "run", 0, Subject())
    assert finding.status == "ok"
    assert finding.found.endswith("(will be made)")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    finding = storage.check_folder("save", file / "run", 0, Subject())
    assert finding.status == "failure"
    assert "cannot be written: Not a directory" in finding.found
    assert storage.check_folder("save", Path("/proc/nothing"), 0, Subject()).status == "failure"


def test_a_disk_that_fails_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    finding = storage.check_folder("save", tmp_path, 0, Subject())
    assert finding.found == "cannot be written: No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_larger_than_the_disk(tmp_path: Path) -> None:
    finding = storage.check_folder("save", tmp_path, 10**18, Subject(num_checkpoints=2))
    assert finding.status == "failure"
    assert finding.cost == "the disk runs full: 2 checkpoints take about 1000000.0 TB"
    assert "keep_last_n_checkpoints" in finding.mend


def test_a_slow_disk_is_told_with_the_time_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_write_test", lambda folder: 1e6)
    finding = storage.check_folder("save", tmp_path, 2_000_000, Subject(num_checkpoints=2))
    assert (finding.status, finding.cost) == ("warning", "one checkpoint of 1.0 MB takes 1 s")


def test_files_that_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_text("")
    assert storage.check_reads(Subject()) == []
    assert one(storage.check_reads(Subject(reads={"data_path.bin": tmp_path / "a.bin"}))).status == "ok"
    finding = one(storage.check_reads(Subject(reads={"data_path.idx": tmp_path / "a.idx"})))
    assert (finding.name, finding.status) == ("data_path.idx", "failure")
    assert "No such file" in finding.found


def test_a_port_in_use() -> None:
    assert network.check_port(Subject()).status == "ok"
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        finding = network.check_port(Subject(master_port=port))
        assert (finding.name, finding.status) == (f"master_port = {port}", "failure")
        assert "in use" in finding.found
    assert network.check_port(Subject(master_port=port)).status == "ok"


def test_this_hosts_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert network.check_name(Subject(), "localhost").status == "ok"
    assert network.check_name(Subject(hosts={"other": 1}), "localhost").status == "failure"

    def unknown(name: str) -> str:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "gethostbyname", unknown)
    assert network.check_name(Subject(), "nowhere").status == "warning"
    assert network.check_name(Subject(hosts={"other": 1}), "nowhere").status == "failure"


def test_interfaces() -> None:
    assert one(network.check_interfaces(Subject(environment={}))).status == "ok"
    assert one(network.check_interfaces(Subject(environment={"NCCL_SOCKET_IFNAME": "^docker"}))).status == "ok"
    assert one(network.check_interfaces(Subject(environment={"NCCL_SOCKET_IFNAME": "l"}))).status == "ok"
    finding = one(network.check_interfaces(Subject(environment={"GLOO_SOCKET_IFNAME": "nosuch0"})))
    assert (finding.name, finding.status, finding.mend) == ("GLOO_SOCKET_IFNAME", "failure", "unset GLOO_SOCKET_IFNAME")


@pytest.fixture
def ssh(tmp_path: Path) -> Path:
    """A stand-in for ssh that runs the command here: the remote side's own code is what is tested."""
    script = tmp_path / "ssh"
    script.write_text(f'#!/bin/sh\nshift\nexport PATH={Path(sys.executable).parent}:$PATH\nexec sh -c "$1"\n')
    script.chmod(0o755)
    return script


# Another address of this host, which nothing takes for its name.
HOSTS = {"127.0.0.2": 1}


def test_a_host_that_is_fine(ssh: Path) -> None:
    finding = one(network.check_hosts(Subject(hosts=HOSTS), (str(ssh),)))
    assert finding.status == "ok", finding
    assert finding.found.startswith("reachable both ways, python3 is 3.")


def test_hosts_with_faults(ssh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(*lines: str) -> Finding:
        ssh.write_text("#!/bin/sh\n" + "\n".join(lines) + "\n")
        return one(network.check_hosts(Subject(hosts=HOSTS), (str(ssh),)))

    finding = told("echo 'Permission denied (publickey).' >&2", "exit 255")
    assert (finding.status, finding.found) == ("failure", "Permission denied (publickey).")
    assert "ssh-copy-id" in finding.mend
    answer = '{"python": "%d.%d", "time": %f, "folder": %s, "reaches": %s, "why": "timed out", "torch": "2"}'
    now = time.time()
    own = sys.version_info[:2]
    assert "does not reach this host: timed out" in told(f"echo '{answer % (*own, now, 'true', 'false')}'").found
    assert "has no " in told(f"echo '{answer % (*own, now, 'false', 'true')}'").found
    assert "clock is +90 s off" in told(f"echo '{answer % (*own, now + 90, 'true', 'true')}'").found
    assert "Python here is" in told(f"echo '{answer % (3, 9, now, 'true', 'true')}'").cost
    monkeypatch.setattr(network, "TIMEOUT_S", 0.2)
    assert told("exec sleep 5").found.startswith("no answer in")
    assert network.check_host("no-such-host.invalid", 1).status == "failure"
    assert one(network.check_hosts(Subject(hosts=HOSTS), (str(tmp_path / "absent"),))).status == "warning"


def test_the_program_that_a_launcher_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    program, _ = network.check_hosts(Subject(hosts=HOSTS, starter="pdsh"), ("absent-ssh",))
    assert (program.name, program.status) == ("pdsh", "failure")
    assert network.check_hosts(Subject(hosts={"localhost": 2})) == []
