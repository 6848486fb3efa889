"""`train.py`: one rank of a training run, started by deepy.py, torchrun, srun, mpirun, or by hand."""

from __future__ import annotations

from megatron.cli.width_scaling import run_in_place_of_training
from megatron.common.errors import Stopped
from megatron.common.stop import StopSignals
from megatron.engine.distributed import stop_distributed
from megatron.evaluation.setup import training_scorer
from megatron.launch.worker import worker_config
from megatron.training.loop import train
from megatron.training.setup import build_run

NOTICE = "stopping after this step, with a checkpoint; Ctrl-C (again) ends the run at once, without one"


def main(argv: list[str] | None = None) -> int:
    """Train as the configuration says. Returns the exit code. Raises: MegatronError for what the user can mend.

    Until the first step, a stop signal raises Stopped; from there on it is polled, and the state is saved.
    """
    with StopSignals() as signals:
        config = worker_config(argv)
        if run_in_place_of_training(config):
            return 0
        run = build_run(config, signals.asked)
        try:
            run.score = training_scorer(config, run.engine, run.stop.asked_here)
            with signals.deferred(NOTICE):
                code = train(run)
        except Stopped:
            # Whoever insists does not wait for a save in the background either.
            run.saver.abandon()
            raise
        finally:
            run.close()
        stop_distributed()
    return code
