"""Promises that hold for every choice in conf/compression; a new file there is tested unasked."""

from __future__ import annotations

import importlib
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedbw_sweep.compression.base import FRAME, WHOLE, Compressor, all_finite
from fedbw_sweep.compression.feedback import RESIDUAL, State, encode_with_feedback
from fedbw_sweep.compression.layout import FloatVector, Layout, TensorSpec
from fedbw_sweep.errors import DivergenceError, PayloadError

CONF = Path(__file__).parents[2] / "conf" / "compression"
NAMES = sorted(path.stem for path in CONF.glob("*.yaml"))
VARIANTS = [
    *(
        f"{method} values={kind}"
        for method in ("topk", "randk")
        for kind in ("fp16", "int8", "sign")
    ),
    *(f"int{bits} rounding=stochastic" for bits in (8, 4, 2)),
    "topk values=int8 density=1",
    "threshold values=sign",
    "sign scale=row",
    "qsgd levels=1",
    "eden bits=0.25",
    "eden bits=3",
    "sketch counters=1",
    "ecsq step=0.01",
    "ecsq norm_correction=true",
    "lowrank_ecsq norm_correction=true target_nmse=0.3",
    "ecsq target_nmse=0.1",
    "lowrank_ecsq step=0.1",
    "lowrank_ecsq target_bits=1",
]
"""Parameters that take another way through a method than its defaults do."""
every_choice = pytest.mark.parametrize("name", NAMES)
every_method = pytest.mark.parametrize("name", [*NAMES, *VARIANTS])
examples = settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])

FLOAT_MAX = float(np.finfo(np.float32).max)


def read_choice(name: str) -> dict[str, Any]:
    choice = yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))
    assert isinstance(choice, dict)
    return choice


def load_compressor(method: str) -> Compressor:
    """Build a choice of conf/compression, with parameters after its name if any."""
    name, *changed = method.split()
    choice = read_choice(name)
    choice |= {key: yaml.safe_load(value) for key, value in (c.split("=") for c in changed)}
    module, _, cls = choice["_target_"].rpartition(".")
    parameters = {
        key: value
        for key, value in choice.items()
        if key not in ("name", "_target_", "error_feedback")
    }
    compressor = getattr(importlib.import_module(module), cls)(**parameters)
    assert isinstance(compressor, Compressor)
    return compressor


def layout_of(*shapes: tuple[int, ...]) -> Layout:
    return Layout(tuple(TensorSpec(f"t{i}", shape) for i, shape in enumerate(shapes)))


MIXED = layout_of((), (0,), (3,), (17, 5), (0, 4), (8, 8, 3), (1, 7), (7, 1), (130,), (48, 40))
"""A scalar, empty arrays, vectors, matrices narrow and wide, three dimensions."""


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def gaussian(size: int, scale: float = 1e-2, seed: int = 1) -> FloatVector:
    return (scale * generator(seed).standard_normal(size)).astype(np.float32)


def scales_per_tensor() -> FloatVector:
    """Return values of a different magnitude in each tensor of MIXED, from 1e-6 to 1e3."""
    values = gaussian(MIXED.size, 1.0)
    for i, (_, tensor) in enumerate(MIXED.split(values)):
        tensor *= np.float32(10.0 ** (i - 6))
    return values


def full(value: float) -> FloatVector:
    return np.full(MIXED.size, value, np.float32)


def one_spike() -> FloatVector:
    values = full(0.0)
    values[1000] = -0.25
    return values


CASES: dict[str, FloatVector] = {
    "gaussian": gaussian(MIXED.size),
    "zeros": full(0.0),
    "negative zeros": full(-0.0),
    "constant": full(0.1),
    "negative constant": full(-3.0),
    "one spike": one_spike(),
    "subnormal": gaussian(MIXED.size, 1e-40),
    "smallest subnormal": full(1.4e-45),
    "1e30": gaussian(MIXED.size, 1e30),
    "float max": np.copysign(full(FLOAT_MAX), gaussian(MIXED.size)),
    "float max, one sign": full(FLOAT_MAX),
    "1e-38 to 1e38": (10.0 ** generator().uniform(-38, 38, MIXED.size)).astype(np.float32),
    "a scale per tensor": scales_per_tensor(),
    "few distinct values": generator().integers(-2, 3, MIXED.size).astype(np.float32),
}

LAYOUTS: dict[str, Layout] = {
    "no tensors": layout_of(),
    "empty tensors only": layout_of((0,), (3, 0)),
    "integer buffers only": Layout((TensorSpec("steps", (4,), "int64"),)),
    "one scalar": layout_of(()),
    "one element": layout_of((1,)),
    "two elements": layout_of((2,)),
    "one column": layout_of((300, 1)),
    "one row": layout_of((1, 300)),
    "with a buffer": Layout((TensorSpec("w", (9, 9)), TensorSpec("steps", (), "int64"))),
}


