"""A short run of the fuzzer, and of what it stands on: its limits are ones that a bomb breaks."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedbw_sweep.compression.base import Compressor, Known
from fedbw_sweep.compression.layout import FloatVector, Layout
from fedbw_sweep.compression.sparse import TopK
from fedbw_sweep.errors import PayloadError
from fedbw_sweep.testing import gaussian, generator, layout_of

from .fuzz import Tally, memory_limit, methods, one_thread, read_tally, time_limit, write_tally
from .test_contract import load_compressor


class Greedy(TopK):
    """A decoder that reserves eight bytes a coordinate, three times."""

    def _decode(self, body: memoryview, layout: Layout, known: Known) -> FloatVector:
        reserved = np.zeros((3, layout.size))
        return reserved[0].astype(np.float32)


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    with one_thread():
        yield
    tracemalloc.stop()


@pytest.mark.slow
def test_a_few_thousand_payloads_stay_within_the_limits(traced: None) -> None:
    tally, quick = Tally(), {n: m for n, m in methods().items() if "target" not in n}
    for _ in range(3):
        tally.round(0, quick)
    assert tally.payloads == 3 * 20 * len(quick)
    assert set(tally.outcomes) == {"decoded", "refused"}


BOMBS = {
    "topk density=0.01": "topk density=1",
    "threshold": "topk density=1",
    "randk density=0.5": "randk density=0.1",
    "lossless": "lossless",
    "ecsq": "ecsq step=0.0001",
    "lowrank_ecsq": "lowrank_ecsq step=0.01",
    "ecsq dither=true": "ecsq step=0.0001 dither=true",
    "lowrank_ecsq context=received": "lowrank_ecsq step=0.01 context=received",
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("shape", [(500, 600), (300_000, 1), (2, 150_000)], ids=str)
def test_what_another_parameter_would_send_takes_little(
    name: str, shape: tuple[int, ...], traced: None
) -> None:
    method, layout, update = load_compressor(name), layout_of(shape), gaussian(300_000)
    known = Known(gaussian(300_000, seed=2), gaussian(300_000, seed=3))
    body = load_compressor(BOMBS[name]).encode(update, layout, generator(), known)
    frame = method.encode(update, layout, generator(), known)[: Compressor.FRAME_BYTES]
    Tally().throw(method, frame + body[Compressor.FRAME_BYTES :], layout, known)


def test_a_decoder_that_takes_too_much_is_found(traced: None) -> None:
    layout = layout_of((600, 500))
    payload = Greedy().encode(gaussian(layout.size), layout, generator())
    with pytest.raises(AssertionError, match="bytes, of"):
        Tally().throw(Greedy(), payload, layout)


def test_limits_grow_with_the_layout() -> None:
    small, large = layout_of((10,)), layout_of((1_000_010,))
    assert memory_limit(b"", large) - memory_limit(b"", small) == 12_000_000
    assert time_limit(large) - time_limit(small) == pytest.approx(0.5)


def test_a_payload_longer_than_any_is_refused() -> None:
    method, layout = load_compressor("lossless"), layout_of((10,))
    payload = method.encode(gaussian(10), layout, generator()) + b"\1" * 100_000
    with pytest.raises(PayloadError, match="more than any method needs"):
        method.decode(payload, layout)


@pytest.mark.slow
def test_a_storm_goes_on_where_it_stopped(tmp_path: Path, traced: None) -> None:
    codecs = {"int8": load_compressor("int8"), "topk": load_compressor("topk")}
    whole = Tally()
    for _ in range(4):
        whole.round(3, codecs)
    for _ in range(4):
        tally = read_tally(tmp_path / "state.json")
        tally.round(3, codecs)
        write_tally(tmp_path / "state.json", tally)
    resumed = read_tally(tmp_path / "state.json")
    assert (resumed.rounds, resumed.outcomes) == (whole.rounds, whole.outcomes)
