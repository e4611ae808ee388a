"""Recorded runs of a few numbers, and what is shown of them."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from fedbw_sweep.records.collect import collect
from fedbw_sweep.records.labels import run_labels, varying_settings
from fedbw_sweep.records.read import load_records
from fedbw_sweep.records.write import RunRecord
from fedbw_sweep.report.build import TableBuilder
from fedbw_sweep.report.measure import Options, measure
from fedbw_sweep.report.render import Rendered
from fedbw_sweep.report.spec import BUILT_IN, load_spec
from fedbw_sweep.report.table import summary_table
from tests.conftest import config_of

MODEL = 1_000_000
"""Bytes of the model that is sent down in each of a run's two rounds."""


def write(
    folder: Path,
    loss: float,
    *overrides: str,
    up: int = 100,
    end: str = "rounds",
    last: int = 2,
    **summary: float,
) -> str:
    """Record a finished run of one client and two rounds, or until `last`; return its id."""
    config = config_of("rounds=2", *overrides)
    record = RunRecord(config, "done", end)
    record.summary = {
        "uplink_bytes": 2 * up,
        "downlink_bytes": 2 * MODEL,
        "total_bytes": 2 * (up + MODEL),
        "uplink_ratio": MODEL / up,
        "initial_loss": 9.0,
        "loss": loss,
        "model_parameters": 250_000,
        "frozen_parameters": 0,
        "dense_message_bytes": MODEL,
        "clients_per_round": 1,
        **summary,
    }
    record.rounds = [
        {
            "round": n,
            "loss": 9.0 + (loss - 9.0) * n / 2,
            "clients": min(n, 1),
            "uplink_bytes": up * min(n, 1),
            "downlink_bytes": MODEL * min(n, 1),
            "cumulative_uplink_bytes": up * n,
            "cumulative_bytes": (up + MODEL) * n,
        }
        for n in range(last + 1)
    ]
    folder.mkdir(exist_ok=True)
    record.write(folder)
    return config.run_id


def fail(folder: Path, *overrides: str) -> None:
    RunRecord(config_of("rounds=2", *overrides), "failed", error="loss is inf").write(folder)


def labels_of(folder: Path) -> list[str]:
    results = load_records(folder, messages=False).results
    return list(run_labels(results, [n for n in varying_settings(results) if n != "seed"]))


def table_of(folder: Path, options: Options | None = None, name: str = "compression") -> Rendered:
    options = options or Options()
    records = load_records(folder)
    builder = TableBuilder(measure(records, options), options)
    return builder.build(name, load_spec(BUILT_IN / f"{name}.yaml"))


def printed(folder: Path, width: int = 180, encoding: str = "utf-8") -> str:
    """What a sweep's own table shows in a terminal."""
    buffer = io.TextIOWrapper(io.BytesIO(), encoding)
    Console(file=buffer, width=width).print(summary_table(collect(folder)[0]))
    buffer.flush()
    return buffer.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


def spec_of(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(f"title: Mine\nrows: [compression]\nmeasures:\n  - {{{text}}}\n")
    return path
