"""One local step of pythia-14m: glibc's own memory settings, the logits held whole, and ours.

python benchmarks/training_step.py
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from itertools import product

REPEATS = 7
STEPS = {64: 8, 512: 1}
"""Steps that are timed, by the tokens of a sequence."""
KINDS = {"ours": "", "whole logits": "logits", "glibc's memory": "glibc"}


def measure(kind: str, length: int) -> tuple[float, float]:
    """Median CPU seconds of a step of 8 x `length` tokens, and the MB it adds to a process's peak.

    One thread; the first step is the one that adds memory, and its time is left out.
    """
    import numpy as np
    from hydra import compose, initialize_config_dir

    from fedbw_sweep.config.run import RunConfig
    from fedbw_sweep.config.section import CONF
    from fedbw_sweep.model.build import build_model
    from fedbw_sweep.training import loss, process
    from fedbw_sweep.training.local import train

    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = RunConfig.from_hydra(compose("config"))
    if kind == "glibc":
        process.MALLOC_OPTIONS.clear()
    if kind == "logits":
        loss.has_linear_head = lambda *_: False
    process.prepare_process()
    model = build_model(config.model, seed=0)
    tokens = np.random.default_rng(0).integers(0, 256, (8, length + 1)).astype(np.int32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    added, times = 0.0, []
    for step in range(1 + STEPS[length]):
        started = time.process_time()
        train(
            model, tokens, epochs=1, steps=None, batch_size=8, lr=1e-3, rng=np.random.default_rng(0)
        )
        times.append(time.process_time() - started)
        if step == 0:
            added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6
    return statistics.median(times[1:]), added


def main() -> None:
    """Take turns in fresh processes, so that none inherits another's heap."""
    results: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for _, length, kind in product(range(REPEATS), STEPS, KINDS.values()):
        done = subprocess.run(
            [sys.executable, __file__, kind, str(length)],
            capture_output=True,
            text=True,
            check=True,
        )
        seconds, added = map(float, done.stdout.split())
        results.setdefault((kind, length), []).append((seconds, added))
    print("| tokens | step | CPU seconds, median (min to max) | ours / it | MB added | ours / it |")
    print("|---|---|---|---|---|---|")
    for length, (name, kind) in product(STEPS, KINDS.items()):
        pairs = list(zip(results["", length], results[kind, length], strict=True))
        seconds = [this[0] for _, this in pairs]
        added = statistics.median(this[1] for _, this in pairs)
        faster, smaller = (
            statistics.median(ours[i] / this[i] for ours, this in pairs) for i in (0, 1)
        )
        print(
            f"| 8 x {length} | {name} | {statistics.median(seconds):.3f} "
            f"({min(seconds):.3f} to {max(seconds):.3f}) | {faster:.2f} | {added:.0f} "
            f"| {smaller:.2f} |"
        )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(*measure(sys.argv[1], int(sys.argv[2])))
    else:
        main()
