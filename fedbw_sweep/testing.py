"""The contract of a compressor as checks to run on your own: ``check_compressor(MyCompressor)``."""

from __future__ import annotations

import traceback
import tracemalloc
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedbw_sweep.compression.base import FRAME, NOTHING_KNOWN, WHOLE, Compressor, Known, all_finite
from fedbw_sweep.compression.cast import Dense, Float16
from fedbw_sweep.compression.feedback import RESIDUAL, State, encode_with_feedback
from fedbw_sweep.compression.layout import FloatVector, Layout, TensorSpec
from fedbw_sweep.compression.sign import Sign
from fedbw_sweep.compression.sparse import TopK
from fedbw_sweep.errors import DivergenceError, PayloadError

Factory = Callable[[], Compressor]
"""Makes the compressor anew, with the same parameters each time."""

OTHERS = Dense(), Float16(), Sign(), TopK()
"""Methods whose payloads another one refuses."""


class ContractError(AssertionError):
    """A compressor breaks the contract; the message has a line for each check that fails."""


def check_compressor(factory: Factory) -> None:
    """Run every check of the contract on a compressor, as scikit-learn's ``check_estimator`` does.

    It takes a few seconds and needs no test framework. The promises are those of `Compressor`:
    payloads are complete, pure and refused when damaged, special values and empty arrays work, and
    error feedback loses nothing.

    Parameters
    ----------
    factory : callable
        Makes the compressor: its class, or a ``functools.partial`` of it with parameters.

    Raises
    ------
    ContractError
        If any check fails: a line for each one, with its reason.
    """
    made = factory()
    _require(isinstance(made, Compressor), f"{made!r} is not a Compressor")
    failures = []
    for name, check in CHECKS.items():
        try:
            check(factory)
        except Exception as error:  # whatever a method raises is what is wrong with it
            failures.append(f"{name}: {_in_one_line(error)}")
    _require(
        not failures,
        "\n".join([f"{made!r} fails {len(failures)} of {len(CHECKS)} checks:", *failures]),
    )


def _in_one_line(error: Exception) -> str:
    """Say what went wrong and, if it was no check that said so, where."""
    text = " ".join(str(error).split())
    if isinstance(error, ContractError):
        return text
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({Path(frame.filename).name}, line {frame.lineno})"


def _require(condition: object, why: str) -> None:
    """Fail also where Python runs with -O, which leaves out ``assert``."""
    if not condition:
        raise ContractError(why)


def _refuses(kind: type[Exception], what: str, call: Callable[..., object], *args: Any) -> None:
    try:
        call(*args)
    except kind:
        return
    raise ContractError(f"{what} must raise {kind.__name__}")


def layout_of(*shapes: tuple[int, ...]) -> Layout:
    """Return a layout of float32 arrays ``t0``, ``t1``, ... of these shapes."""
    return Layout(tuple(TensorSpec(f"t{i}", shape) for i, shape in enumerate(shapes)))


MIXED = Layout(
    (
        *layout_of((), (0,), (3,), (17, 5), (0, 4), (8, 8, 3), (1, 7), (7, 1), (130,)).tensors,
        TensorSpec("t9", (48, 40), tokens=True),
    )
)
"""A scalar, empty arrays, vectors, matrices narrow and wide, three dimensions, an embedding."""

FLOAT_MAX = float(np.finfo(np.float32).max)


def generator(seed: int = 0) -> np.random.Generator:
    """Return a generator of a fixed seed."""
    return np.random.default_rng(seed)


def gaussian(size: int, scale: float = 1e-2, seed: int = 1) -> FloatVector:
    """Draw what resembles an update."""
    return (scale * generator(seed).standard_normal(size)).astype(np.float32)


def full(value: float) -> FloatVector:
    """Return an update of `MIXED` that is the same everywhere."""
    return np.full(MIXED.size, value, np.float32)


def _scales_per_tensor() -> FloatVector:
    """Return values of a different magnitude in each tensor of MIXED, from 1e-6 to 1e3."""
    values = gaussian(MIXED.size, 1.0)
    for i, (_, tensor) in enumerate(MIXED.split(values)):
        tensor *= np.float32(10.0 ** (i - 6))
    return values


CASES: Mapping[str, FloatVector] = {
    "gaussian": gaussian(MIXED.size),
    "zeros": full(0.0),
    "negative zeros": full(-0.0),
    "constant": full(0.1),
    "negative constant": full(-3.0),
    "one spike": np.where(np.arange(MIXED.size) == 1000, -0.25, 0).astype(np.float32),
    "subnormal": gaussian(MIXED.size, 1e-40),
    "smallest subnormal": full(1.4e-45),
    "1e30": gaussian(MIXED.size, 1e30),
    "float max": np.copysign(full(FLOAT_MAX), gaussian(MIXED.size)),
    "float max, one sign": full(FLOAT_MAX),
    "1e-38 to 1e38": (10.0 ** generator().uniform(-38, 38, MIXED.size)).astype(np.float32),
    "a scale per tensor": _scales_per_tensor(),
    "few distinct values": generator().integers(-2, 3, MIXED.size).astype(np.float32),
}
"""Updates of `MIXED`."""

