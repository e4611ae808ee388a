"""What grows with clients and model size: time per round, start of a run, the server's memory.

python benchmarks/scaling.py             # clients that exist, clients sampled, residuals
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from simulation import WORKERS, Engine

RECORDS = 120_000
NO_TRAINING = ("local_epochs=0", "data.heldout_tokens=64", f"backend.workers={WORKERS}")
RESIDUAL_CLIENTS = 100
MEMORY_CAP = 3 * 10**9
CGROUPS = Path("/sys/fs/cgroup")
V1 = (CGROUPS / "memory").is_dir()
CGROUP = (CGROUPS / "memory" if V1 else CGROUPS) / "fedbw_sweep_scaling"
LIMIT, PEAK = (
    ("memory.limit_in_bytes", "memory.max_usage_in_bytes") if V1 else ("memory.max", "memory.peak")
)


def private_megabytes(pid: int | str = "self") -> float:
    """Memory of a process that is its own; what it maps of Ray's object store is not."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1000


class Peak:
    """The most private memory of this process in a block, MB, looked at every 20 ms."""

    def __enter__(self) -> Peak:
        self.megabytes, self.ended = private_megabytes(), threading.Event()
        self.watcher = threading.Thread(target=self.watch)
        self.watcher.start()
        return self

    def watch(self) -> None:
        while not self.ended.wait(0.02):
            self.megabytes = max(self.megabytes, private_megabytes())

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.watcher.join()


def existing_clients() -> None:
    """Time rounds of 10 sampled clients that do nothing, and the start of the run."""
    print("| clients that exist | start of the run, s | ms a round, median | min to max |")
    print("|---:|---:|---:|---|")
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "lines.txt"
        line = "some text that is just long enough to fill one window of sixteen tokens\n"
        text.write_text("\n".join(line for _ in range(RECORDS)))
        for clients in (100, 1_000, 10_000, 100_000):
            engine = Engine(
                *("model=tiny", "data=text", f"data.path={text}", "data.partition=iid"),
                *(f"num_clients={clients}", f"fraction_fit={10 / clients}", "rounds=30"),
                *("sequence_length=16", *NO_TRAINING),
            )
            from fedbw_sweep.run import execute

            engine.run(seed=9)  # warm
            started = time.perf_counter()
            record = execute(engine.config, engine.folder)
            whole = time.perf_counter() - started
            assert record.error is None, record.error
            rounds = [
                1e3 * (row["round_seconds"] - row["evaluate_seconds"]) for row in record.timing[1:]
            ]
            start = whole - sum(row["round_seconds"] for row in record.timing[1:])
            spread = f"{min(rounds):.1f} to {max(rounds):.1f}"
            print(
                f"| {clients:,} | {start:.2f} | {statistics.median(rounds):.1f} | {spread} |",
                flush=True,
            )


def sampled_clients() -> None:
    """Measure the server's private memory while it averages more and more 56 MB updates."""
    print("| clients sampled, 56 MB each | the server's memory at its peak, MB | seconds |")
    print("|---:|---:|---:|")
    for sampled in (10, 50, 200):
        engine = Engine(f"num_clients={sampled}", "fraction_fit=1.0", "rounds=1", *NO_TRAINING)
        started = time.perf_counter()
        with Peak() as peak:
            engine.run()
        seconds = time.perf_counter() - started
        print(f"| {sampled} | {peak.megabytes:,.0f} | {seconds:.1f} |", flush=True)


def residuals() -> None:
    """Run 100 clients with a residual of 56 MB each where all processes together have 3 GB."""
    if not os.access(CGROUP.parent, os.W_OK):
        print("no cgroup can be made here: the run with capped memory is left out")
        return
    CGROUP.mkdir(exist_ok=True)
    (CGROUP / LIMIT).write_text(str(MEMORY_CAP))
    code = f"""
import os
from pathlib import Path
Path({str(CGROUP / "cgroup.procs")!r}).write_text(str(os.getpid()))
os.environ["RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES"] = str(6 * 10**8)
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from simulation import Engine
from scaling import NO_TRAINING, RESIDUAL_CLIENTS
engine = Engine(
    "compression=topk", "compression.density=0.01", f"num_clients={{RESIDUAL_CLIENTS}}",
    "fraction_fit=1.0", "rounds=2", *NO_TRAINING, "local_epochs=1", "local_steps=0",
)
print(engine.run())
"""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    peak = int((CGROUP / PEAK).read_text()) / 1e6
    words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    outcome = "runs" if done.returncode == 0 else f"fails: {words[-1]}"
    print(
        f"{RESIDUAL_CLIENTS} clients with residuals of 56 MB under {MEMORY_CAP / 1e9:g} GB: "
        f"{outcome}, 2 rounds in {time.perf_counter() - started:.0f} s, at most {peak:,.0f} MB"
    )


if __name__ == "__main__":
    existing_clients()
    print()
    sampled_clients()
    print()
    residuals()
