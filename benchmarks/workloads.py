"""The jobs that simulations are timed on."""

from __future__ import annotations

import hydra

from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.config.section import CONF

WORKERS = 2

JOB_A = (
    "model=tiny",
    "num_clients=20",
    "fraction_fit=1.0",
    "rounds=3",
    "local_steps=10",
    f"backend.workers={WORKERS}",
)

ONE_ROUND_OF_A = (*JOB_A[:3], "rounds=1", *JOB_A[4:])

ONE_STEP = ("model=tiny", "num_clients=1", "fraction_fit=1.0", "rounds=1", "local_steps=1")

NO_STEP = ("model=tiny", "num_clients=2", "fraction_fit=1.0", "rounds=1", "local_epochs=0")

Parts = dict[str, float]

ECHO_CLIENTS, ECHO_ROUNDS, ECHO_BYTES = 10, 3, 56_270_848

SAME_MODEL = 1e-4
"""How far apart runs of the same training may end, of the way gone: sums differ in their order."""


def compose(*overrides: str) -> RunConfig:
    """Return the `RunConfig` of some overrides."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return RunConfig.from_hydra(hydra.compose("config", list(overrides)))
