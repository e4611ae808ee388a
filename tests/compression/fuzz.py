"""Throw damaged and forged payloads at every decoder; fail where one breaks its promise.

python -m tests.compression.fuzz --payloads 1000000 --state fuzz.json goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
import tracemalloc
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml
from threadpoolctl import threadpool_limits

from fedbw_sweep.compression.base import NOTHING_KNOWN, Compressor, Known
from fedbw_sweep.compression.cast import Dense
from fedbw_sweep.compression.coding.encoder import Encoder
from fedbw_sweep.compression.factors import most_rank
from fedbw_sweep.compression.layout import FloatVector, Layout
from fedbw_sweep.compression.lowrank_ecsq import LowRankECSQ, is_matrix
from fedbw_sweep.config.groups import CompressionConfig
from fedbw_sweep.config.section import CONF
from fedbw_sweep.errors import PayloadError
from fedbw_sweep.testing import check_decoded, damaged, layout_of

from .test_contract import NAMES, VARIANTS, load_compressor

SIZES, PER_ARRAY, CONSTANT = 3, 4096, 2 << 20
"""Bytes that a decode may take: so many times the layout's float32 size, and so many an array."""

NANOSECONDS, PER_ARRAY_S, CONSTANT_S = 500, 1e-3, 0.25
"""CPU time that one may take: a coordinate, an array, and in all: some 250 tables at most."""

GREEDY = (
    "topk density=1",
    "topk density=0.3 values=int8",
    "randk density=0.5",
    "randk density=0.9 values=fp16",
    "qsgd levels=16384",
    "ecsq step=0.0001",
    "lowrank_ecsq step=0.01",
    "lowrank_ecsq step=0.01 dither=true",
    "lowrank_ecsq step=0.01 context=received",
    "ecsq step=0.0001 embedding_step=0.01",
    "eden bits=8",
    "sketch counters=1",
    "sign scale=row",
)
"""Methods with the parameters that make a decoder work hardest."""


def one_thread() -> threadpool_limits:
    """Keep the BLAS to one thread, as clients do: others that wait would count as CPU time."""
    return threadpool_limits(1)


def memory_limit(payload: bytes, layout: Layout) -> int:
    """Return the bytes that decoding may take, its own copy of the payload included."""
    arrays = len(layout.floats)
    return SIZES * 4 * layout.size + PER_ARRAY * arrays + CONSTANT + len(payload)


def time_limit(layout: Layout) -> float:
    """Return the seconds of CPU time that decoding may take."""
    return NANOSECONDS * 1e-9 * layout.size + PER_ARRAY_S * len(layout.floats) + CONSTANT_S


def methods() -> dict[str, Compressor]:
    """Return every method of the codec bench, of conf/compression, and those that work hardest."""
    bench = yaml.safe_load((CONF / "codecs.yaml").read_text(encoding="utf-8"))["methods"]
    named = {
        label: choice.build()
        for method in [*bench, *NAMES]
        for label, choice in CompressionConfig.expand(method)
    }
    return named | {name: load_compressor(name) for name in (*VARIANTS, *GREEDY)}


