"""Where a payload's bytes are, against numbers worked out by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import lgamma, log

import numpy as np
import pytest

from fedbw_sweep.compression.base import FRAME, WHOLE, Compressor, Known, sizes_to_book
from fedbw_sweep.compression.cast import Dense, Float8
from fedbw_sweep.compression.coding.decoder import Decoder
from fedbw_sweep.compression.coding.encoder import Encoder
from fedbw_sweep.compression.ecsq import ECSQ
from fedbw_sweep.compression.layout import FloatVector, Layout, TensorSpec
from fedbw_sweep.compression.lossless import Lossless
from fedbw_sweep.compression.lowrank import LowRank
from fedbw_sweep.compression.lowrank_ecsq import LowRankECSQ
from fedbw_sweep.compression.sign import Sign
from fedbw_sweep.compression.sparse import RandK, TopK
from fedbw_sweep.compression.uniform import Uniform
from fedbw_sweep.errors import PayloadError

Parts = Counter[tuple[str, str]]


def layout_of(**shapes: tuple[int, ...]) -> Layout:
    return Layout(tuple(TensorSpec(name, shape) for name, shape in shapes.items()))


def gaussian(size: int) -> FloatVector:
    return np.random.default_rng(1).standard_normal(size).astype(np.float32)


def parts_of(compressor: Compressor, update: FloatVector, layout: Layout) -> Parts:
    payload = compressor.encode(update, layout, np.random.default_rng(0))
    parts = compressor.parts(payload, layout)
    assert parts.total() == len(payload)
    return parts


def by_part(parts: Parts) -> Counter[str]:
    sums: Counter[str] = Counter()
    for (_, part), count in parts.items():
        sums[part] += count
    return sums


HEAD = (WHOLE, FRAME)


@pytest.mark.parametrize(
    ("compressor", "layout", "expected"),
    [
        (Dense(), layout_of(a=(3,), b=(2, 5)), {("a", "values"): 12, ("b", "values"): 40}),
        (
            Uniform(8, block=128),  # blocks of a, and two of b: a bfloat16 each
            layout_of(a=(128,), b=(2, 128)),
            {HEAD: 4, ("a", "tables"): 2, ("b", "tables"): 4}
            | {("a", "values"): 128, ("b", "values"): 256},
        ),
        (
            Uniform(4, block=128),  # one block: 2 bytes, 3/4 of them b's; half a byte a number
            layout_of(a=(32,), empty=(0,), b=(96,)),
            {HEAD: 4, ("b", "tables"): 2, ("a", "values"): 16, ("b", "values"): 48},
        ),
        (
            Float8(),  # a float32 scale for each tensor
            layout_of(a=(3,), b=(5, 2)),
            {HEAD: 4, ("a", "tables"): 4, ("b", "tables"): 4}
            | {("a", "values"): 3, ("b", "values"): 10},
        ),
        (
            Sign("row"),  # a bfloat16 for each row, a vector being one
            layout_of(a=(8, 2), b=(16,)),
            {HEAD: 4, ("a", "tables"): 16, ("b", "tables"): 2}
            | {("a", "values"): 2, ("b", "values"): 2},
        ),
        (
            LowRank(1),  # 8 + 4 float32 for the matrix; the vector as it is
            layout_of(a=(8, 4), b=(3,)),
            {HEAD: 4, ("a", "factors"): 48, ("b", "values"): 12},
        ),
    ],
)
def test_fixed_sizes(
    compressor: Compressor, layout: Layout, expected: dict[tuple[str, str], int]
) -> None:
    assert parts_of(compressor, gaussian(layout.size), layout) == expected


@pytest.mark.parametrize(("values", "size"), [("fp32", 4), ("fp16", 2)])
def test_kept_values(values: str, size: int) -> None:
    layout = layout_of(a=(40,), untouched=(20,), b=(10, 4))
    update = np.zeros(layout.size, np.float32)
    update[[3, 17]] = 1.5, -2
    update[[60, 61, 99]] = 1, 2, 3
    parts = parts_of(TopK(0.05, values), update, layout)
    assert parts["a", "values"] == pytest.approx(2 * size, abs=1)
    assert parts["b", "values"] == pytest.approx(3 * size, abs=1)
    assert ("untouched", "values") not in parts
    assert parts["a", "indices"] > 0
    assert by_part(parts)["tables"] >= (4 if values == "fp16" else 0)  # the scale


def test_positions_cost_what_theory_says() -> None:
    layout = layout_of(a=(256, 256))
    update = np.zeros(layout.size, np.float32)
    kept = np.random.default_rng(0).choice(layout.size, 4096, replace=False)
    update[kept] = np.resize([1, -1], 4096)
    parts = by_part(parts_of(TopK(0.0625, "sign"), update, layout))
    n, k = layout.size, 4096
    choices = (lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)) / log(2)
    assert parts["values"] == pytest.approx(4096 / 8, abs=1)
    assert parts["indices"] == pytest.approx(choices / 8, rel=0.04)
    assert 4 < parts["tables"] < 80
    assert parts["frame"] == pytest.approx(4, abs=1)


def test_a_seed_is_no_tensors() -> None:
    layout = layout_of(a=(50,), b=(50,))
    parts = parts_of(RandK(0.5, "fp32"), gaussian(100), layout)
    assert by_part(parts)["values"] == pytest.approx(50 * 4, abs=1)
    assert parts[HEAD] == pytest.approx(4 + 4, abs=1)


@dataclass(frozen=True)
class Symbols(Compressor):
    """Codes a vector of small integers as they are, with or without contexts."""

    contexts: bool

    def _of(self, layout: Layout) -> np.ndarray | None:
        return np.arange(layout.size) % 2 if self.contexts else None

    def _encode(
        self, update: FloatVector, layout: Layout, rng: np.random.Generator, known: Known
    ) -> bytes:
        encoder = Encoder()
        if self.contexts:
            encoder.integers(update.astype(np.int64), self._of(layout))
        else:
            encoder.symbols(update.astype(np.int64))
        return encoder.finish()

    def _decode(self, body: memoryview, layout: Layout, known: Known) -> FloatVector:
        decoder = Decoder(body)
        if self.contexts:
            return decoder.integers(layout.size, 255, self._of(layout)).astype(np.float32)
        return decoder.symbols(layout.size, 255).astype(np.float32)


# a is all zeros, b is spread over 0 to 255. Zero is every other symbol, which is 1 bit, and any
# other is one of 256 in the other half, 9 bits. As integers, their mean of 64 has the two lowest
# bits travel as they are, and of the rest zero has a probability of 1/2 + 1/128.
ZERO = -np.log2(1 / 2 + 1 / 128)


@pytest.mark.parametrize(
    ("contexts", "bits_of_a", "bits_of_b"),
    [(False, 1, 9), (True, 2 + ZERO, 2 + 63 / 64 * 7 + ZERO / 64)],
)
def test_a_shared_stretch_is_divided_by_code_length(
    contexts: bool, bits_of_a: float, bits_of_b: float
) -> None:
    n = 1 << 15
    layout = layout_of(a=(n,), b=(n,))
    update = np.append(np.zeros(n), np.random.default_rng(0).integers(0, 256, n))
    parts = parts_of(Symbols(contexts), update.astype(np.float32), layout)
    assert parts["a", "values"] == pytest.approx(n * bits_of_a / 8, rel=0.01)
    assert parts["b", "values"] == pytest.approx(n * bits_of_b / 8, rel=0.01)
    assert parts["a", "tables"] == pytest.approx(parts["b", "tables"], abs=1)


@pytest.mark.parametrize("compressor", [ECSQ(), LowRankECSQ(), Lossless(), TopK()])
def test_what_did_not_move_takes_next_to_nothing(compressor: Compressor) -> None:
    layout = layout_of(moved=(64, 64), still=(64, 64))
    update = gaussian(layout.size)
    update[4096:] = 0
    parts = parts_of(compressor, update, layout)
    still = sum(count for (tensor, _), count in parts.items() if tensor == "still")
    assert still < 0.02 * parts.total()


def test_low_rank_is_in_the_factors() -> None:
    layout = layout_of(noise=(64, 64), bias=(64,), low=(64, 128))
    left, right = gaussian(64), gaussian(128)
    update = np.concatenate([0.3 * gaussian(64 * 65), np.outer(left, right).ravel()])
    parts = parts_of(LowRankECSQ(step=0.5), update.astype(np.float32), layout)
    assert parts["low", "factors"] > 10 * parts["low", "values"]
    assert ("noise", "factors") not in parts or parts["noise", "factors"] < 10
    assert ("bias", "factors") not in parts
    assert parts["noise", "values"] > parts["low", "factors"]


def test_booking_ends_with_a_refusal() -> None:
    with pytest.raises(PayloadError):
        Uniform().parts(b"????", layout_of(a=(8,)))
    assert sizes_to_book() is None
