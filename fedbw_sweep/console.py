"""How the commands print: tables, byte counts, and errors that a user can act on."""

from __future__ import annotations

import codecs
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from io import TextIOWrapper
from unicodedata import normalize

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from fedbw_sweep.config.renames import rename_overrides
from fedbw_sweep.errors import FedbwError

MB, MIB = 10**6, 2**20

BYTE_UNITS: Mapping[str, float] = {
    "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30,
}  # fmt: skip
FILE_WIDTH = 180

CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Characters that command a terminal, change the direction of text, or are no characters."""


def printable(text: str) -> str:
    r"""Write the control characters in a text as escapes, such as ``\x1b``; line ends stay."""
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


_SPELT = "fedbw_sweep.spelt"
_SPELLINGS = {
    "±": "+-",
    "…": "...",
    "\N{EM DASH}": "-",
    "\N{EN DASH}": "-",
    "\N{MULTIPLICATION SIGN}": "x",
}


def _spelt(error: UnicodeError) -> tuple[str, int]:
    """Spell what an encoding lacks in ASCII; a question mark stands for what has no spelling."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    plain = (
        _SPELLINGS.get(c) or normalize("NFKD", c).encode("ascii", "ignore").decode() or "?"
        for c in lacking
    )
    return "".join(plain), error.end


codecs.register_error(_SPELT, _spelt)


class _Output(Console):
    """A console that leaves to the command what to do when nobody reads any more."""

    def on_broken_pipe(self) -> None:
        """Raise what rich has caught."""
        raise BrokenPipeError


class Fitted:
    """A table that never cuts a number, whatever the terminal's width.

    Where it is too wide, columns are left out, and if that is not enough, each row stands as lines
    of its own.

    Parameters
    ----------
    table : rich.table.Table
        Its rows are final. Only columns with more than a word in a cell may wrap.
    optional : sequence of str
        Headers of the columns that may be left out, the first first.
    """

    def __init__(self, table: Table, optional: Sequence[str] = ()) -> None:
        self.table, self.optional = table, optional
        for column in table.columns:
            cells = [str(cell) for cell in column.cells]
            if any(" " in cell for cell in cells):
                column.overflow = "fold"
            else:
                column.no_wrap = True
                column.min_width = max(map(cell_len, [str(column.header), *cells]))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table, as much of it as fits, or its rows one below the other."""
        unlimited, fitting = options.update(max_width=10**6), copy(self.table)
        for dropped in range(len(self.optional) + 1):
            left_out = self.optional[:dropped]
            fitting.columns = [c for c in self.table.columns if c.header not in left_out]
            if Measurement.get(console, unlimited, fitting).minimum <= options.max_width:
                yield fitting
                if left_out:
                    yield Text(f"No room for {', '.join(left_out)}.")
                return
        yield Text.from_markup(str(self.table.title or ""))
        for cells in zip(*(column.cells for column in self.table.columns), strict=True):
            yield Text("")
            for column, cell in zip(self.table.columns, cells, strict=True):
                if cell:
                    yield Text.from_markup(f"{column.header}: {cell}")


def output_console() -> Console:
    """Return a console for tables: as wide as the terminal, or wide enough for a file or pipe."""
    console = _Output(highlight=False)
    return console if console.is_terminal else _Output(highlight=False, width=FILE_WIDTH)


def message_console() -> Console:
    """Return a console for what is no result: on stderr."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def in_all_units(count: int) -> str:
    """Write a byte count exactly, in MiB and in MB: 56,270,848 B = 53.66 MiB = 56.27 MB."""
    mib, mb = (
        f"{size:,.2f}" if size >= 1 or not size else f"{size:.3g}"
        for size in (count / MIB, count / MB)
    )
    return f"{count:,} B = {mib} MiB = {mb} MB"


def size(count: float) -> str:
    """Write a number of bytes in the unit that suits it: 576 B, 1.24 kB, 56.27 MB or 4.10 GB."""
    unit = byte_unit([count], "GB")
    return f"{in_unit(count, unit)} {unit}"


def in_unit(count: float, unit: str) -> str:
    """Write a number of bytes in a unit of `BYTE_UNITS`, with two decimals unless that is bytes."""
    return f"{count / BYTE_UNITS[unit]:,.{0 if unit == 'B' else 2}f}"


def units_in_words(units: Iterable[str]) -> str:
    """Say what decimal units are: ``kB = 10^3 bytes, MB = 10^6 bytes``."""
    powers = {unit: len(f"{BYTE_UNITS[unit]:.0f}") - 1 for unit in units if unit != "B"}
    said = ", ".join(f"{unit} = 10^{power} bytes" for unit, power in powers.items())
    return said or "B = bytes"


def byte_unit(sizes: Iterable[float], largest: str, least: float = 1.0) -> str:
    """Choose the unit of a column of bytes.

    Parameters
    ----------
    sizes : iterable of float
        The column, bytes.
    largest : str
        A key of `BYTE_UNITS`. Smaller units of its kind, decimal or binary, may be chosen.
    least : float
        What the smallest of `sizes` but zeros must be at least in its unit; with two decimals 1.0
        shows three digits.
    """
    binary = "i" in largest
    kind = [unit for unit in BYTE_UNITS if ("i" in unit) == binary or unit == "B"]
    smallest = min((abs(size) for size in sizes if size), default=math.inf)
    fitting = [unit for unit in kind if smallest >= least * BYTE_UNITS[unit]]
    return min(fitting[-1] if fitting else "B", largest, key=BYTE_UNITS.__getitem__)


def duration(seconds: float) -> str:
    """Write a time in the unit that suits it: 12.3 s, 4.2 min, 3.1 h or 2.5 d."""
    for unit, length, most in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48)):
        if seconds < most * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds / 86400:,.1f} d"


@contextmanager
def errors_end_the_command() -> Iterator[None]:
    """Print an error a user can act on, without a traceback, and exit with 2.

    What the terminal's encoding lacks is spelt with what it has, "+-" for "±".

    Whoever reads the output may stop before its end, as ``head`` does: that is no error, and the
    rest of the block is left out.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=_SPELT)
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
