"""What a simulation costs beyond the training in it: this engine, Flower's own, plain processes.

python benchmarks/simulation.py            # jobs A, B and C, a sweep and the start-up, as ratios
python benchmarks/simulation.py --quick    # fewer repeats
python benchmarks/simulation.py --only A   # one of A, cold, B, C, start, sweep
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
from collections.abc import Callable

import processes
from processes import FIRST_STEP, cold_floor, command, installed, interleave, systems
from workloads import JOB_A, NO_STEP, ONE_ROUND_OF_A, ONE_STEP, SAME_MODEL, WORKERS, Parts


def seconds_of(runs: list[Parts], but: str | None = None) -> list[float]:
    """Return each run's seconds, without those of one of its parts."""
    return [run["seconds"] - (run[but] if but else 0.0) for run in runs]


def row(what: str, times: list[float], against: list[float] | None = None) -> None:
    """Print a row: median, spread, and the median of the ratios to what ran beside it."""
    ratio = ""
    if against:
        ratio = f"{statistics.median(a / b for a, b in zip(times, against, strict=True)):.2f}"
    spread = f"{min(times):.2f} to {max(times):.2f}"
    print(f"| {what} | {statistics.median(times):.2f} | {spread} | {ratio} |", flush=True)


def breakdown(floor: list[Parts], ray: list[Parts]) -> None:
    """Print where both spend their time: means, so that the parts add up to the whole."""

    def parts(runs: list[Parts]) -> list[float]:
        mean = {name: statistics.fmean(run[name] for run in runs) for name in runs[0]}
        training, encoding = (
            mean.get(f"{name}_seconds", 0.0) / WORKERS for name in ("train", "encode")
        )
        evaluating, rounds = mean["evaluate_seconds"], mean["round_seconds"]
        rest = rounds - training - encoding - evaluating
        whole = mean["seconds"]
        return [training, encoding, evaluating, rest, whole - rounds, whole]

    names = (
        f"training, of all clients / {WORKERS}",
        f"encoding, of all clients / {WORKERS}",
        "the held-out loss",
        "messages, decoding, averaging, waiting for a round's last client",
        "outside the rounds: the initial model, the records",
        "all",
    )
    print("\n| where A's seconds go, means | floor | backend=ray | more |\n|---|---:|---:|---:|")
    for name, there, here in zip(names, parts(floor), parts(ray), strict=True):
        print(f"| {name} | {there:.2f} | {here:.2f} | {here - there:+.2f} |", flush=True)
    print()


def job_a(repeats: int) -> None:
    """Training-bound, warm: over plain processes."""
    for peer, runs in interleave(installed("-apart"), 1, warm_up=0).items():
        assert runs[0]["apart"] < SAME_MODEL, (peer, runs)
    warm = interleave(("floor", "ray", *installed()), repeats)
    floor = seconds_of(warm["floor"])
    row("A: two plain processes, warm (the floor)", floor)
    row("A: backend=ray, warm, over the floor", seconds_of(warm["ray"]), floor)
    for peer in installed():
        row(f"A: {peer}, warm, over the floor", seconds_of(warm[peer]), floor)
    flower = seconds_of(interleave(("flower",), repeats, warm_up=0)["flower"])
    row("A: backend=flower, over the floor", flower, [statistics.median(floor)] * repeats)
    breakdown(warm["floor"], warm["ray"])


def cold(repeats: int) -> None:
    """Job A with all that starts and ends with a process."""
    floors, colds = [], []
    for _ in range(repeats):
        floors.append(cold_floor(*JOB_A))
        colds.append(command(*JOB_A))
    row("A: two plain processes, cold", floors)
    row("A: the whole command, over them", colds, floors)


def job_b(repeats: int) -> None:
    """Large models echoed."""
    names = "echo-ray", "echo-flower", *installed("-echo")
    echoes = interleave(names, repeats, warm_up=0, in_a_row=2)
    ray, flower = (seconds_of(echoes[f"echo-{name}"]) for name in ("ray", "flower"))
    row("B: backend=ray", ray)
    row("B: backend=flower, over backend=ray", flower, ray)
    for peer in installed("-echo"):
        row(f"B: {peer}, over backend=ray", seconds_of(echoes[peer]), ray)


