"""`python -m rsgrpo.train` with the faults of the folder that RSGRPO_CHAOS names."""

from __future__ import annotations

import os
from pathlib import Path

from rsgrpo import cli
from rsgrpo.config.train import TrainConfig
from rsgrpo.train import train
from tests.runs.chaos.injector import Injector


def with_faults(config: TrainConfig) -> None:
    """Train; the points are wrapped after the configuration has been read."""
    from rsgrpo.cluster import watch

    watch.RAY_SILENCE_S = float(os.environ.get("RSGRPO_CHAOS_RAY_SILENCE_S", watch.RAY_SILENCE_S))
    Injector(Path(os.environ["RSGRPO_CHAOS"])).install()
    train(config)


if __name__ == "__main__":
    cli.run(with_faults, TrainConfig)