LAYOUTS: Mapping[str, Layout] = {
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
    """Check the shape, the type and the values of what was decoded."""
    _require(decoded.shape == (layout.size,), f"decoded to shape {decoded.shape}")
    _require(decoded.dtype == np.float32, f"decoded to {decoded.dtype}")
    _require(all_finite(decoded), "decoded to NaN or infinity")


def check_round_trip(
    compressor: Compressor, update: FloatVector, layout: Layout, known: Known = NOTHING_KNOWN
) -> FloatVector:
    """Check a payload, its size, its decoding and the account of its bytes; return the decoded."""
    payload = compressor.encode(update, layout, generator(), known)
    _require(type(payload) is bytes, f"encoded to {type(payload).__name__}, not to bytes")
    expected = compressor.expected_bytes(layout)
    if compressor.fixed_size:
        _require(
            len(payload) == expected,
            f"fixed_size, but expected_bytes is {expected} of a payload of {len(payload)} bytes",
        )
    _require(
        expected is None or type(expected) is int, f"expected_bytes is {expected!r}, not an int"
    )
    decoded = compressor.decode(payload, layout, known)
    check_decoded(decoded, layout)
    parts = compressor.parts(payload, layout, known)
    _require(
        sum(parts.values()) == len(payload)
        and all(type(count) is int and count > 0 for count in parts.values())
        and {tensor for tensor, _ in parts} <= {t.name for t in layout.floats} | {WHOLE}
        and {part for tensor, part in parts if tensor == WHOLE} <= {FRAME},
        f"parts does not account for a payload of {len(payload)} bytes: {dict(parts)}",
    )
    return decoded


def check_hostile(compressor: Compressor, payload: bytes, layout: Layout) -> None:
    """Check that a payload of anybody's is decoded to a finite update or refused."""
    try:
        decoded = compressor.decode(payload, layout)
    except PayloadError:
        return
    check_decoded(decoded, layout)


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


def _round_trip(update: FloatVector, layout: Layout, make: Factory) -> None:
    check_round_trip(make(), update, layout)


def _round_trip_with_what_is_known(make: Factory) -> None:
    update = gaussian(MIXED.size)
    known = Known(gaussian(MIXED.size, seed=2), gaussian(MIXED.size, seed=3))
    check_round_trip(make(), update, MIXED, known)
    if make().uses:
        payload = make().encode(update, MIXED, generator(), known)
        what = f"decoding from another model ({', '.join(make().uses)})"
        other = Known(gaussian(MIXED.size, seed=4), gaussian(MIXED.size, seed=5))
        _refuses(PayloadError, what, make().decode, payload, MIXED, other)


def _zeros(make: Factory) -> None:
    decoded = check_round_trip(make(), full(0.0), MIXED)
    _require(not decoded.any(), "zeros do not decode to zeros")


def _made_anew(make: Factory) -> None:
    _require(make() == make(), "two made alike are not equal: it must be a frozen dataclass")


def _pure(make: Factory) -> None:
    update = gaussian(MIXED.size)
    update.flags.writeable = False
    before = update.copy()
    np.random.seed(1)  # noqa: NPY002
    state = np.random.get_state()  # noqa: NPY002
    first = make().encode(update, MIXED, generator(5))
    decoded = make().decode(first, MIXED)
    for left, right in zip(state, np.random.get_state(), strict=True):  # noqa: NPY002
        _require(np.array_equal(left, right), "it draws from NumPy's global generator")
    np.random.seed(2)  # noqa: NPY002
    again = make().encode(update, MIXED, generator(5))
    _require(again == first, "the same update and generator give other bytes the second time")
    _require(np.array_equal(update, before), "encode changes the update")
    expected = decoded.copy()
    decoded += 1
    _require(
        np.array_equal(make().decode(first, MIXED), expected),
        "decoding twice differs, or what is decoded is not the caller's own to change",
    )


def _non_finite(bad: float, make: Factory) -> None:
    update = gaussian(MIXED.size)
    update[17] = bad
    _refuses(DivergenceError, f"an update with {bad}", make().encode, update, MIXED, generator())
    state: State = {RESIDUAL: full(0.0)}
    arguments = make(), update, MIXED, generator(), state
    _refuses(DivergenceError, f"error feedback with {bad}", encode_with_feedback, *arguments)


def _another_layout(make: Factory) -> None:
    payload = make().encode(gaussian(600), layout_of((600,)), generator())
    for other in (layout_of((601,)), layout_of((30, 20)), layout_of()):
        if other.size == 600 and isinstance(make(), Dense):
            continue  # bare floats: nothing but their number to tell
        what = f"a payload of 600 coordinates decoded as {[t.shape for t in other.tensors]}"
        _refuses(PayloadError, what, make().decode, payload, other)


def _another_method(make: Factory) -> None:
    update = gaussian(MIXED.size)
    for other in OTHERS:
        if other == make():
            continue
        own = make().encode(update, MIXED, generator())
        _refuses(PayloadError, f"its payload in {other!r}", other.decode, own, MIXED)
        foreign = other.encode(update, MIXED, generator())
        _refuses(PayloadError, f"the payload of {other!r}", make().decode, foreign, MIXED)


def _wrong_length(case: str, make: Factory) -> None:
    compressor = make()
    payload = compressor.encode(CASES[case], MIXED, generator())
    cuts = {0, 1, 4, 5, 8, len(payload) // 2, len(payload) - 2, len(payload) - 1}
    wrong = [payload[:cut] for cut in sorted(cuts) if 0 <= cut < len(payload)]
    wrong += [payload + b"\x00", payload + b"\xff" * 4, payload + payload]
    for hostile in wrong:
        check_hostile(compressor, hostile, MIXED)
        if compressor.fixed_size:
            what = f"{len(hostile)} bytes in place of {len(payload)}"
            _refuses(PayloadError, what, compressor.decode, hostile, MIXED)


def _damaged(case: str, make: Factory) -> None:
    compressor, rng = make(), generator(7)
    payload = compressor.encode(CASES[case], MIXED, generator())
    for _ in range(60):
        check_hostile(compressor, damaged(payload, rng), MIXED)
    # The first bytes are where counts, seeds and scales live.
    for at in range(Compressor.FRAME_BYTES, min(len(payload), 24)):
        for value in (0, 1, 127, 128, 255):
            check_hostile(compressor, payload[:at] + bytes([value]) + payload[at + 1 :], MIXED)


def _anything(make: Factory) -> None:
    compressor, layout, rng = make(), layout_of((5, 3), (2,)), generator(9)
    payload = compressor.encode(gaussian(layout.size), layout, generator())
    for length in range(200):
        check_hostile(compressor, payload[: Compressor.FRAME_BYTES] + rng.bytes(length), layout)
        check_hostile(compressor, rng.bytes(length), layout)


def _allocates_little(make: Factory) -> None:
    compressor, rng = make(), generator(8)
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
    allowed = 2**20 + 100 * MIXED.size
    _require(peak < allowed, f"a damaged payload allocates {peak:,} bytes, {allowed:,} are allowed")


def _feedback_loses_nothing(make: Factory) -> None:
    compressor, state = make(), State()
    residual = full(0.0)
    sent, total = np.zeros(MIXED.size), np.zeros(MIXED.size)
    for number in range(4):
        update = gaussian(MIXED.size, seed=number)
        kept = {key: value.copy() for key, value in state.items()}
        rng = generator(number)
        payload, new_state = encode_with_feedback(compressor, update, MIXED, rng, state)
        same = all(np.array_equal(state[key], value) for key, value in kept.items())
        _require(same, "error feedback changes the state that it was given")
        decoded = compressor.decode(payload, MIXED)
        new_residual = new_state[RESIDUAL].astype(np.float32)
        largest = max(np.abs(v).max() for v in (update, residual, decoded, new_residual))
        lost = np.abs((update + residual) - (decoded + new_residual)).max()
        _require(lost <= 4e-7 * largest, f"error feedback loses {lost:.2g} in round {number}")
        sent += decoded
        total += update
        residual, state = new_residual, new_state
    lost = np.abs(sent + residual - total).max()
    _require(lost <= 1e-5 * (1 + np.abs(total).max()), f"error feedback loses {lost:.2g} in all")


def _feedback_of_the_largest(make: Factory) -> None:
    compressor, state = make(), State()
    for number in range(3):
        update, rng = CASES["float max"], generator(number)
        payload, state = encode_with_feedback(compressor, update, MIXED, rng, state)
        check_decoded(compressor.decode(payload, MIXED), MIXED)
        _require(all_finite(state[RESIDUAL].astype(np.float32)), "the residual is not finite")


TRUNCATED = "gaussian", "zeros", "one spike"
DAMAGED = "gaussian", "a scale per tensor", "one spike"

Check = Callable[[Factory], None]

CHECKS: Mapping[str, Check] = {
    "made anew": _made_anew,
    **{f"round trip of {case}": partial(_round_trip, CASES[case], MIXED) for case in CASES},
    **{
        f"round trip of {case}": partial(_round_trip, gaussian(layout.size), layout)
        for case, layout in LAYOUTS.items()
    },
    "round trip with what is known": _round_trip_with_what_is_known,
    "zeros decode to zeros": _zeros,
    "pure": _pure,
    **{f"{bad} is refused": partial(_non_finite, bad) for bad in (np.nan, np.inf, -np.inf)},
    "a payload of another layout is refused": _another_layout,
    "payloads of other methods are refused": _another_method,
    **{
        f"wrong length of {c}": partial(_wrong_length, c)
        for c in ("gaussian", "zeros", "one spike")
    },
    **{f"damaged payload of {case}": partial(_damaged, case) for case in DAMAGED},
    "any bytes": _anything,
    "a damaged payload allocates little": _allocates_little,
    "error feedback loses nothing": _feedback_loses_nothing,
    "error feedback survives the largest floats": _feedback_of_the_largest,
}
"""Every check by what it says of a compressor."""
