"""`train.py`: one rank of a training run, started by deepy.py, torchrun, srun, mpirun, or by hand."""

from __future__ import annotations

from megatron.engine.distributed import stop_distributed
from megatron.evaluation.setup import training_scorer
from megatron.launch.worker import worker_config
from megatron.training.loop import train
from megatron.training.setup import build_run


def main(argv: list[str] | None = None) -> int:
    """Train as the configuration says. Raises: MegatronError for what the user can mend."""
    config = worker_config(argv)
    run = build_run(config)
    try:
        run.score = training_scorer(config, run.engine)
        train(run)
    finally:
        run.close()
    stop_distributed()
    return 0
