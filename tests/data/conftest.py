"""A small table of records."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """300 one-line records, each unique, of 5 people and 3 topics."""
    frame = pd.DataFrame(
        {
            "text": [f"record {i:03d} says häß ☃" for i in range(300)],
            "who": [f"person {i % 5}" for i in range(300)],
            "topic": [f"topic {i % 3}" for i in range(300)],
        }
    )
    path = tmp_path / "rows.parquet"
    frame.to_parquet(path)
    return path
