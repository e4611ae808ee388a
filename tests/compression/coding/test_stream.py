"""Encoder and decoder: sizes near the entropy, and a decoder that trusts no one."""

from __future__ import annotations

from math import log2

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbw_sweep.compression.coding.decoder import Decoder
from fedbw_sweep.compression.coding.encoder import Encoder
from fedbw_sweep.compression.coding.positions import decode_indices
from fedbw_sweep.compression.coding.tables import MAX_INTEGER, MAX_SYMBOL, exp2, laplace
from fedbw_sweep.errors import PayloadError
from fedbw_sweep.testing import layout_of


def test_powers_of_two_are_exact_integers() -> None:
    # floor(2**(20 + e/32)), so that value**32 <= 2**(640 + e) < (value + 1)**32.
    for e in range(32 * 23 + 1):
        value, shift = int(exp2(np.array([e]))[0]), e >> 5
        value >>= shift
        assert value**32 <= 2 ** (640 + e % 32) < (value + 1) ** 32


def test_differences_have_symmetric_probabilities_that_halve() -> None:
    # slope 5: a step of one level, a full octave, halves the probability.
    encoder = Encoder()
    for step in (0, 1, -1, 2):
        encoder._put(np.full(3200, step + 8), laplace(8, 5))
    # 1 + 2 * (1/2 + 1/4 + ... + 1/256) = 3 - 1/128 shares; |d| = 0, 1, 1, 2 cost 0, 1, 1, 2 bits.
    expected = 3200 * (4 * log2(3 - 1 / 128) + 4) / 8
    assert len(encoder.finish()) == pytest.approx(expected, rel=0.001)


def entropy_bytes(values: np.ndarray) -> float:
    counts = np.unique(values, return_counts=True)[1]
    return float(np.sum(counts * np.log2(values.size / counts))) / 8


@pytest.mark.parametrize("scale", [0.1, 0.3, 1, 3, 10, 40, 100])
@pytest.mark.parametrize("kind", ["laplace", "normal", "exponential"])
@pytest.mark.parametrize("size", [10_001, 20_000, 300_000])
def test_sizes_are_within_one_percent_of_the_entropy(size: int, kind: str, scale: float) -> None:
    draws = getattr(np.random.default_rng(1), kind)(scale=scale, size=size)
    values = np.abs(np.rint(draws)).astype(np.int64)
    # A table has a number for each symbol, and a hundredth of the entropy has to pay for it.
    methods = ("symbols", "integers") if size > 200 * values.max() else ("integers",)
    for method in methods:
        encoder = Encoder()
        getattr(encoder, method)(values)
        data = encoder.finish()
        # Six bytes begin and end a stream, which counts where nearly all symbols are the same.
        assert len(data) <= 1.01 * entropy_bytes(values) + 6
        decoder = Decoder(memoryview(data))
        assert np.array_equal(getattr(decoder, method)(size, int(values.max())), values)
        decoder.finish()


def test_a_table_of_near_uniform_bytes_is_small() -> None:
    values = np.random.default_rng(1).integers(0, 256, 100_000)
    encoder = Encoder()
    encoder.symbols(values)
    assert 100_000 - 100 < len(encoder.finish()) < 100_200


def test_zeros_cost_nothing_and_an_empty_stream_stands_for_them() -> None:
    encoder = Encoder()
    encoder.integers(np.zeros(1000, np.int64), np.arange(1000) % 5)
    assert encoder.finish() == b""
    decoder = Decoder(memoryview(b""))
    assert not decoder.integers(1000, 7, np.arange(1000) % 5).any()
    decoder.finish()


def test_contexts_are_coded_apart() -> None:
    # Two contexts that are each constant cost nothing; together they would cost a bit each.
    contexts = np.random.default_rng(2).integers(0, 2, 80_000)
    encoder = Encoder()
    encoder.integers(contexts * 5, contexts)
    data = encoder.finish()
    assert len(data) < 30
    decoder = Decoder(memoryview(data))
    assert np.array_equal(decoder.integers(80_000, 5, contexts), contexts * 5)


