"""Which sinks a configuration brings; the real TensorBoard, W&B and Comet packages, offline."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from megatron.common.errors import ConfigError
from megatron.config.schema import ObserveSection
from megatron.observe.metrics_log import read_metrics
from megatron.observe.setup import build_recorder
from megatron.observe.weights_and_biases import has_api_key


def config_with(**observe):
    return SimpleNamespace(observe=ObserveSection(**observe), to_upstream_dict=lambda: {"hidden_size": 64})


@pytest.fixture(autouse=True)
def _no_account(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "COMET_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("NETRC", str(home / ".netrc"))


def test_jsonl_is_always_on_and_nothing_else_by_default(tmp_path):
    said: list[str] = []
    recorder = build_recorder(config_with(), tmp_path / "run", True, said.append)
    recorder.record(1, {"train/lm_loss": 2.0})
    recorder.close()
    assert list(read_metrics(tmp_path / "run" / "metrics.jsonl")) == [1]
    assert said == []
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_other_ranks_write_nothing(tmp_path):
    recorder = build_recorder(
        config_with(tensorboard_dir=str(tmp_path / "tb"), use_wandb=True, use_comet=True), tmp_path / "run", False
    )
    recorder.record(1, {"train/lm_loss": 2.0})
    recorder.close()
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_tensorboard_hides_what_a_dead_run_wrote_beyond_its_checkpoint(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = config_with(tensorboard_dir=str(tmp_path / "tb"))
    for losses in ({1: 5.0, 2: 4.0, 3: 3.0}, {3: 2.5}):
        recorder = build_recorder(config, tmp_path / "run", True)
        for step, loss in losses.items():
            recorder.record(step, {"train/lm_loss": loss}, step * 10)
        recorder.close()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/lm_loss")] == [(1, 5.0), (2, 4.0), (3, 2.5)]
    assert [e.value for e in events.Scalars("train/consumed_tokens")] == [10, 20, 30]


def test_wandb_without_an_account_writes_to_disk_and_says_so(tmp_path):
    said: list[str] = []
    recorder = build_recorder(config_with(use_wandb=True, wandb_run_name="probe"), tmp_path / "run", True, said.append)
    recorder.record(1, {"train/lm_loss": 2.0}, 10)
    recorder.close()
    files = list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 1
    data = files[0].read_bytes()
    assert b"train/lm_loss" in data
    assert b"hidden_size" in data
    assert len(said) == 1
    assert "wandb sync" in said[0]


def test_comet_without_an_account_writes_to_disk_and_says_so(tmp_path):
    said: list[str] = []
    recorder = build_recorder(config_with(use_comet=True, comet_project="probe"), tmp_path / "run", True, said.append)
    recorder.record(1, {"train/lm_loss": 2.0}, 10)
    recorder.close()
    assert len(list((tmp_path / "run" / "comet").glob("*.zip"))) == 1
    assert len(said) == 1
    assert "comet upload" in said[0]


@pytest.mark.parametrize(
    ("package", "keys", "file"),
    [
        ("wandb", {"use_wandb": True}, "requirements-wandb.txt"),
        ("comet_ml", {"use_comet": True}, "requirements-comet.txt"),
        ("tensorboardX", {"tensorboard_dir": "tb"}, "requirements-tensorboard.txt"),
    ],
)
def test_a_missing_package_names_its_requirements_file(tmp_path, monkeypatch, package, keys, file):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=file):
        build_recorder(config_with(**keys), tmp_path / "run", True)


def test_wandb_comes_on_by_itself_with_an_api_key_and_says_so_once(tmp_path, monkeypatch):
    import megatron.observe.setup as setup

    made = []

    class Fake:
        def __init__(self, options, say):
            made.append(options)

        def record(self, step, metrics, consumed_tokens):
            raise RuntimeError("server error")

        def close(self):
            raise AssertionError("a sink that failed is not closed")

    monkeypatch.setattr(setup, "WeightsAndBiases", Fake)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    said: list[str] = []
    recorder = build_recorder(config_with(wandb_project="p"), tmp_path / "run", True, said.append)
    recorder.record(1, {"a": 1.0})
    recorder.record(2, {"a": 1.0})
    recorder.close()
    assert [options.project for options in made] == ["p"]
    assert len(said) == 2
    assert "an API key was found" in said[0]
    assert "server error" in said[1]
    build_recorder(config_with(use_wandb=False), tmp_path / "run", True, said.append).close()
    assert len(made) == 1


def test_a_remote_logger_that_cannot_start_does_not_stop_the_run(tmp_path, monkeypatch):
    import megatron.observe.setup as setup

    def refuse(options, say):
        raise TimeoutError("no answer")

    monkeypatch.setattr(setup, "WeightsAndBiases", refuse)
    said: list[str] = []
    recorder = build_recorder(config_with(use_wandb=True), tmp_path / "run", True, said.append)
    recorder.record(1, {"a": 1.0})
    recorder.close()
    assert len(said) == 1
    assert "no answer" in said[0]
    assert list(read_metrics(tmp_path / "run" / "metrics.jsonl")) == [1]


def test_a_key_in_netrc_counts_for_its_host_only(tmp_path):
    (tmp_path / "home" / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert has_api_key()
    assert not has_api_key("https://wandb.example.org:8080")
