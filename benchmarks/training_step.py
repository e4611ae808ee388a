"""One local step of pythia-14m, with glibc's own memory settings and with ours.

python benchmarks/training_step.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

REPEATS = 5
STEPS = 10


def seconds_per_step(*, keep_memory: bool) -> float:
    """Median seconds of a step of 8 x 64 tokens on one thread, after a warm-up step."""
    import numpy as np
    from hydra import compose, initialize_config_dir

    from fedbw_sweep.config.run import RunConfig
    from fedbw_sweep.config.section import CONF
    from fedbw_sweep.model import build
    from fedbw_sweep.training import local, process

    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = RunConfig.from_hydra(compose("config"))
    if not keep_memory:
        process.MALLOC_OPTIONS.clear()
    process.prepare_process()
    model = build.build_model(config.model, seed=0)
    tokens = np.random.default_rng(0).integers(0, 256, (8, 65)).astype(np.int32)
    times = []
    for _ in range(1 + STEPS):
        started = time.perf_counter()
        local.train(
            model, tokens, epochs=1, steps=None, batch_size=8, lr=1e-3, rng=np.random.default_rng(0)
        )
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def main() -> None:
    """Alternate the two in fresh processes, so that neither inherits the other's heap."""
    seconds: dict[str, list[float]] = {"glibc": [], "ours": []}
    for _ in range(REPEATS):
        for kind, times in seconds.items():
            done = subprocess.run(
                [sys.executable, __file__, kind], capture_output=True, text=True, check=True
            )
            times.append(float(done.stdout))
    medians = {kind: statistics.median(times) for kind, times in seconds.items()}
    print("| memory | seconds per step, median (min to max) |\n|---|---|")
    for kind, times in seconds.items():
        print(f"| {kind} | {medians[kind]:.2f} ({min(times):.2f} to {max(times):.2f}) |")
    print(f"\nratio ours / glibc: {medians['ours'] / medians['glibc']:.2f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(seconds_per_step(keep_memory=sys.argv[1] == "ours"))
    else:
        main()
