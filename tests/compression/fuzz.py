"""Throw damaged payloads at every decoder for as long as asked.

python -m tests.compression.fuzz --seconds 600
"""

from __future__ import annotations

import argparse
import collections
import resource
import time

import numpy as np
import yaml

from fedbw_sweep.config.groups import CompressionConfig
from fedbw_sweep.config.section import CONF
from fedbw_sweep.errors import PayloadError
from fedbw_sweep.testing import check_decoded, damaged, layout_of

from .test_contract import NAMES

SLOWEST_S = 5.0
MOST_MB = 200
"""MiB that may be taken beyond what is there before the first payload."""


def main() -> None:
    """Fuzz every method of the bench and every choice of conf/compression; fail on the first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    methods = yaml.safe_load((CONF / "codecs.yaml").read_text(encoding="utf-8"))["methods"]
    codecs = {
        label: choice.build()
        for method in [*methods, *NAMES]
        for label, choice in CompressionConfig.expand(method)
    }
    outcomes: collections.Counter[str] = collections.Counter()
    slowest, end = 0.0, time.monotonic() + options.seconds
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while time.monotonic() < end:
        dimensions = rng.integers(0, 4, rng.integers(1, 5))
        layout = layout_of(*(tuple(map(int, rng.integers(0, 40, n))) for n in dimensions))
        update = rng.standard_normal(layout.size) * 10.0 ** rng.uniform(-30, 30)
        for name, compressor in codecs.items():
            payload = compressor.encode(update.astype(np.float32), layout, rng)
            for _ in range(5):
                hostile = damaged(payload, rng)
                match rng.integers(5):
                    case 0:
                        hostile = hostile[: rng.integers(len(hostile) + 1)]
                    case 1:
                        hostile += rng.bytes(int(rng.integers(1, 9)))
                started = time.perf_counter()
                try:
                    check_decoded(compressor.decode(hostile, layout), layout)
                    outcomes["decoded"] += 1
                except PayloadError:
                    outcomes["refused"] += 1
                except BaseException:
                    print(f"{name} {layout.tensors} {hostile.hex()}")
                    raise
                slowest = max(slowest, time.perf_counter() - started)
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024  # KiB on Linux
    assert slowest < SLOWEST_S, f"a decode took {slowest:.1f} s"
    assert taken < MOST_MB, f"{taken:.0f} MiB were taken"
    print(f"{sum(outcomes.values()):,} payloads, {len(codecs)} codecs: {dict(outcomes)}")
    print(f"slowest decode {slowest:.3f} s; {taken:.0f} MiB of memory taken")


if __name__ == "__main__":
    main()
