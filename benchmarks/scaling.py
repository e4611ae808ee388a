"""What grows with clients and model size: time per round, start of a run, the server's memory.

python benchmarks/scaling.py             # clients that exist, clients sampled, residuals
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from engine import Engine
from workloads import WORKERS

RECORDS = 120_000
NO_TRAINING = ("local_epochs=0", "data.heldout_tokens=64", f"backend.workers={WORKERS}")
RESIDUAL_CLIENTS = 100
MEMORY_CAP = 3 * 10**9
STORE = 6 * 10**8
CAPPED = (
    *("compression=topk", "compression.density=0.01", f"num_clients={RESIDUAL_CLIENTS}"),
    *("fraction_fit=1.0", "rounds=2", "local_steps=1", "batch_size=1", "sequence_length=16"),
    *("data.heldout_tokens=64", "backend.workers=1"),
)
CGROUPS = Path("/sys/fs/cgroup")


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
            from fedbw_sweep.sweeps.run import execute

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


def model_sizes() -> None:
    """Time rounds of 10 clients that train nothing, with models of more and more bytes."""
    print("| message, MB | s a round, median of 5 | min to max | GB/s up and down |")
    print("|---:|---:|---|---:|")
    for vocabulary in (512, 12_800, 50_304, 201_216):
        model = "model=tiny", f"model.architecture.vocab_size={vocabulary}"
        engine = Engine(*model, "num_clients=10", "fraction_fit=1.0", "rounds=6", *NO_TRAINING)
        from fedbw_sweep.sweeps.run import execute

        record = execute(engine.config, engine.folder)
        assert record.error is None, record.error
        rounds = [row["round_seconds"] - row["evaluate_seconds"] for row in record.timing[2:]]
        message = record.summary["dense_message_bytes"]
        seconds = statistics.median(rounds)
        spread = f"{min(rounds):.2f} to {max(rounds):.2f}"
        rate = 2 * 10 * message / 1e9 / seconds
        print(f"| {message / 1e6:.1f} | {seconds:.2f} | {spread} | {rate:.2f} |", flush=True)


@contextmanager
def capped_memory() -> Iterator[Path | None]:
    """Make a cgroup for what is to have `MEMORY_CAP` together, inside this process's own."""
    [own] = re.findall(r"^\d+:memory:/(.*)$", Path("/proc/self/cgroup").read_text(), re.M) or [None]
    group = CGROUPS / (f"memory/{own}" if own is not None else "") / "fedbw_sweep_scaling"
    limit = "memory.max" if own is None else "memory.limit_in_bytes"
    try:
        group.mkdir(exist_ok=True)
        (group / limit).write_text(str(MEMORY_CAP))
    except OSError:
        yield None
        return
    yield group
    while (group / "cgroup.procs").read_text():  # Ray's processes end a moment later
        time.sleep(0.1)
    group.rmdir()


class Together:
    """The most memory, MB, of a cgroup's processes, what they share counted once (PSS)."""

    def __init__(self, group: Path) -> None:
        self.group, self.megabytes = group, 0.0

    def look(self) -> None:
        pids = map(int, (self.group / "cgroup.procs").read_text().split())
        total = 0.0
        for pid in pids:
            with suppress(psutil.Error):  # it may just have ended
                total += psutil.Process(pid).memory_full_info().pss / 1e6
        self.megabytes = max(self.megabytes, total)


def residuals() -> None:
    """Run 100 clients with a residual of 56 MB each where all processes together have 3 GB.

    The kernel counts what the processes share once, and the files they have open as far as it
    keeps them in memory, and ends a process where it cannot make room. Ray's object store is what
    Ray itself would make it on a machine with so much memory.
    """
    code = f"""
import os, sys
open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
sys.path.insert(0, {str(Path(__file__).parent)!r})
from engine import Engine
from scaling import CAPPED
Engine(*CAPPED).run()
"""
    with capped_memory() as group:
        if group is None:
            print("no cgroup can be made here: the run with capped memory is left out")
            return
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(group)],
            env={**os.environ, "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(STORE)},
            stdout=subprocess.DEVNULL,
        )
        together = Together(group)
        while process.poll() is None:
            together.look()
            time.sleep(0.2)
        seconds = time.perf_counter() - started
    outcome = "done" if process.returncode == 0 else f"failed with exit code {process.returncode}"
    print(
        f"{RESIDUAL_CLIENTS} clients with residuals of 56 MB under {MEMORY_CAP / 1e9:g} GB: "
        f"{outcome}, 2 rounds in {seconds:.0f} s, all processes at most "
        f"{together.megabytes:,.0f} MB"
    )


if __name__ == "__main__":
    existing_clients()
    print()
    sampled_clients()
    print()
    model_sizes()
    print()
    residuals()