def drawn_layout(rng: np.random.Generator) -> Layout:
    """Return a layout of a few arrays of any shape; one in fifty has some 10**5 coordinates."""
    if rng.random() < 0.98:
        dimensions = rng.integers(0, 4, rng.integers(1, 5))
        return layout_of(*(tuple(map(int, rng.integers(0, 24, n))) for n in dimensions))
    long, short = int(rng.integers(50_000, 300_000)), int(rng.integers(2, 9))
    square, rank = int(rng.integers(200, 500)), int(rng.integers(2, 17))
    shapes = [
        [(long,)], [(long, 1)], [(1, long)], [(short, long // short)], [(long // short, short)],
        [(square, square)], [(64, 64)] * 30, [(40, 40)] * 50, [(rank, 512), (512, rank)] * 12,
        [(3, 5)] * 200,
    ]  # fmt: skip
    return layout_of(*shapes[rng.integers(len(shapes))])


def drawn_update(layout: Layout, rng: np.random.Generator) -> FloatVector:
    """Return an update: Gaussian, constant, heavy-tailed or mostly zeros, at any scale."""
    values = rng.standard_normal(layout.size)
    match rng.integers(4):
        case 0:
            values[:] = 1
        case 1:
            values *= np.exp(3 * rng.standard_normal(layout.size))
        case 2:
            values *= rng.random(layout.size) < 0.05
    return (values * 10.0 ** rng.uniform(-30, 30)).astype(np.float32)


def full_ranks(layout: Layout, method: LowRankECSQ, beyond: int) -> bytes:
    """Return a body that gives each matrix its highest rank (or a higher one), in a few bytes."""
    shapes = [t.shape for t in layout.filled if is_matrix(t)]
    flat = [(int(np.prod(s[:-1])), s[-1]) for s in shapes]
    ranks = np.array([min(method.max_rank, most_rank(s)) + beyond for s in flat], np.int64)
    encoder = Encoder()
    encoder.uint(1 << 15, (1 << 16) - 1)
    encoder.integers(ranks)
    encoder.integers(np.zeros(np.count_nonzero(ranks), np.int64))
    encoder.integers(np.full(np.count_nonzero(ranks), 9))
    return encoder.finish()


def forged(
    name: str,
    bodies: dict[str, bytes],
    method: Compressor,
    frame: bytes,
    layout: Layout,
    rng: np.random.Generator,
) -> bytes:
    """Return a payload that starts as one of the method for this layout, and goes on as it may."""
    own = frame + bodies[name]
    match int(rng.integers(8)):
        case 0:
            return own[: rng.integers(len(own) + 1)]
        case 1:
            return own + rng.bytes(int(rng.integers(1, 9)))
        case 2:
            return frame + rng.bytes(int(rng.integers(0, 60)))
        case 3:
            return frame + bytes(rng.choice([0, 1, 127, 255], int(rng.integers(0, 60))).tolist())
        case 4 | 5:
            other = bodies[str(rng.choice(list(bodies)))]
            if isinstance(method, LowRankECSQ) and rng.random() < 0.5:
                other = full_ranks(layout, method, int(rng.random() < 0.1))
            return frame + other
        case _:
            return damaged(own, rng)


@dataclass
class Tally:
    """What has been thrown, and what came of it."""

    rounds: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    most_memory: float = 0.0
    most_time: float = 0.0

    @property
    def payloads(self) -> int:
        return sum(self.outcomes.values())

    def throw(
        self, method: Compressor, payload: bytes, layout: Layout, known: Known = NOTHING_KNOWN
    ) -> None:
        """Decode one payload; fail on anything but a vector or a `PayloadError` within limits."""
        for attempt in range(3):
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            started = time.process_time()
            try:
                check_decoded(method.decode(payload, layout, known), layout)
                outcome = "decoded"
            except PayloadError:
                outcome = "refused"
            seconds = time.process_time() - started
            _, peak = tracemalloc.get_traced_memory()
            if seconds <= time_limit(layout):
                break
            assert attempt < 2, f"{seconds:.2f} s, of {time_limit(layout):.2f}"
        memory = (peak - before) / memory_limit(payload, layout)
        assert memory <= 1, f"{peak - before:,} bytes, of {memory_limit(payload, layout):,}"
        self.outcomes[outcome] += 1
        self.most_memory = max(self.most_memory, memory)
        self.most_time = max(self.most_time, seconds / time_limit(layout))

    def round(self, seed: int, codecs: dict[str, Compressor]) -> None:
        """Draw a layout and an update, and throw twenty payloads at each method."""
        rng = np.random.default_rng([seed, self.rounds])
        layout = drawn_layout(rng)
        update = drawn_update(layout, rng)
        slow = layout.size > 500 and rng.random() < 0.9  # searches for a target take seconds
        known = Known(drawn_update(layout, rng), drawn_update(layout, rng))
        bodies, frames = {}, {}
        for name, method in codecs.items():
            if slow and "target" in name:
                continue
            payload = method.encode(update, layout, rng, known)
            length = 0 if isinstance(method, Dense) else method.FRAME_BYTES
            frames[name], bodies[name] = payload[:length], payload[length:]
        for name, frame in frames.items():
            for _ in range(20):
                hostile = forged(name, bodies, codecs[name], frame, layout, rng)
                try:
                    self.throw(codecs[name], hostile, layout, known)
                except BaseException:
                    print(f"{name}, round {self.rounds}, {layout.tensors}: {hostile[:200].hex()}")
                    raise
        self.rounds += 1

    def __str__(self) -> str:
        return (
            f"{self.payloads:,} payloads, {self.rounds:,} layouts: {dict(self.outcomes)}; "
            f"at most {self.most_memory:.0%} of the memory and {self.most_time:.0%} of the time"
        )


def read_tally(path: Path | None) -> Tally:
    """Return the tally of a state file, or a new one."""
    if path is None or not path.is_file():
        return Tally()
    kept = json.loads(path.read_text(encoding="utf-8"))
    return Tally(**{**kept, "outcomes": Counter(kept["outcomes"])})


def write_tally(path: Path, tally: Tally) -> None:
    """Write the state file, whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(vars(tally)), encoding="utf-8")
    part.replace(path)


def main() -> None:
    """Fuzz every method of the bench and every choice of conf/compression; fail on the first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--payloads", type=int, default=10**9, help="in all, with those before")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, help="file of what has been done, kept up to date")
    options = parser.parse_args()
    codecs, tally = methods(), read_tally(options.state)
    end = time.monotonic() + options.seconds
    tracemalloc.start()
    with one_thread():
        while time.monotonic() < end and tally.payloads < options.payloads:
            tally.round(options.seed, codecs)
            if options.state:
                write_tally(options.state, tally)
    print(f"{len(codecs)} codecs, {tally}")


if __name__ == "__main__":
    main()
