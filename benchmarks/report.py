"""The report on 10,000 made-up runs of 100 rounds: its time and what it writes.

python benchmarks/report.py [RUNS] [BEFORE]: CPU time too, over that of another checkout, in turn
"""

from __future__ import annotations

import itertools
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hydra import compose, initialize_config_dir

from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.config.section import CONF
from fedbw_sweep.records.collect import collect
from fedbw_sweep.records.write import RunRecord, announce

ROUNDS, REPEATS, FAILED, MISSING = 100, 3, 20, 10
RATIOS = {
    "none": 1, "fp16": 2, "int8": 4, "sign": 32, "topk": 60, "sketch": 10, "eden": 8, "lowrank": 25
}  # fmt: skip
TENSORS = [f"layers.{layer}.{kind}.weight" for layer in range(6) for kind in ("attention", "mlp")]
PARAMETERS = 1_320_960
REPORT = "fedbw_sweep.report"
ROOT = Path(__file__).parent.parent


def configs() -> Iterator[RunConfig]:
    """Every combination of compression, four settings and three seeds."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        methods = {
            name: RunConfig.from_hydra(
                compose("config", ["model=tiny", f"compression={name}", f"rounds={ROUNDS}"])
            )
            for name in RATIOS
        }
    for clients, fraction, epochs, batch, seed, name in itertools.product(
        [2**k for k in range(1, 8)], [0.1, 0.25, 0.5, 1.0], [1, 2, 4, 8, 16], [8, 16, 32],
        [1, 2, 3], RATIOS,
    ):  # fmt: skip
        changed = {"num_clients": clients, "fraction_fit": fraction, "local_epochs": epochs}
        yield methods[name].model_copy(update={**changed, "batch_size": batch, "seed": seed})


def record(config: RunConfig, rng: np.random.Generator) -> RunRecord:
    """A run whose loss falls the faster the more epochs it trains, and the noisier its codec."""
    name, clients = config.compression.name, config.clients_per_round
    down = clients * 4 * PARAMETERS
    up, noise = down // RATIOS[name], 0.05 * np.log(RATIOS[name])
    numbers = np.arange(ROUNDS + 1)
    loss = 2 + noise + 4 * np.exp(-numbers / 20 * np.log2(1 + config.local_epochs))
    loss += rng.normal(0, 0.01, len(loss))
    rows = [
        {
            "round": number, "loss": value, "perplexity": np.exp(value), "bits_per_byte": value,
            "train_loss": value, "clients": clients * sent, "uplink_bytes": up * sent,
            "downlink_bytes": down * sent, "uplink_message_bytes": (up + 500) * sent,
            "downlink_message_bytes": (down + 500) * sent, "dense_uplink_bytes": down * sent,
            "uplink_ratio": down / up, "predicted_bytes": (up + down) * sent,
            "cumulative_uplink_bytes": up * number, "cumulative_bytes": (up + down) * number,
        }
        for number, value, sent in zip(
            numbers.tolist(), loss.tolist(), np.minimum(numbers, 1).tolist(), strict=True
        )
    ]  # fmt: skip
    parts = [
        {"tensor": tensor, "part": part, "bytes": up // len(TENSORS) // 2}
        for tensor in TENSORS
        for part in ("values", "tables")
    ]
    summary = {
        "clients_per_round": clients, "model_parameters": PARAMETERS,
        "dense_message_bytes": 4 * PARAMETERS, "initial_loss": rows[0]["loss"],
        "uplink_bytes": up * ROUNDS, "downlink_bytes": down * ROUNDS,
        "total_bytes": (up + down) * ROUNDS, "uplink_ratio": down / up,
        "bits_per_coordinate": 32 * up / down, **{n: rows[-1][n] for n in ("loss", "perplexity")},
    }  # fmt: skip
    execution = {"device": "cpu", "sweep": "main"}
    environment = {"python": "3.11.2", "torch": "2.13.0", "execution": execution}
    return RunRecord(config, "done", "rounds", None, summary, rows, [], parts, [], environment)


def write_runs(folder: Path, runs: int) -> None:
    """Write `runs` run folders, of which some failed and some were never recorded."""
    with ProcessPoolExecutor() as pool:
        numbered = enumerate(itertools.islice(configs(), runs))
        list(pool.map(partial(write_run, folder), *zip(*numbered, strict=True), chunksize=100))
    collect(folder)


def write_run(folder: Path, number: int, config: RunConfig) -> None:
    if number < MISSING:
        announce([config], folder)
    elif number < MISSING + FAILED:
        RunRecord(config, "failed", error="client 2: training loss is nan").write(folder)
    else:
        record(config, np.random.default_rng(number)).write(folder)


def seconds(*command: str, root: Path = ROOT) -> tuple[float, float]:
    """Run a module of a checkout; return its wall-clock and its CPU seconds."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(root)}
    call = [sys.executable, "-m", *command]
    subprocess.run(call, check=True, capture_output=True, env=environment, cwd=root)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - started, cpu


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    others = [Path(name).resolve() for name in sys.argv[2:3]]
    with TemporaryDirectory() as temporary:
        folder, out = Path(temporary, "main"), Path(temporary, "report")
        folder.mkdir()
        write_runs(folder, runs)
        asked = [str(folder), "--out", str(out), "--target-loss", "3", "--budget-mb", "500"]
        starts = [seconds(REPORT, "--help")[0] for _ in range(REPEATS)]
        checks = [seconds("fedbw_sweep.status", str(folder), "--check")[0] for _ in range(REPEATS)]
        times, ratios = [], []
        for _ in range(REPEATS):
            before = [seconds(REPORT, *asked, root=other)[1] for other in others]
            wall, cpu = seconds(REPORT, *asked)
            times.append(wall)
            ratios += [cpu / each for each in before]
        print("| what | seconds, median (min to max) |\n|---|---|")
        for name, all_of in (
            ("`--help`", starts),
            (f"{runs:,} runs x {ROUNDS} rounds", times),
            ("`status --check` of them", checks),
        ):
            median = statistics.median(all_of)
            print(f"| {name} | {median:.1f} ({min(all_of):.1f} to {max(all_of):.1f}) |")
        if ratios:
            print(f"\nCPU over {others[0]}: {statistics.median(ratios):.2f}, of {sorted(ratios)}")
        size = (out / "report.html").stat().st_size
        print(f"\nreport.html: {size:,} bytes")


if __name__ == "__main__":
    main()
