"""``python -m fedbw_sweep``: Hydra expands the grid; each cell is one run."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

import hydra
import psutil
from omegaconf import DictConfig

from fedbw_sweep.config import CONF
from fedbw_sweep.console import errors_end_the_command
from fedbw_sweep.sweep import finish, run_cell, stop_showing_progress


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def cell(cfg: DictConfig) -> None:
    """Do one cell of the sweep unless it is already done."""
    run_cell(cfg)


def arrange(arguments: list[str]) -> list[str]:
    """Spell ``-v`` as an override, and move ``-m`` first: Hydra loses overrides left of it."""
    rest = [argument for argument in arguments if argument not in ("-v", "-m", "--multirun")]
    multirun = ["-m"] if {"-m", "--multirun"} & set(arguments) else []
    return multirun + rest + ["verbose=true"] * ("-v" in arguments)


def main() -> None:
    """Run the command line; exit with 1 if any run failed, 2 if nothing could start."""
    sys.argv[1:] = arrange(sys.argv[1:])
    try:
        with errors_end_the_command():
            cell()
            code = finish()
    except KeyboardInterrupt:
        stop_showing_progress()
        print("\ninterrupted: finished runs are kept; the same command goes on", file=sys.stderr)
        # Runs in other threads would hold the process up, waiting for replies that never come, and
        # Ray's own processes would notice only later that nobody is left.
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        os._exit(130)
    sys.exit(code)


if __name__ == "__main__":
    main()
