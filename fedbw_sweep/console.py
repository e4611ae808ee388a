"""How the commands print: tables, byte counts, and errors that a user can act on."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

from fedbw_sweep.config.renames import rename_overrides
from fedbw_sweep.errors import FedbwError

MB, MIB = 10**6, 2**20
FILE_WIDTH = 180

CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Characters that command a terminal, change the direction of text, or are no characters."""


def printable(text: str) -> str:
    r"""Write the control characters in a text as escapes, such as ``\x1b``; line ends stay."""
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


class _Output(Console):
    """A console that leaves to the command what to do when nobody reads any more."""

    def on_broken_pipe(self) -> None:
        """Raise what rich has caught."""
        raise BrokenPipeError


def output_console() -> Console:
    """Return a console for tables: as wide as the terminal, or wide enough for a file or pipe."""
    console = _Output(highlight=False)
    return console if console.is_terminal else _Output(highlight=False, width=FILE_WIDTH)


def message_console() -> Console:
    """Return a console for what is no result: on stderr."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def in_all_units(count: int) -> str:
    """Write a byte count exactly, in MiB and in MB: 56,270,848 B = 53.66 MiB = 56.27 MB."""
    return f"{count:,} B = {count / MIB:,.2f} MiB = {count / MB:,.2f} MB"


def duration(seconds: float) -> str:
    """Write a time in the unit that suits it: 12.3 s, 4.2 min, 3.1 h or 2.5 d."""
    for unit, length, most in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48)):
        if seconds < most * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds / 86400:,.1f} d"


@contextmanager
def errors_end_the_command() -> Iterator[None]:
    """Print an error a user can act on, without a traceback, and exit with 2.

    Whoever reads the output may stop before its end, as ``head`` does: that is no error, and the
    rest of the block is left out.
    """
    try:
        yield
        sys.stdout.flush()
    except FedbwError as error:
        message_console().print(f"[red]error:[/red] {escape(printable(str(error)))}")
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def today(overrides: Sequence[str]) -> list[str]:
    """Spell a command line's overrides with today's names; say of each old one what it is now."""
    renamed, notes = rename_overrides(overrides)
    for note in notes:
        message_console().print(escape(note))
    return renamed
