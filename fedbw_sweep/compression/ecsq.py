"""Entropy-coded scalar quantisation: one step for the whole update, and a dead zone.

One step for all arrays is reverse water-filling: arrays (and rows) that moved little spend few
bits or none, and the error is what it should be everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import frexp, inf, ldexp, log2, sqrt
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedbw_sweep.compression.base import NOTHING_KNOWN, Compressor, Known
from fedbw_sweep.compression.coding.decoder import Decoder
from fedbw_sweep.compression.coding.encoder import Encoder
from fedbw_sweep.compression.dither import DITHERED_ERROR
from fedbw_sweep.compression.exact import PER_OCTAVE, exp2
from fedbw_sweep.compression.layout import FloatVector, Ints, Layout
from fedbw_sweep.compression.quantiser import SLOPE
from fedbw_sweep.compression.rows import Rows, add_levels, put_levels
from fedbw_sweep.errors import ConfigError, PayloadError

_STEP_CODES = 1 << 16
_SEEDS = 1 << 32
_STEPS = 1e-5, 1e5  # the finest and coarsest step that a target is sought between, in rms
_ATTEMPTS = 12
_TOLERANCE = 0.003  # octaves of the target that may be left unused
_PRICE_OCTAVES = (
    0.04  # octaves by which the price of bits rate_differences between one step's code and the next
)
_CLOSE = 1 / 16  # codes nearer than this are as good as one

_MOST_GAIN = 16  # steps of a sixteenth of an octave: twofold, up or down

Attempt = Callable[[float], tuple[bytes, float]]


def _step(code: int) -> float:
    """Return the step of a 16-bit code: 128 to the octave, over the range of float32 and more."""
    return float(exp2(code - 256 * PER_OCTAVE))


def _step_code(step: float) -> int:
    return min(_STEP_CODES - 1, max(0, round((log2(step) + 256) * PER_OCTAVE)))


def _gain_codes(values: FloatVector, lost: FloatVector, layout: Layout) -> Ints:
    """Return, for each array, the gain at which its decoded values are as far along as it is."""
    starts = np.cumsum(layout.sizes) - layout.sizes
    energy = np.add.reduceat(np.square(values, dtype=np.float64), starts)
    along = energy - np.add.reduceat(np.multiply(values, lost, dtype=np.float64), starts)
    # Nothing to scale where nothing is sent.
    sent = along > 1e-6 * energy
    octaves = np.log2(np.divide(energy, along, out=np.ones_like(energy), where=sent))
    codes: Ints = np.rint(_MOST_GAIN * np.clip(octaves, -1, 1)).astype(np.int64) + _MOST_GAIN
    return codes


def _gains(codes: NDArray[np.integer[Any]]) -> FloatVector:
    return exp2((codes.astype(np.int64) - _MOST_GAIN) * (PER_OCTAVE // _MOST_GAIN)).astype(
        np.float32
    )


def _energy(values: FloatVector) -> float:
    return float(np.einsum("i,i->", values, values, dtype=np.float64))


def _number(key: str, value: object, low: float, high: float, allowed: str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high:  # type: ignore[operator]
        raise ConfigError(key, value, allowed)


@dataclass(frozen=True)
class ECSQ(Compressor):
    """Entropy-coded scalar quantisation with one step and a dead zone (Sullivan 1996).

    Parameters
    ----------
    step : float
        Width of the quantiser's bins, in units of the update's root mean square.
    target_bits : float, optional
        Choose the finest step whose payload is at most so many bits a coordinate.
    target_nmse : float, optional
        Choose the coarsest step with ``|x - x'|**2 <= target_nmse * |x|**2``. With either target
        `step` is not used, and levels are chosen by what each will cost; encoding takes ten times
        as long.
    norm_correction : bool
        Whether the decoder multiplies each array by ``|x|**2 / <x, x'>`` (at most twofold), so that
        what is left out of it does not slow it down. As EDEN's scale (Vargaftik et al. 2022, arXiv
        2108.08842): the error of one update grows from d to nearly ``d / (1 - d)`` of it, and that
        of training falls.
    embedding_step : float
        The step of arrays with a row for each token, as a share of `step`. On the way down, an
        error there costs several times the loss of an equal one elsewhere. Not with `target_nmse`.
    dither : bool
        Whether values are rounded with subtractive dither (see `compression.dither`), without a
        dead zone: the method is then unbiased, and its squared error is that of the step, ``step**2
        / 12`` of the update's. It pays where the mean of hundreds of clients is what counts.
    """

    step: float = 1.0
    target_bits: float | None = None
    target_nmse: float | None = None
    norm_correction: bool = False
    embedding_step: float = 1.0
    dither: bool = False

    def __post_init__(self) -> None:
        _number("step", self.step, 1e-4, 1e4, "a number from 0.0001 to 10000, in rms of the update")
        if self.target_bits is not None:
            allowed = "from 0.0001 to 20 bits a coordinate, or null"
            _number("target_bits", self.target_bits, 1e-4, 20, allowed)
        if self.target_nmse is not None:
            _number("target_nmse", self.target_nmse, 1e-8, 1, "from 1e-8 to 1, or null")
            if self.target_bits is not None:
                raise ConfigError("target_nmse", self.target_nmse, "null when target_bits is set")
        allowed = "a number from 0.01 to 1, 1 when target_nmse is set"
        least = 0.01 if self.target_nmse is None else 1.0
        _number("embedding_step", self.embedding_step, least, 1, allowed)
        if not isinstance(self.norm_correction, bool):
            raise ConfigError("norm_correction", self.norm_correction, "true or false")
        if not isinstance(self.dither, bool):
            raise ConfigError("dither", self.dither, "true or false")
        if self.dither and self.norm_correction:
            raise ConfigError("dither", True, "false when norm_correction is true")

    _price: ClassVar[float] = 1.4 * SLOPE
    """Error that a bit is worth on the way to a target, in squared steps: found by trying."""

    @property
    def unbiased(self) -> bool:
        """With dither."""
        return self.dither

    @property
    def expands(self) -> bool:
        """With dither, at a coarse step."""
        return self.dither and not self._to_target and self.step**2 * DITHERED_ERROR >= 1

    @property
    def _to_target(self) -> bool:
        """Whether few bits are worth more time."""
        return self.target_bits is not None or self.target_nmse is not None

    def _encode(
        self, update: FloatVector, layout: Layout, rng: np.random.Generator, known: Known
    ) -> bytes:
        energy = _energy(update)
        if energy == 0:
            return b""
        rms, rows = sqrt(energy / update.size), Rows(layout)
        half = ldexp(1.0, frexp(rms)[1] // 2)  # in two steps, of which none leaves float32
        unit = update * np.float32(1 / half)
        unit *= np.float32(half / rms)
        self._scale_embeddings(unit, layout, 1 / self.embedding_step)
        prepared = self._prepare(unit, layout, rng, known)
        seed = int(rng.integers(_SEEDS)) if self.dither else None
        rated = self._to_target and not self.dither
        measured = self.norm_correction or self.target_nmse is not None

        def attempt(code: float) -> tuple[bytes, float]:
            below = int(code)
            price = self._price * 2 ** (_PRICE_OCTAVES * (code - below)) if rated else None
            encoder = Encoder()
            encoder.uint(below, _STEP_CODES - 1)
            if seed is not None:
                encoder.uint(seed, _SEEDS - 1)
            scale = rms / _step(below)
            values = unit * np.float32(scale)
            self._put(encoder, values, scale, prepared, layout, price)
            put_levels(encoder, values, rows, measured, price, seed)
            if self.norm_correction:
                whole = unit * np.float32(scale)
                codes = _gain_codes(whole, values, layout)
                encoder.integers(codes)
                gains = np.repeat(_gains(codes), layout.sizes)
                values -= (whole - values) * (gains - 1)
            error = _energy(values) if measured else 0.0
            return encoder.finish(), error / (scale**2 * update.size)

        if not self._to_target:
            return attempt(_step_code(self.step * rms))[0]
        return self._search(attempt, rms, update.size)

    def encode_in_units(
        self,
        update: FloatVector,
        layout: Layout,
        rng: np.random.Generator,
        unit: float,
        known: Known = NOTHING_KNOWN,
    ) -> bytes:
        """See `ScaledCompressor`. A target of bits is not changed by the unit."""
        share = unit / (sqrt(_energy(update) / max(1, update.size)) or unit)  # of the update's rms
        nmse = self.target_nmse and min(1.0, max(1e-8, self.target_nmse * share**2))
        own = replace(self, step=min(1e4, max(1e-4, self.step * share)), target_nmse=nmse)
        payload = own.encode(update, layout, rng, known)
        return self._frame(layout, self._used(known, layout)) + payload[self.FRAME_BYTES :]

    def _search(self, attempt: Attempt, rms: float, size: int) -> bytes:
        """Return the payload that meets the target most closely, by safeguarded secant steps."""
        low, high = (float(_step_code(step * rms)) for step in _STEPS)
        code, slope, closest, best = float(_step_code(rms)), 1.0 / PER_OCTAVE, -inf, b""
        last: tuple[float, float] | None = None
        for _ in range(_ATTEMPTS):
            payload, nmse = attempt(code)
            bits = 8 * (len(payload) + self.FRAME_BYTES) / size
            # How far beyond the target, in octaves: met at 0 and below.
            ratio = nmse / self.target_nmse if self.target_nmse else bits / (self.target_bits or 1)
            over = log2(max(ratio, 1e-12))
            if closest < over <= 0:
                closest, best = over, payload
            if -_TOLERANCE < over <= 0:
                break
            growing = over if self.target_nmse else -over  # with the step
            low, high = (code, high) if growing < 0 else (low, code)
            if high - low <= _CLOSE:
                break
            if last:
                slope = max(0.1 / PER_OCTAVE, (growing - last[1]) / (code - last[0]))
            last = code, growing
            aim = code - (growing + (1 if self.target_nmse else -1) * _TOLERANCE / 2) / slope
            code = aim if low < aim < high else (low + high) / 2
        if not best and self.target_nmse:
            return attempt(low)[0]
        return best  # empty if even the coarsest step takes too many bits: it stands for zeros

    def _put(
        self,
        encoder: Encoder,
        values: FloatVector,
        scale: float,
        prepared: Any,
        layout: Layout,
        price: float | None,
    ) -> None:
        """Add what precedes the quantised rows, and subtract it from `values`, in steps."""

    def _get(self, decoder: Decoder, layout: Layout, known: Known) -> FloatVector:
        """Read what `_put` added, in steps."""
        return np.zeros(layout.size, np.float32)

    def _prepare(
        self, unit: FloatVector, layout: Layout, rng: np.random.Generator, known: Known
    ) -> Any:
        """Compute what `_put` needs at every step, from the update at an rms of 1."""

    def _decode(self, body: memoryview, layout: Layout, known: Known) -> FloatVector:
        if not body:
            return np.zeros(layout.size, np.float32)
        if not layout.size:
            raise PayloadError("the layout has no coordinates, but the payload has")
        decoder = Decoder(body)
        step = _step(decoder.uint(_STEP_CODES - 1))
        seed = decoder.uint(_SEEDS - 1) if self.dither else None
        update = self._get(decoder, layout, known)
        add_levels(decoder, update, layout, seed)
        if self.norm_correction:
            once = np.ones(len(layout.filled), np.int64)
            codes = decoder.integers(len(once), 2 * _MOST_GAIN, None, "tables", once)
            update *= np.repeat(_gains(codes), layout.sizes)
        decoder.finish()
        with np.errstate(over="ignore"):  # rounding up may leave the range of float32
            np.multiply(update, step, out=update, dtype=np.float64, casting="same_kind")
        limit = np.finfo(np.float32).max
        np.clip(update, -limit, limit, out=update)
        self._scale_embeddings(update, layout, self.embedding_step)
        return update

    def _scale_embeddings(self, vector: FloatVector, layout: Layout, factor: float) -> None:
        """Multiply the arrays that have a row for each token, in place."""
        if factor != 1:
            for tensor, array in layout.split(vector):
                if tensor.tokens:
                    array *= np.float32(factor)
