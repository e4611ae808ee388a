"""``python -m fedbw_sweep``: Hydra expands the grid; each of its points is one run."""

from __future__ import annotations

import sys

import hydra

from fedbw_sweep.config.section import CONF
from fedbw_sweep.console import today
from fedbw_sweep.shutdown import listen
from fedbw_sweep.sweeps.plugin import Command


def arrange(arguments: list[str]) -> list[str]:
    """Spell ``-v`` as an override, and move ``-m`` first: Hydra loses overrides left of it."""
    rest = [argument for argument in arguments if argument not in ("-v", "-m", "--multirun")]
    multirun = ["-m"] if {"-m", "--multirun"} & set(arguments) else []
    return multirun + today(rest) + ["verbose=true"] * ("-v" in arguments)


def main() -> None:
    """Run the command line; exit with 1 if any run failed, 2 if nothing could start."""
    listen()
    sys.argv[1:] = arrange(sys.argv[1:])
    command = Command()
    hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(command)()
    sys.exit(command.code)


if __name__ == "__main__":
    main()
