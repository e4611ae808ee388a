"""Sizes of what is entropy coded, worked out by hand for small cases.

A value costs -log2 of its probability. Probabilities follow here from the counts by what the format
says of its models, and nothing is taken from the coder or from what it returns:

- A length of k bits has a probability in proportion to ``2**(-k/2)``, so that 0 costs
  ``-log2(1 - 2**-0.5)`` = 1.77 bits and each bit more costs a half. A shift of k costs k + 1 bits.
- A table is the length of its last symbol and, unless that is 0, a slope (3 bits), the last symbol
  below its leading bit, and a change of level for each symbol. Levels are rounded logarithms of the
  counts, 23 octaves below the largest and upwards; 0 never occurs.
- A change of d at the slope r has a probability in proportion to ``2**(-r * abs(d))``, and no less
  than ``2**-23`` of that of 0. With r = 4 no change costs ``log2(17 / 15)`` = 0.18 bits.
- Probabilities are multiples of ``2**-24``, of which each has one besides its share.

The methods that are not here have sizes that are known in advance: see the tests of each.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import floor, log2

import numpy as np
import pytest

from fedbw_sweep.compression.base import Compressor
from fedbw_sweep.compression.coding.encoder import Encoder
from fedbw_sweep.compression.coding.positions import encode_indices
from fedbw_sweep.compression.ecsq import ECSQ
from fedbw_sweep.compression.layout import FloatVector, Layout, TensorSpec
from fedbw_sweep.compression.lowrank_ecsq import LowRankECSQ
from fedbw_sweep.compression.sparse import RandK, Ternary, Threshold, TopK
from fedbw_sweep.compression.uniform import QSGD

FRAME = 4
SHIFT = 1  # bit: no low bits travel as they are
LENGTH = -log2(1 - 2**-0.5)  # 1.77 bits: the last symbol that occurs is 0


def stream(before: float, start: float, end: float = 1.0) -> int:
    """Bytes of a stream, from the bits of all before its last value, which decides how it ends.

    A stream is a number, packed from its last value to its first. It is 0 until the last value
    whose share of [0, 1), from `start` to `end`, does not begin at 0; that one makes it as much of
    2**24, the coder's precision. Each value before that multiplies the number by 1 / p. So a stream
    has ``24 + log2(start) + before`` bits or up to ``log2(end / start)`` more, and leading zero
    bytes are not sent. Cases here are chosen so that this is one number of bytes.
    """
    rounding = 0.02  # that of all divisions: each is one of 2**8 or more but for the first few
    fewest, most = 24 + log2(start) + before, 24 + log2(end) + before
    count = floor((fewest - rounding) / 8) + 1
    assert count == floor((most + rounding) / 8) + 1, (fewest, most)
    return count


def integer_shares(weights: list[float]) -> list[float]:
    """Return probabilities: 2**-24 each, and their shares of the rest in whole multiples of it.

    What is left over is the largest's. It matters for the rarest, here the changes by 23.
    """
    rest = 2**24 - len(weights)
    shares = [1 + floor(weight / sum(weights) * rest) for weight in weights]
    shares[weights.index(max(weights))] += 2**24 - sum(shares)
    return [share / 2**24 for share in shares]


def table(levels: list[int], per_octave: int = 1) -> float:
    """Bits of a table of `levels`, the last of which is not 0."""
    last, span = len(levels) - 1, 23 * per_octave
    if not last:
        return LENGTH
    changes = [abs(b - a) for a, b in pairwise([span, *levels])]
    # The slope is the best for changes without bound: 0 is (1 - x) / (1 + x) of a sum both ways.
    slopes = [2**s / 32 for s in range(8)]
    estimates = [sum(changes) * r + len(levels) * log2((1 + 2**-r) / (1 - 2**-r)) for r in slopes]
    slope = slopes[estimates.index(min(estimates))]

    shares = integer_shares([2 ** -min(23, slope * abs(d)) for d in range(-span, span + 1)])
    length = last.bit_length()
    return LENGTH + length / 2 + 3 + (length - 1) - sum(log2(shares[span + d]) for d in changes)


def only(symbol: int) -> list[int]:
    """Levels where one symbol is all that occurs: its own bits are none."""
    return [0] * symbol + [23]


def test_tables_as_worked_out_on_paper() -> None:
    # Two symbols, as frequent: a length of 1 (1.77 + 0.5), a slope, no more bits of the last, and
    # two changes of 0 at the steepest slope.
    assert table([23, 23]) == pytest.approx(2.27 + 3 + 2 * 0.18, abs=0.01)
    # 8, 4, 2, 2: changes 0, -1, -1, 0. At slopes 1, 2, 4: 2 + 4 * log2(3) = 8.3, and
    # 4 + 4 * log2(5/3) = 6.9, and 8 + 4 * 0.18 = 8.7. Length 2 (2.77), slope, one bit of the 3.
    assert table([23, 22, 21, 21]) == pytest.approx(2.77 + 3 + 1 + 6.95, abs=0.01)
    # 0 never: changes -23 and 23. At slopes 1/32, 1/16, 1/8: 1.4 + 2 * 6.5, 2.9 + 2 * 5.5 and
    # 5.8 + 2 * 4.5, of which the second is least. Cut off at 23, x = 2**-1/16 has the sum
    # 1 + 2x (1 - x**23) / (1 - x) = 29.6, which is 4.89 bits.
    assert table([0, 23]) == pytest.approx(2.27 + 3 + 46 / 16 + 2 * 4.89, abs=0.02)


# Primitives. Each is coded so many times over that a byte more is a hundredth of a bit of it, and
# 32 bits that are set end the stream: 2**24 is full, and 16 bits are before that.

TIMES = 800


def check(put: Callable[[Encoder], object], bits: float) -> None:
    encoder = Encoder()
    for _ in range(TIMES):
        put(encoder)
    encoder.uint(0xFFFFFFFF, 0xFFFFFFFF)
    assert len(encoder.finish()) == pytest.approx((24 + 16 + TIMES * bits) / 8, abs=1)


@pytest.mark.parametrize(
    ("limit", "bits"), [(0, 0), (1, 1), (100, 7), (127, 7), (128, 8), (1 << 20, 21), (1 << 40, 41)]
)
def test_integers_as_they_are_cost_the_bits_of_their_limit(limit: int, bits: int) -> None:
    check(lambda encoder: encoder.uint(limit // 3, limit), bits)


def test_bits_and_floats_cost_their_width() -> None:
    check(lambda encoder: encoder.bits(np.array([5, 0, 7, 1, 2]), 3), 5 * 3)
    check(lambda encoder: encoder.bits(np.arange(37), 6), 37 * 6)
    check(lambda encoder: encoder.floats(np.array([1.5, -2], np.float32)), 2 * 32)
    check(lambda encoder: encoder.floats(np.array([1.5, -2, 0], np.float16)), 3 * 16)


@pytest.mark.parametrize(
    ("width", "values", "size"),
    [
        (8, [255], 4),  # planes of 1 bit: the last is half of 2**24, 7 are before: 24 + 7 = 31
        (3, [7] * 11, 6),  # planes of 11 bits, and two before the last: 24 + 22 = 46
        (1, [1] * 32, 5),  # 16 bits, and 16 before: 24 + 16 = 40
        (1, [1] * 33, 7),  # 1 bit, and 32 before: 24 + 32 = 56
        (2, [2, 0], 4),  # the upper plane is the lesser of its two bits, 2**22, and 2 are before
        (5, [0] * 9, 0),  # it stays 0
    ],
)
def test_where_a_stream_ends(width: int, values: list[int], size: int) -> None:
    encoder = Encoder()
    encoder.bits(np.array(values), width)
    assert len(encoder.finish()) == size


@pytest.mark.parametrize(
    ("counts", "bits"),
    [
        ([5], LENGTH),
        ([8, 8], table([23, 23]) + 16),  # a bit each
        ([4, 4, 4, 4], table([23] * 4) + 16 * 2),
        # 1/2, 1/4, 1/8, 1/8.
        ([8, 4, 2, 2], table([23, 22, 21, 21]) + 8 * 1 + 4 * 2 + 2 * 3 + 2 * 3),
        # log2(3/12) is -2 and log2(1/12) = -3.6 becomes -4: 16, 4 and 1 of 21.
        ([12, 3, 1], table([23, 21, 19]) + 12 * log2(21 / 16) + 3 * log2(21 / 4) + log2(21)),
        # What never occurs keeps 2**-24; the other is all the rest.
        ([0, 0, 9], table([0, 0, 23])),
        ([6, 0, 6], table([23, 0, 23]) + 12),
        # 121 // (25 * 2) = 2 is more than one octave and at most two, so levels are half octaves:
        # log2(50/71) = -0.506 becomes -1/2, and the odds are sqrt(2).
        ([71, 50], table([46, 45], 2) + 71 * log2(1 + 0.5**0.5) + 50 * log2(1 + 2**0.5)),
    ],
)
def test_symbols(counts: list[int], bits: float) -> None:
    values = np.repeat(np.arange(len(counts)), counts)
    check(lambda encoder: encoder.symbols(values), bits)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "contexts", "bits"),
    [
        ([0] * 9, None, SHIFT + LENGTH),
        ([0, 1] * 8, None, SHIFT + table([23, 23]) + 16),
        # A mean of 95 is in the octave of 64: two octaves above 16, which leaves 3 low bits.
        # 127 and 63 become 15 and 7, a bit each.
        ([127, 63] * 8, None, 4 + 16 * 3 + table([*only(7), *only(7)]) + 16),
        # 100 is in the third octave from 16, and in the third quarter of that: the symbol
        # 16 + 2 * 4 + 2. A quarter of 64 numbers: 4 bits more. log2(1/15) = -3.9 becomes -4.
        (
            [0] * 15 + [100],
            None,
            SHIFT + table([23, *[0] * 25, 19]) + 15 * log2(17 / 16) + log2(17) + 4,
        ),
        # Each context has a shift and a table; those that do not occur have none.
        ([0, 1, 0, 1], [9, 2, 9, 2], 2 * SHIFT + LENGTH + table(only(1))),
        (
            [0, 4, 1, 4, 0, 4, 1, 4],
            [0, 1] * 4,
            2 * SHIFT + table([23, 23]) + 4 + table(only(4)),
        ),
    ],
)
def test_integers(values: list[int], contexts: list[int] | None, bits: float) -> None:
    of = None if contexts is None else np.array(contexts)
    check(lambda encoder: encoder.integers(np.array(values), of), bits)


def layout_of(*shapes: tuple[int, ...]) -> Layout:
    return Layout(tuple(TensorSpec(f"t{i}", shape) for i, shape in enumerate(shapes)))


# One row of four is kept. By rows that is log2(1 + 8) = 3.2 bits, by columns 8 * 4.2.
ROW = (
    1  # rows, not columns
    + table(only(6))  # the density: the octave of 1 + 16 * 8/4 = 33 is 5, and 1 more
    + SHIFT
    # Counts 0, 0, 8, 0: log2(1/3) = -1.58 becomes -2, and the odds are 4.
    + (table([23, *[0] * 7, 21]) + 3 * log2(5 / 4) + log2(5))
    + (SHIFT + LENGTH)  # gaps, all 0
)


@pytest.mark.slow
def test_indices() -> None:
    layout = layout_of((4, 8))
    check(lambda encoder: encode_indices(encoder, np.arange(16, 24), layout), ROW)

    # Every other of a vector: columns of one, each with a count and, if that is 1, a gap of 0. By
    # rows it would be 16 bits and log2(1 + 8), by columns it is 8 times log2(1 + 1).
    of_vector = 1 + table(only(4))  # the octave of 1 + 16 * 8/16 = 9 is 3
    of_vector += SHIFT + table([23, 23]) + 16 + SHIFT + LENGTH
    check(lambda encoder: encode_indices(encoder, np.arange(1, 16, 2), layout_of((16,))), of_vector)

    # Of four rows of 16, every other coordinate. By rows 4 * (16 + log2(9)) = 77 bits; by columns 8
    # of 4 in 16, 8 * (13.0 + 2.3).
    indices = (16 * np.arange(4)[:, None] + np.arange(0, 16, 2)).ravel()
    bits = 1 + table(only(6))  # 1 + 16 * 32/16 = 33
    # Counts: 12 are 0 and 4 are 8, as above.
    bits += SHIFT + table([23, *[0] * 7, 21]) + 12 * log2(5 / 4) + 4 * log2(5)
    # Gaps: each row's first is 0 and 7 are 1. log2(4/28) = -2.8 becomes -3: odds of 8.
    bits += SHIFT + table([20, 23]) + 4 * log2(9) + 28 * log2(9 / 8)
    check(lambda encoder: encode_indices(encoder, indices, layout_of((16, 16))), bits)


# Methods.


def size(method: Compressor, update: FloatVector | list[float], *shapes: tuple[int, ...]) -> int:
    values = np.array(update, np.float32)
    layout = layout_of(*(shapes or [(values.size,)]))
    payload = method.encode(values, layout, np.random.default_rng(0))
    method.decode(payload, layout)
    return len(payload)


@pytest.mark.parametrize("zeros", range(16, 23))
def test_qsgd(zeros: int) -> None:
    # 16 others are +-1: the norm is 4, and with 4 levels the step is 1, a bfloat16. 0, 1 and -1 are
    # symbols 0, 1 and 2. log2(8/16) = -1 to log2(8/22) = -1.46 become -1: 1/2, 1/4 and 1/4.
    # Changes 0, -1, 0 take 2 + 3 * log2(5/3) = 4.21 bits at slope 2, the table 2.77 + 3 + 1 + 4.21.
    bits = 10.98 + zeros * 1 + 16 * 2
    assert table([23, 22, 22]) == pytest.approx(10.98, abs=0.01)
    # The last eight are -1, the last quarter: two bits each, all set.
    expected = FRAME + 2 + stream(bits - 2, 1 - 2**-16)
    assert size(QSGD(levels=4), [0] * zeros + [1] * 8 + [-1] * 8) == expected


def test_qsgd_of_zeros() -> None:
    # A norm for each bucket.
    assert size(QSGD(bucket=512), [0] * 1000) == FRAME + 2 * 2


KEPT_ROW = [0] * 16 + [1, -1, 1, 1, -1, 1, -1, -1] + [0] * 8


MINUS_ONE = 0xBF80 / 0x10000, 0xBF81 / 0x10000
"""The high half of a float32, which is its last."""


def test_topk_of_a_row() -> None:
    # A row of four, as above, and 8 float32.
    expected = FRAME + stream(ROW + 8 * 32 - 16, *MINUS_ONE)
    assert size(TopK(0.25), KEPT_ROW, (4, 8)) == expected


@pytest.mark.parametrize("tensors", [1, 2, 3, 4])
def test_topk_of_vectors(tensors: int) -> None:
    # The last of ten in each: columns of one. The density is that of 1 + 16 // 10 = 2: 1 + 1.
    bits = tensors + table(only(2))
    # Counts of one in ten, in one table: log2(1/9) = -3.2 becomes -3, odds of 8. Gaps are 0.
    bits += SHIFT + table([23, 20]) + 9 * tensors * log2(9 / 8) + tensors * log2(9)
    bits += SHIFT + LENGTH + tensors * 32
    update = ([0] * 9 + [-1]) * tensors
    assert size(TopK(0.1), update, *[(10,)] * tensors) == FRAME + stream(bits - 16, *MINUS_ONE)


def test_ternary() -> None:
    # A row of four, a float32 for all, and 8 signs. They come last, and from the last they are
    # 11010010.
    start, end = 0b1101001 / 128, 0b1101010 / 128
    assert size(Ternary(0.25), KEPT_ROW, (4, 8)) == FRAME + stream(ROW + 32, start, end)


def test_threshold() -> None:
    # A row of four, a float32 for all, and 8 float16, of which the last is -1, bc00.
    bits = ROW + 32 + 8 * 16
    expected = FRAME + stream(bits - 16, 0xBC00 / 0x10000, 0xBC01 / 0x10000)
    assert size(Threshold(0.5, values="fp16"), KEPT_ROW, (4, 8)) == expected

    # Where nothing reaches it: rows, and a density of 0. All are 0, and so is the stream.
    assert size(Threshold(2.0), KEPT_ROW, (4, 8)) == FRAME


def test_randk() -> None:
    # A seed of 32 bits and 5 float32 of -1, bf80 0000: 24 bits at the end and 32 + 5 * 32 - 16
    # before are 200, and the leading one is set: 25 bytes.
    assert size(RandK(0.5), [-1] * 10) == FRAME + 25
    # With signs a seed, a float32, and 8 bits that all are set: 24 + 64 = 88.
    assert size(RandK(1.0, values="sign"), [-1] * 8) == FRAME + 11
    # With int8 a seed, a float32, 16 signs, and 127 and 63 equally often: of each 3 bits as they
    # are (a shift of 3 costs 4) and one that says which. The last is 127, the upper half.
    bits = 32 + 32 + 16 + 4 + 16 * 3 + table([*only(7), *only(7)]) + 16
    update = [-63 / 127, 1] * 8
    assert size(RandK(1.0, values="int8"), update) == FRAME + stream(bits - 1, 1 / 2)


def ecsq_bits(some: int) -> float:
    """Bits of as many zeros as -1, at a step of a quarter of the rms.

    The rms is sqrt(1/2), and 4 steps; -1 is 4 * sqrt(2) = 5.66 steps, level 6 with a threshold
    between 0.5 and 0.65. The scale is 2**(c/2 - 4) steps, c = 12.
    """
    bits = 16  # the step
    bits += 1 + 1  # not by row; live
    bits += SHIFT + table(only(12))
    bits += SHIFT + table([23, *[0] * 5, 23]) + 2 * some  # which are 0
    return bits + some  # signs


@pytest.mark.parametrize("method", [ECSQ, LowRankECSQ])
@pytest.mark.parametrize("some", range(16, 24))
def test_ecsq(method: type[ECSQ], some: int) -> None:
    # A vector is of no rank: both methods send the same. Signs end the stream, 16 at a time and
    # then the rest, 1 to 16, and all are set.
    last = some % 16 or 16
    start = 1 - 2**-last
    expected = FRAME + stream(ecsq_bits(some) - last, start, start + 2**-16)
    assert size(method(step=0.25), [0, -1] * some) == expected


@pytest.mark.parametrize("method", [ECSQ, LowRankECSQ])
def test_ecsq_of_zeros(method: type[ECSQ]) -> None:
    assert size(method(step=0.25), [0] * 64) == FRAME


def test_the_gains_of_ecsq() -> None:
    # 5.66 steps are decoded to 6 less 0.01: log2(5.66/5.99) is -0.083 octaves, -1.3 sixteenths. The
    # code is 1 less than the 16 of a gain of 1.
    bits = ecsq_bits(32) + SHIFT + table(only(15))
    # The change from 0 to 23 is the last that is not certain, and the last in its table's order. At
    # slope 1/2 (46/2 + 16 * 2.54 = 64 bits, fewer than 68 at 1/4 and 71 at 1), x = 2**-1/2, it is
    # 2**-11.5 of a sum of (1 + x) / (1 - x) = 5.83.
    share = 2**-11.5 / 5.83
    expected = FRAME + stream(bits + log2(share), 1 - share)
    assert size(ECSQ(step=0.25, norm_correction=True), [0, -1] * 32) == expected


@pytest.mark.parametrize(
    ("zeros", "ranks"),
    [
        (0, table(only(1))),
        (1, table([23, 23]) + 2),
        (3, table([23, 21]) + 3 * log2(5 / 4) + log2(5)),  # log2(1/3) = -1.58 becomes -2
        (8, table([23, 20]) + 8 * log2(9 / 8) + log2(9)),
    ],
)
def test_lowrank_ecsq(zeros: int, ranks: float) -> None:
    # +-1 in 16 x 16, of rank one, at a step of 2: 1/2 everywhere. The singular value is 8 steps, 6
    # half-octaves. Its vectors have entries of 1/4, and factors 8 times that: level 2, all 32.
    # Nothing remains worth a bit. Matrices of zeros have rank 0.
    bits = 16  # the step
    bits += SHIFT + ranks
    bits += SHIFT + LENGTH  # the factors' step is that of the update
    bits += SHIFT + table(only(6))  # the singular value
    bits += SHIFT + table(only(2))  # the entries
    bits += 32  # their signs
    # Bits that are 0 end the stream: not by row, not live. The 16 signs before them are the right
    # vector's, of which the last alone differs: 1/2, or 2**-16 less if all are the other way.
    left, right = np.resize([1, 1, -1], 16), np.append(np.ones(15), -1)
    update = np.append(np.outer(left, right).ravel(), np.zeros(4 * zeros))
    step = 2 / np.sqrt(256 / update.size)  # in rms
    expected = FRAME + stream(bits - 16, 1 / 2 - 2**-16, 1 / 2 + 2**-16)
    assert size(LowRankECSQ(step=step), update, (16, 16), *[(2, 2)] * zeros) == expected
