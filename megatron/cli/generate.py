"""`generate.py`: text from a run's newest checkpoint.

Started by deepy.py on every process, or by hand or torchrun with YAML files.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron.common.stop import StopSignals
from megatron.inference.setup import generate_from_config
from megatron.launch.worker import worker_config


def main(argv: Sequence[str] | None = None) -> int:
    """Generate as the configuration says. Raises: MegatronError for what the user can mend."""
    with StopSignals() as signals:
        return generate_from_config(worker_config(argv, "generate"), signals)
