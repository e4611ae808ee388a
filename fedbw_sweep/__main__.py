"""``python -m fedbw_sweep``: Hydra expands the grid; each of its points is one run."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn

import hydra
import psutil

from fedbw_sweep.config.section import CONF
from fedbw_sweep.console import today
from fedbw_sweep.sweeps.plugin import Command

SIGNALS = {
    name: word
    for name, word in (("SIGINT", "interrupted"), ("SIGTERM", "terminated"), ("SIGHUP", "hung up"))
    if hasattr(signal, name)  # Windows lacks the last
}
"""What ends a command from outside, and what it is called."""

SHOW_CURSOR = b"\x1b[?25h"
"""Progress bars hide it."""


def arrange(arguments: list[str]) -> list[str]:
    """Spell ``-v`` as an override, and move ``-m`` first: Hydra loses overrides left of it."""
    rest = [argument for argument in arguments if argument not in ("-v", "-m", "--multirun")]
    multirun = ["-m"] if {"-m", "--multirun"} & set(arguments) else []
    return multirun + today(rest) + ["verbose=true"] * ("-v" in arguments)


def shut_down(signum: int, frame: FrameType | None) -> NoReturn:
    """End at once, with every process that was started; exit with 128 and the signal's number.

    An exception would not do: in a callback of the interpreter's it is ignored, runs in other
    threads hold the process up, waiting for replies that never come, and Ray's own processes notice
    only later that nobody is left.
    """
    word = SIGNALS[signal.Signals(signum).name]
    line = f"\n{word}: finished runs are kept; the same command goes on\n".encode()
    with suppress(OSError):  # what was hung up has no terminal any more
        os.write(2, (SHOW_CURSOR if os.isatty(2) else b"") + line)
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(128 + signum)


def main() -> None:
    """Run the command line; exit with 1 if any run failed, 2 if nothing could start."""
    for name in SIGNALS:
        signal.signal(signal.Signals[name], shut_down)
    sys.argv[1:] = arrange(sys.argv[1:])
    command = Command()
    hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(command)()
    sys.exit(command.code)


if __name__ == "__main__":
    main()
