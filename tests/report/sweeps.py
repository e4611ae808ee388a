"""Sweeps that the tests of the report are written from, by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.records.read import load_records
from fedbw_sweep.records.write import RunRecord
from fedbw_sweep.report.build import TableBuilder
from fedbw_sweep.report.measure import Options, measure
from fedbw_sweep.report.render import Rendered
from fedbw_sweep.report.spec import BUILT_IN, load_spec


def small_sweep(folder: Path, run_config: Callable[..., RunConfig]) -> None:
    """Two methods whose losses and bytes are easy to add up by hand."""
    curves = {"none": ([4.0, 3.0, 2.0], 100), "topk": ([4.0, 3.5, 2.9], 10)}
    for method, (losses, up) in curves.items():
        for seed in (1, 2):
            config = run_config(f"compression={method}", f"seed={seed}", "rounds=2")
            shift = 0.1 * (seed - 1)
            record = RunRecord(config, "done")
            record.summary = {"loss": losses[-1] + shift, "uplink_bytes": 2 * up}
            record.rounds = [
                {
                    "round": n,
                    "loss": loss + shift,
                    "uplink_bytes": up if n else 0,
                    "downlink_bytes": 100 if n else 0,
                    "cumulative_uplink_bytes": n * up,
                    "cumulative_bytes": n * (up + 100),
                }
                for n, loss in enumerate(losses)
            ]
            record.write(folder)


def build(folder: Path, name: str, options: Options) -> Rendered:
    records = load_records(folder, messages=False)
    builder = TableBuilder(measure(records, options), options)
    spec = load_spec(BUILT_IN / f"{name}.yaml")
    assert builder.why_not(spec) is None
    return builder.build(name, spec)


def epochs_sweep(folder: Path, run_config: Callable[..., RunConfig]) -> None:
    """One and four local epochs on two ways to deal the text; four send twice the bytes."""
    curves = {
        (1, "iid"): [4.0, 3.0, 2.8],
        (4, "iid"): [4.0, 3.9, 3.8],
        (1, "natural"): [4.0, 3.5, 3.0],
        (4, "natural"): [4.0, 2.9, 2.5],
    }
    for (epochs, partition), losses in curves.items():
        config = run_config(f"local_epochs={epochs}", f"data.partition={partition}", "rounds=2")
        up = 2_000_000 if epochs == 4 else 1_000_000
        record = RunRecord(config, "done", summary={"loss": losses[-1]})
        record.rounds = [
            {
                "round": n,
                "loss": loss,
                "uplink_bytes": up * min(n, 1),
                "downlink_bytes": up * min(n, 1),
                "cumulative_uplink_bytes": up * n,
                "cumulative_bytes": 2 * up * n,
            }
            for n, loss in enumerate(losses)
        ]
        record.write(folder)