def job_c(repeats: int) -> None:
    """One more run of a sweep, beyond training and evaluation."""
    names = "fixed", "fixed-seed", *installed("-fixed")
    fixed = interleave(names, repeats, in_a_row=4)
    same, ray, *peers = (seconds_of(runs, but="evaluate_seconds") for runs in fixed.values())
    row("C: one more run without training, of the same model, backend=ray", same)
    row("C: the same of another seed", ray)
    flower = interleave(("fixed-flower",), repeats, warm_up=0)["fixed-flower"]
    seconds = seconds_of(flower, but="evaluate_seconds")
    row("C: another seed, backend=flower, over it", seconds, [statistics.median(ray)] * repeats)
    for peer, times in zip(installed("-fixed"), peers, strict=True):
        row(f"C: another seed, {peer.removesuffix('-fixed')}, over it", times, ray)

    def one_more(key: str) -> list[float]:
        def sweep_of(count: int) -> float:
            values = ",".join(str(number) for number in range(1, count + 1))
            return command("-m", *NO_STEP, "data.heldout_tokens=64", f"{key}={values}")

        return [(sweep_of(43) - sweep_of(3)) / 40 for _ in range(repeats)]

    what = "one more run in a command's sweep, the whole command counted"
    row(f"C: {what}, of the same model", one_more("lr"))
    row(f"C: {what}, of another seed", one_more("seed"))


def start(repeats: int) -> None:
    """The start of a command, and where it goes."""
    one_step = (*ONE_STEP, f"backend.workers={WORKERS}")
    all_three = [
        (command(*one_step), command(*one_step, "backend=flower"), cold_floor(*one_step))
        for _ in range(repeats)
    ]
    ray, flower, floor = (list(column) for column in zip(*all_three, strict=True))
    row("the whole command with one step in it", ray)
    row("the same with backend=flower, over it", flower, ray)
    row("two plain processes with one step in them, cold, over it", floor, ray)

    def stamps(*how: str) -> dict[str, float]:
        printed = subprocess.run(
            [sys.executable, processes.__file__, "--stages", *how, *one_step],
            capture_output=True,
            text=True,
        ).stdout
        found = re.findall(r"^(\d+\.\d\d) (.*)$", printed, re.MULTILINE)
        return {stage: float(at) for at, stage in reversed(found)}  # each's first time

    in_turn = [(stamps(), stamps("plain"), stamps("backend=flower")) for _ in range(repeats)]
    runs, *others = zip(*in_turn, strict=True)
    first = [run[FIRST_STEP] for run in runs]
    row("a command's start, until the first step", first)
    for name, theirs in zip(("plain ray.init", "backend=flower"), others, strict=True):
        row(f"the same with {name}, over it", [run[FIRST_STEP] for run in theirs], first)
    print("\n| start of the command, until | at second, median |\n|---|---:|")
    ends = {stage: statistics.median(run[stage] for run in runs) for stage in runs[0]}
    for stage, end in sorted(ends.items(), key=lambda item: item[1]):
        print(f"| {stage} | {end:.1f} |", flush=True)
    print()


def sweep(repeats: int) -> None:
    """Six small runs in one command, beyond its start, over plain processes doing the same."""
    ratios = []
    for _ in range(repeats):
        one = command(*ONE_STEP, f"backend.workers={WORKERS}")
        six = command("-m", *ONE_ROUND_OF_A, "seed=1,2,3,4,5,6")
        with systems("floor-round") as asked:
            floors = [asked["floor-round"].run(seed)["seconds"] for seed in range(7)]
        ratios.append((six - one, sum(floors[1:])))
    beyond, floor = (list(column) for column in zip(*ratios, strict=True))
    row("a sweep of 6 runs of one round of A, beyond the start, over the floor", beyond, floor)


JOBS: dict[str, Callable[[int], None]] = {
    "A": job_a,
    "cold": cold,
    "B": job_b,
    "C": job_c,
    "start": start,
    "sweep": sweep,
}


def main(jobs: list[str], repeats: int) -> None:
    """Print the jobs' tables."""
    print("| job | seconds, median | min to max | ratio |\n|---|---:|---|---:|")
    for job in jobs:
        JOBS[job](repeats)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=JOBS, action="append")
    chosen = parser.parse_args()
    main(chosen.only or list(JOBS), 2 if chosen.quick else 5)
