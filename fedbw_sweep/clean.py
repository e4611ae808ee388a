"""``python -m fedbw_sweep.clean [SWEEP ...]``: list what nobody needs any more, and delete it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from fedbw_sweep.config.cache import cache_folder
from fedbw_sweep.console import (
    Fitted,
    errors_end_the_command,
    message_console,
    output_console,
    printable,
    size,
)
from fedbw_sweep.records.disk import checkpoints_in, files_in, set_aside_in
from fedbw_sweep.records.find import find_records
from fedbw_sweep.records.place import leftovers, now, remove

KINDS = {
    "aside": "records that were damaged and set aside",
    "checkpoints": "states of runs, from which longer runs and those that were killed go on",
    "leftovers": "what commands that are gone left half-written",
    "cache": "layouts of models and hashes of files, which are made again when they are needed",
}


def unneeded(sweeps: Sequence[Path]) -> dict[str, list[Path]]:
    """Find what can be deleted, by its kind; see `KINDS`.

    Raises
    ------
    ResultsError
        If one of the folders holds no sweep.
    """
    for sweep in sweeps:
        find_records([sweep], [])
    return {
        "aside": [path for sweep in sweeps for path in set_aside_in(sweep)],
        "checkpoints": [path for sweep in sweeps for path in checkpoints_in(sweep)],
        "leftovers": [path for sweep in sweeps for path in leftovers(sweep, now(sweep))],
        "cache": [path for path in [cache_folder()] if path.exists()],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if something cannot be deleted, exit with 2 without sweeps."""
    parser = argparse.ArgumentParser(
        "python -m fedbw_sweep.clean",
        description="List what nobody needs any more; with --delete, delete it.",
        epilog="; ".join(f"{name}: {what}" for name, what in KINDS.items()),
    )
    parser.add_argument(
        "sweeps", nargs="*", type=Path, metavar="SWEEP", help="their folders: outputs/<sweep>"
    )
    parser.add_argument("--delete", nargs="+", choices=KINDS, default=[], metavar="KIND",
                        help=f"what to delete: {', '.join(KINDS)}")  # fmt: skip
    given = parser.parse_args(arguments)
    with errors_end_the_command():
        found = unneeded(given.sweeps)
        _show(found)
        return _delete([path for kind in given.delete for path in found[kind]])
    return 0


def _show(found: dict[str, list[Path]]) -> None:
    table = Table("kind", "what")
    table.add_column("size", justify="right")
    for kind, paths in found.items():
        for path in paths:
            weight = sum(stat.st_size for stat in files_in(path))
            table.add_row(kind, escape(printable(str(path))), size(weight))
    output = output_console()
    if table.row_count:
        output.print(Fitted(table))
        output.print("--delete KIND deletes what is listed of a kind")
    else:
        output.print("there is nothing to delete")


def _delete(paths: Sequence[Path]) -> int:
    failed = 0
    for path in paths:
        try:
            remove(path)
        except OSError as error:
            failed += 1
            message_console().print(
                escape(printable(f"{path} cannot be deleted: {error.strerror}"))
            )
    if paths:
        message_console().print(f"{len(paths) - failed} deleted")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