def check_decoded(decoded: FloatVector, layout: Layout) -> None:
    assert decoded.shape == (layout.size,)
    assert decoded.dtype == np.float32
    assert all_finite(decoded)


def check_round_trip(compressor: Compressor, update: FloatVector, layout: Layout) -> FloatVector:
    payload = compressor.encode(update, layout, generator())
    assert type(payload) is bytes
    expected = compressor.expected_bytes(layout)
    if compressor.fixed_size:
        assert len(payload) == expected
    else:
        assert expected is None or type(expected) is int
    decoded = compressor.decode(payload, layout)
    check_decoded(decoded, layout)
    parts = compressor.parts(payload, layout)
    assert sum(parts.values()) == len(payload)
    assert {tensor for tensor, _ in parts} <= {t.name for t in layout.floats} | {WHOLE}
    assert {part for tensor, part in parts if tensor == WHOLE} <= {FRAME}
    assert all(type(count) is int and count > 0 for count in parts.values())
    return decoded


def check_hostile(compressor: Compressor, payload: bytes, layout: Layout) -> None:
    try:
        decoded = compressor.decode(payload, layout)
    except PayloadError:
        return
    check_decoded(decoded, layout)


def test_there_are_choices() -> None:
    assert {"none", "fp16", "int8"} <= set(NAMES)


@every_choice
def test_yaml_names_itself_and_states_error_feedback(name: str) -> None:
    choice = read_choice(name)
    assert choice["name"] == name
    assert type(choice["error_feedback"]) is bool


