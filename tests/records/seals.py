"""Hashes of a record that a test edits: made right again, or taken away."""

from __future__ import annotations

import json
from pathlib import Path

from fedbw_sweep.records.check import HASHES
from tools import storm


def seal(folder: Path) -> None:
    """Make a record's hashes right again, as whoever edits it on purpose can."""
    assert storm.seal(folder)


def unseal(folder: Path) -> None:
    """Take a record's hashes away, as it was before there were any."""
    status = json.loads((folder / "status.json").read_text())
    status.pop(HASHES, None)
    (folder / "status.json").write_text(json.dumps(status))