def test_raw_values_cost_their_bits() -> None:
    rng = np.random.default_rng(3)
    encoder = Encoder()
    encoder.bits(rng.integers(0, 2, 8001), 1)
    encoder.bits(rng.integers(0, 1 << 11, 1000), 11)
    encoder.floats(rng.normal(size=100).astype(np.float32))
    encoder.floats(rng.normal(size=100).astype(np.float16))
    encoder.uint(77, 100)
    bits = 8001 + 11_000 + 3200 + 1600 + 7
    assert bits / 8 - 1 <= len(encoder.finish()) <= bits / 8 + 4


@pytest.mark.slow
@given(st.data())
def test_what_goes_in_comes_out(data: st.DataObject) -> None:
    calls = data.draw(
        st.lists(st.sampled_from(["uint", "bits", "floats", "symbols", "integers"]), max_size=6)
    )
    encoder, sent = Encoder(), []
    for call in calls:
        if call == "uint":
            limit = data.draw(st.integers(0, 1 << 40))
            sent.append((limit, data.draw(st.integers(0, limit))))
            encoder.uint(sent[-1][1], limit)
        elif call == "floats":
            floats = data.draw(st.lists(st.floats(width=16, allow_nan=False), max_size=9))
            sent.append((len(floats), np.array(floats, np.float16)))
            encoder.floats(sent[-1][1])
        else:
            top = {"bits": 2**13 - 1, "symbols": MAX_SYMBOL, "integers": MAX_INTEGER}[call]
            limit = data.draw(st.integers(0, top))
            values = np.array(data.draw(st.lists(st.integers(0, limit), max_size=40)), np.int64)
            contexts = np.arange(len(values)) % 3
            sent.append((limit, values))
            if call == "bits":
                encoder.bits(values, 13)
            elif call == "symbols":
                encoder.symbols(values)
            else:
                encoder.integers(values, contexts)
    decoder = Decoder(memoryview(encoder.finish()))
    for call, (bound, value) in zip(calls, sent, strict=True):
        if call == "uint":
            assert decoder.uint(bound) == value
        elif call == "floats":
            assert np.array_equal(decoder.floats(bound, "float16"), value)
        elif call == "bits":
            assert np.array_equal(decoder.bits(len(value), 13), value)
        else:
            contexts = (np.arange(len(value)) % 3,) if call == "integers" else ()
            got = getattr(decoder, call)(len(value), bound, *contexts)
            assert np.array_equal(got, value)
    decoder.finish()


@given(st.binary(max_size=80), st.integers(0, 200))
def test_hostile_bytes_give_bounded_values_or_a_payload_error(data: bytes, limit: int) -> None:
    layout = layout_of((7, 9), (30,), (2, 3, 4))
    reads = (
        lambda d: d.symbols(50, limit),
        lambda d: d.integers(50, limit, np.arange(50) % 4),
        lambda d: np.array([d.uint(limit)]),
        lambda d: decode_indices(d, layout, layout.size)[0],
    )
    for read, top in zip(reads, (limit, limit, limit, layout.size - 1), strict=True):
        try:
            decoder = Decoder(memoryview(data))
            values = read(decoder)
            decoder.finish()
        except PayloadError:
            continue
        assert values.size == 0 or (values.min() >= 0 and values.max() <= top)
        assert len(np.unique(values)) == len(values) or read is not reads[3]


def test_a_stream_that_is_cut_or_extended_is_refused() -> None:
    encoder = Encoder()
    encoder.integers(np.random.default_rng(6).integers(0, 1000, 500))
    data = encoder.finish()
    for damaged in (data[:-1], data[:-4], data[4:], data + b"\1", data + b"\0", data + data):
        with pytest.raises(PayloadError):
            read_integers(damaged)


def read_integers(data: bytes) -> None:
    decoder = Decoder(memoryview(data))
    decoder.integers(500, 1000)
    decoder.finish()