@every_choice
def test_every_parameter_has_a_comment(name: str) -> None:
    for line in (CONF / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith(("#", " ", "name:", "_target_:")):
            assert " # " in line, f"say what this key means and its unit: {line}"


@every_method
@pytest.mark.parametrize("case", CASES)
def test_round_trip_of_values(name: str, case: str) -> None:
    check_round_trip(load_compressor(name), CASES[case], MIXED)


@every_method
@pytest.mark.parametrize("case", LAYOUTS)
def test_round_trip_of_layouts(name: str, case: str) -> None:
    layout = LAYOUTS[case]
    check_round_trip(load_compressor(name), gaussian(layout.size), layout)


@every_method
def test_zeros_decode_to_zeros(name: str) -> None:
    assert not check_round_trip(load_compressor(name), full(0.0), MIXED).any()


@every_method
def test_pure(name: str) -> None:
    compressor, update = load_compressor(name), gaussian(MIXED.size)
    update.flags.writeable = False
    before = update.copy()
    np.random.seed(1)  # noqa: NPY002
    state = np.random.get_state()  # noqa: NPY002
    first = compressor.encode(update, MIXED, generator(5))
    decoded = compressor.decode(first, MIXED)
    for left, right in zip(state, np.random.get_state(), strict=True):  # noqa: NPY002
        np.testing.assert_array_equal(left, right)
    np.random.seed(2)  # noqa: NPY002
    assert load_compressor(name).encode(update, MIXED, generator(5)) == first
    np.testing.assert_array_equal(update, before)
    expected = decoded.copy()
    decoded += 1  # the caller owns it: no cached table may change
    np.testing.assert_array_equal(load_compressor(name).decode(first, MIXED), expected)


@every_method
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_update_is_refused(name: str, bad: float) -> None:
    update = gaussian(MIXED.size)
    update[17] = bad
    compressor = load_compressor(name)
    with pytest.raises(DivergenceError):
        compressor.encode(update, MIXED, generator())
    with pytest.raises(DivergenceError):
        encode_with_feedback(compressor, update, MIXED, generator(), {RESIDUAL: full(0.0)})


@every_method
def test_payload_of_another_layout_is_refused(name: str) -> None:
    compressor = load_compressor(name)
    payload = compressor.encode(gaussian(600), layout_of((600,)), generator())
    for other in (layout_of((601,)), layout_of((30, 20)), layout_of()):
        if other.size == 600 and name == "none":
            continue  # bare floats: nothing but their number to tell
        with pytest.raises(PayloadError):
            compressor.decode(payload, other)


@every_method
def test_payload_of_another_method_is_refused(name: str) -> None:
    payload = load_compressor(name).encode(gaussian(MIXED.size), MIXED, generator())
    for other in NAMES:
        if other != name and load_compressor(other) != load_compressor(name):
            with pytest.raises(PayloadError):
                load_compressor(other).decode(payload, MIXED)


@every_method
@pytest.mark.parametrize("case", ["gaussian", "zeros", "one spike"])
def test_wrong_length(name: str, case: str) -> None:
    compressor = load_compressor(name)
    payload = compressor.encode(CASES[case], MIXED, generator())
    cuts = {0, 1, 4, 5, 8, len(payload) // 2, len(payload) - 2, len(payload) - 1}
    wrong = [payload[:cut] for cut in sorted(cuts) if cut < len(payload)]
    wrong += [payload + b"\x00", payload + b"\xff" * 4, payload + payload]
    for hostile in wrong:
        check_hostile(compressor, hostile, MIXED)
        if compressor.fixed_size:
            with pytest.raises(PayloadError):
                compressor.decode(hostile, MIXED)


def damaged(payload: bytes, rng: np.random.Generator) -> bytes:
    """Return the payload with its frame kept and bits, bytes or stretches of the rest changed."""
    body = np.frombuffer(payload, np.uint8).copy()
    low = min(Compressor.FRAME_BYTES, body.size)
    at = int(rng.integers(low, max(body.size, low + 1)))
    match int(rng.integers(5)):
        case 0:
            body[at : at + 1] ^= np.uint8(1 << rng.integers(8))
        case 1:
            body[at : at + 4] = rng.choice([0, 127, 128, 255])
        case 2:
            body[low:] = rng.integers(0, 256, body.size - low)
        case 3:
            body[low:] = np.roll(body[low:], int(rng.integers(1, 9)))
        case 4:
            body[at:] = rng.choice([0, 255])
    return body.tobytes()


@every_method
def test_damaged_payload(name: str) -> None:
    compressor, rng = load_compressor(name), generator(7)
    for case in ("gaussian", "a scale per tensor", "one spike"):
        payload = compressor.encode(CASES[case], MIXED, generator())
        for _ in range(60):
            check_hostile(compressor, damaged(payload, rng), MIXED)
        # The first bytes are where counts, seeds and scales live.
        for at in range(Compressor.FRAME_BYTES, min(len(payload), 24)):
            for value in (0, 1, 127, 128, 255):
                check_hostile(compressor, payload[:at] + bytes([value]) + payload[at + 1 :], MIXED)


@every_method
def test_damaged_payload_allocates_little(name: str) -> None:
    compressor, rng = load_compressor(name), generator(8)
    payload = compressor.encode(CASES["gaussian"], MIXED, generator())
    hostile = [damaged(payload, rng) for _ in range(20)]
    hostile += [payload[:4] + bytes([255] * 8) + payload[12:], payload[:4] + b"\xff" * 64]
    compressor.decode(payload, MIXED)  # tables made once are not the payload's doing
    tracemalloc.start()
    try:
        for body in hostile:
            check_hostile(compressor, body, MIXED)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20 + 100 * MIXED.size


@every_method
def test_error_feedback_loses_nothing(name: str) -> None:
    compressor = load_compressor(name)
    state: State = {}
    residual = full(0.0)
    sent, total = np.zeros(MIXED.size), np.zeros(MIXED.size)
    for number in range(4):
        update = gaussian(MIXED.size, seed=number)
        kept = {key: value.copy() for key, value in state.items()}
        payload, new_state = encode_with_feedback(
            compressor, update, MIXED, generator(number), state
        )
        for key, value in kept.items():
            np.testing.assert_array_equal(state[key], value)
        decoded = compressor.decode(payload, MIXED)
        new_residual = new_state[RESIDUAL].astype(np.float32)
        largest = max(np.abs(v).max() for v in (update, residual, decoded, new_residual))
        np.testing.assert_allclose(
            update + residual, decoded + new_residual, rtol=0, atol=4e-7 * largest
        )
        sent += decoded
        total += update
        residual, state = new_residual, new_state
    np.testing.assert_allclose(sent + residual, total, atol=1e-5)


@every_method
def test_error_feedback_survives_the_largest_floats(name: str) -> None:
    compressor = load_compressor(name)
    state: State = {}
    for number in range(3):
        payload, state = encode_with_feedback(
            compressor, CASES["float max"], MIXED, generator(number), state
        )
        check_decoded(compressor.decode(payload, MIXED), MIXED)
        assert all_finite(state[RESIDUAL].astype(np.float32))


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
@given(tail=st.binary(max_size=200))
@examples
def test_decoding_anything(name: str, tail: bytes) -> None:
    compressor, layout = load_compressor(name), layout_of((5, 3), (2,))
    frame = compressor.encode(gaussian(layout.size), layout, generator())[: Compressor.FRAME_BYTES]
    check_hostile(compressor, frame + tail, layout)
    check_hostile(compressor, tail, layout)
