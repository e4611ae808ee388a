"""``python -m fedbw_sweep``: Hydra expands the grid; each cell is one run."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn

import hydra
import psutil
from omegaconf import DictConfig

from fedbw_sweep.config.section import CONF
from fedbw_sweep.console import errors_end_the_command, today
from fedbw_sweep.sweep.launcher import finish, run_all, run_cell
from fedbw_sweep.sweep.preflight import Checked
from fedbw_sweep.sweep.progress import stop_showing_progress


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def cell(cfg: DictConfig) -> None:
    """Do one cell of the sweep unless it is already done."""
    run_cell(cfg)


def arrange(arguments: list[str]) -> list[str]:
    """Spell ``-v`` as an override, and move ``-m`` first: Hydra loses overrides left of it."""
    rest = [argument for argument in arguments if argument not in ("-v", "-m", "--multirun")]
    multirun = ["-m"] if {"-m", "--multirun"} & set(arguments) else []
    rest = today(rest)
    return multirun + rest + ["verbose=true"] * ("-v" in arguments)


def interrupted(signum: int, frame: FrameType | None) -> NoReturn:
    """On Ctrl-C, end at once, with every process that was started.

    An exception would not do: in a callback of the interpreter's it is ignored, runs in other
    threads hold the process up, waiting for replies that never come, and Ray's own processes notice
    only later that nobody is left.
    """
    stop_showing_progress()
    os.write(2, b"\ninterrupted: finished runs are kept; the same command goes on\n")
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(130)


def main() -> None:
    """Run the command line; exit with 1 if any run failed, 2 if nothing could start."""
    signal.signal(signal.SIGINT, interrupted)
    sys.argv[1:] = arrange(sys.argv[1:])
    code = 0
    with errors_end_the_command():
        try:
            cell()
        except Checked:
            run_all()
        code = finish()
    sys.exit(code)


if __name__ == "__main__":
    main()
