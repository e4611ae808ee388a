"""Promises that hold for every choice in conf/compression; a new file there is tested unasked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedbw_sweep.compression.base import Compressor, Known, floats_from
from fedbw_sweep.compression.cast import Dense
from fedbw_sweep.compression.layout import FloatVector, Layout
from fedbw_sweep.config.groups import CompressionConfig
from fedbw_sweep.config.section import CONF
from fedbw_sweep.errors import PayloadError
from fedbw_sweep.testing import (
    CHECKS,
    FLOAT_MAX,
    MIXED,
    ContractError,
    check_compressor,
    check_hostile,
    check_round_trip,
    gaussian,
    generator,
    layout_of,
)

CHOICES = CONF / "compression"
NAMES = sorted(path.stem for path in CHOICES.glob("*.yaml"))
VARIANTS = [
    *(
        f"{method} values={kind}"
        for method in ("topk", "randk")
        for kind in ("fp16", "int8", "sign")
    ),
    *(f"int{bits} rounding=stochastic" for bits in (8, 4, 2)),
    "topk values=int8 density=1",
    "topk values=2bit",
    "threshold values=sign",
    "sign scale=row",
    "qsgd levels=1",
    "eden bits=0.25",
    "eden bits=3",
    "sketch counters=1",
    "ecsq step=0.01",
    "ecsq norm_correction=true",
    "ecsq dither=true error_feedback=false",
    "ecsq embedding_step=0.1",
    "lowrank_ecsq embedding_step=0.25 norm_correction=true",
    "lowrank_ecsq norm_correction=true target_nmse=0.3",
    "ecsq target_nmse=0.1",
    "lowrank_ecsq step=0.1",
    "lowrank_ecsq target_bits=1",
    "lowrank_ecsq dither=true target_nmse=0.1",
    "lowrank_ecsq context=received",
]
"""Parameters that take another way through a method than its defaults do."""
every_choice = pytest.mark.parametrize("name", NAMES)
every_method = pytest.mark.parametrize(
    "name", [*NAMES, *(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS)]
)
examples = settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])


def read_choice(name: str) -> dict[str, Any]:
    choice = yaml.safe_load((CHOICES / f"{name}.yaml").read_text(encoding="utf-8"))
    assert isinstance(choice, dict)
    return choice


def load_compressor(method: str) -> Compressor:
    """Build a choice of conf/compression, with parameters after its name if any."""
    [(_, choice)] = CompressionConfig.expand(method)
    return choice.build()


def test_there_are_choices() -> None:
    assert {"none", "fp16", "int8"} <= set(NAMES)


@every_choice
def test_yaml_names_itself_and_states_error_feedback(name: str) -> None:
    choice = read_choice(name)
    assert choice["name"] == name
    assert type(choice["error_feedback"]) is bool


@every_choice
def test_every_parameter_has_a_comment(name: str) -> None:
    for line in (CHOICES / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith(("#", " ", "name:", "_target_:")):
            assert " # " in line, f"say what this key means and its unit: {line}"


@every_method
@pytest.mark.parametrize("check", CHECKS)
def test_contract(name: str, check: str) -> None:
    CHECKS[check](partial(load_compressor, name))


@every_method
def test_payload_of_another_choice_is_refused(name: str) -> None:
    payload = load_compressor(name).encode(gaussian(MIXED.size), MIXED, generator())
    for other in NAMES:
        if other != name and load_compressor(other) != load_compressor(name):
            with pytest.raises(PayloadError):
                load_compressor(other).decode(payload, MIXED)


shapes = st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), max_size=4)
floats = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-1, 1, width=32),
    st.sampled_from([0.0, -0.0, 1.0, FLOAT_MAX, 1e-45]),
)


@every_method
@given(data=st.data())
@examples
def test_round_trip_of_anything(name: str, data: st.DataObject) -> None:
    layout = layout_of(*data.draw(shapes))
    pool = data.draw(st.lists(floats, min_size=1, max_size=20))
    values = generator(data.draw(st.integers(0, 99))).choice(pool, layout.size)
    check_round_trip(load_compressor(name), values.astype(np.float32), layout)


@every_method
def test_lossless_is_said_of_what_changes_no_bit(name: str) -> None:
    compressor = load_compressor(name)
    update = np.concatenate([gaussian(MIXED.size - 3), np.float32([-0.0, 1e-42, 1e30])])
    decoded = compressor.decode(compressor.encode(update, MIXED, generator()), MIXED)
    assert compressor.lossless == (decoded.tobytes() == update.tobytes())


@every_method
def test_unbiased_is_said_of_what_is_right_on_average(name: str) -> None:
    compressor, draws = load_compressor(name), 100
    if not compressor.unbiased or "values=sign" in name:  # whose magnitudes are all one
        return
    layout = layout_of((30, 40), (300,))
    update = gaussian(layout.size)
    decoded = [
        compressor.decode(compressor.encode(update, layout, generator(seed)), layout)
        for seed in range(draws)
    ]
    variance = np.var(decoded, axis=0, ddof=1, dtype=np.float64).sum() / draws
    error = np.square(np.mean(decoded, axis=0, dtype=np.float64) - update).sum()
    assert error < 1.2 * variance + 1e-6 * np.square(update).sum()


@every_method
@given(tail=st.binary(max_size=200))
@examples
def test_decoding_anything(name: str, tail: bytes) -> None:
    compressor, layout = load_compressor(name), layout_of((5, 3), (2,))
    payload = compressor.encode(gaussian(layout.size), layout, generator())
    check_hostile(compressor, payload[: Compressor.FRAME_BYTES] + tail, layout)
    check_hostile(compressor, tail, layout)


def test_check_compressor_passes_what_keeps_the_contract() -> None:
    check_compressor(Dense)


@dataclass(frozen=True)
class _Broken(Compressor):
    """Float32, but it may break one promise: the one that `how` names."""

    how: str = ""
    fixed_size = True

    def expected_bytes(self, layout: Layout) -> int:
        return 4 + 4 * layout.size + (self.how == "size")

    def _encode(
        self, update: FloatVector, layout: Layout, rng: np.random.Generator, known: Known
    ) -> bytes:
        if self.how == "impure":
            np.random.standard_normal()  # noqa: NPY002
        if self.how == "zeros":
            return (update + np.float32(1e-30)).tobytes()
        if self.how == "changes" and update.flags.writeable:
            update += 1
        if self.how == "empty":
            update[0] = 0
        return update.tobytes()

    def _decode(self, body: memoryview, layout: Layout, known: Known) -> FloatVector:
        if self.how == "hostile":
            return np.array(np.frombuffer(body, "<f4"))
        if self.how == "greedy":
            np.ones(10**6)
        values = floats_from(body, layout.size, "<f4").astype(np.float32)
        return values * np.float32(0.5) if self.how == "loses" and layout.size > 600 else values


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("size", "round trip of gaussian: fixed_size, but expected_bytes is"),
        ("impure", "pure: it draws from NumPy's global generator"),
        ("zeros", "zeros decode to zeros: zeros do not decode to zeros"),
        ("empty", "round trip of no tensors: IndexError: index 0 is out of bounds for axis 0"),
        ("hostile", "wrong length of gaussian: "),
        ("greedy", "a damaged payload allocates little: a damaged payload allocates "),
    ],
)
def test_check_compressor_says_what_fails_in_a_line_each(how: str, line: str) -> None:
    check_compressor(_Broken)
    with pytest.raises(ContractError) as caught:
        check_compressor(partial(_Broken, how))
    first, *failures = str(caught.value).splitlines()
    assert first == f"_Broken(how={how!r}) fails {len(failures)} of {len(CHECKS)} checks:"
    assert [failure for failure in failures if failure.startswith(line)]
    assert {failure.partition(": ")[0] for failure in failures} <= set(CHECKS)


def test_check_compressor_refuses_what_is_no_compressor() -> None:
    with pytest.raises(ContractError, match="is not a Compressor"):
        check_compressor(dict)  # type: ignore[arg-type]
