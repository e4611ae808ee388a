"""What a run will send, before it does: exact for methods of fixed size, else an estimate."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

from fedbw_sweep.compression.layout import Layout
from fedbw_sweep.config.groups import CompressionConfig
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.config.section import PACKAGE
from fedbw_sweep.cost.downlink import first_messages, update_bytes_sent
from fedbw_sweep.sampling import Numbers

MEASURED_BITS = PACKAGE / "assets" / "bits.csv"
"""Bits per coordinate, measured as by the codec bench.
``python -m tests.cost.test_prediction`` measures them."""


MEASURED_OF = "all", "body", "last_n"
"""Choices of ``trainable`` whose updates are of the kind that was measured: whole blocks."""


OTHER_MODEL = "tiny"
"""The model whose measured bits stand for those of models that were not measured."""


LESSER = {"context", "embedding_step", "norm_correction"}
"""Parameters that change a method's bits by less than half: where no measurement has their value,
one without it stands for it."""

EXACT = "exact"


@dataclass(frozen=True)
class Prediction:
    """A run's payload, by the bandwidth formula.

    Attributes
    ----------
    model_bytes : tuple of int
        Payload of all messages down in each round, without what is frozen.
    update_bytes : int
        Payload of one message up.
    sent, received : tuple of int
        Messages down and up in each round; fewer come up where clients drop out.
    frozen_bytes : tuple of int
        Payload of what is frozen, in all messages down of each round.
    basis : str
        ``exact``, or what an estimate rests on.
    """

    model_bytes: tuple[int, ...]
    update_bytes: int
    sent: tuple[int, ...]
    received: tuple[int, ...]
    frozen_bytes: tuple[int, ...]
    basis: str

    @property
    def mean_model_bytes(self) -> int:
        """Payload of one message down, in the mean over rounds."""
        return round(sum(self.model_bytes) / max(1, sum(self.sent)))

    @property
    def downlink_bytes(self) -> int:
        """Payload bytes, server to clients, all rounds."""
        return sum(self.model_bytes) + sum(self.frozen_bytes)

    @property
    def uplink_bytes(self) -> int:
        """Payload bytes, clients to server, all rounds."""
        return self.update_bytes * sum(self.received)

    @property
    def total_bytes(self) -> int:
        """Payload bytes in both directions.

        *bandwidth = (model sent to the client + update received) x clients x fraction sampled per
        round x rounds*, with the clients and the fraction combined into a whole number.
        """
        return self.downlink_bytes + self.uplink_bytes

    def round_bytes(self, server_round: int) -> int:
        """Payload bytes in both directions of a round; none in round 0."""
        if server_round == 0:
            return 0
        this = server_round - 1
        up = self.received[this] * self.update_bytes
        return self.model_bytes[this] + self.frozen_bytes[this] + up


def predict(
    config: RunConfig,
    layout: Layout,
    frozen_bytes: int = 0,
    recorded: tuple[int, str] | None = None,
    sizes: Numbers | None = None,
) -> Prediction | None:
    """Predict a run's payload from its config and the shapes of what travels.

    Takes no longer for a million clients than for one, and none of the model's weights. Only where
    it matters which clients they are are the run's own cohorts drawn: where some drop out or are
    drawn by their sizes, where what is frozen is sent to each once, and where updates are sent
    down.

    Parameters
    ----------
    config : RunConfig
    layout : Layout
        The arrays that travel.
    frozen_bytes : int
        Payload bytes of what is frozen; they count if first messages carry it.
    recorded : tuple of int and str, optional
        Bytes of one update of such runs, and where they are recorded: the basis of an estimate.
    sizes : ndarray of int64, shape (num_clients,), optional
        Training sequences of each client, where they are known.

    Returns
    -------
    Prediction or None
        None where nothing is known of a method's size, or of which clients a rule samples.
    """
    name = config.model.name
    is_measured = config.trainable.name in MEASURED_OF
    is_update = config.upload == "update"
    up = _payload(config.compression, is_update, is_measured, name, layout, recorded)
    is_update = not config.downlink.codes_weights
    sampler = config.sampler(sizes)
    sends_updates = not config.downlink.codes_weights
    merged = sends_updates and config.downlink.catch_up != "chain"
    step = config.downlink.parameters.get("step") if merged else None

    def size_down(missed: int) -> tuple[int, str] | None:
        """Return what `_payload` does, of an update that makes up for so many rounds' change."""
        downlink = config.downlink
        if step is not None:  # of a round's change, which adds up as what is independent does
            downlink = downlink.model_copy(update={"step": step / math.sqrt(missed)})
        return _payload(downlink, is_update, is_measured, name, layout, None)

    down = size_down(1)
    if up is None or down is None or not sampler.known:
        return None
    sends_frozen = frozen_bytes > 0 and config.initial_model == "sent"
    sent = received = (config.clients_per_round,) * config.rounds
    models, frozen = tuple(n * down[0] for n in sent), (0,) * config.rounds
    if sends_frozen or sends_updates or config.clients.dropout or sampler.rule.needs_sizes:
        cohorts = list(sampler.cohorts(config.rounds))
        sent = tuple(map(len, cohorts))
        received = tuple(len(cohort.replying) for cohort in cohorts)
        models = tuple(n * down[0] for n in sent)
        if sends_updates:
            models = update_bytes_sent(
                config, layout, cohorts, lambda n: (size_down(n) or down)[0] - layout.exact_bytes
            )
        if sends_frozen:
            first = first_messages(config.num_clients, cohorts)
            frozen = tuple(frozen_bytes * n for n in first)
    which = "the way down" if not merged else "the way down, whatever a client has missed"
    if step is not None:
        which = "the way down, at a step finer by the root of the rounds that a client has missed"
    of_the_way_down = down[1] if down[1] == EXACT else f"{down[1]} ({which})"
    basis = "; ".join(dict.fromkeys(b for b in (up[1], of_the_way_down) if b != EXACT)) or EXACT
    return Prediction(models, up[0], sent, received, frozen, basis)


def oversized(config: RunConfig, layout: Layout, frozen_bytes: int) -> list[str]:
    """Say what of a run sends more than it need: an adapter, or a method.

    Parameters
    ----------
    config : RunConfig
    layout : Layout
        The arrays that travel.
    frozen_bytes : int
        Bytes of what is frozen: beside adapters, the whole model.

    Returns
    -------
    list of str
        A sentence with both figures for each.
    """
    dense, said = layout.dense_bytes, []
    if config.trainable.name == "lora" and dense > frozen_bytes:
        said.append(
            f"trainable=lora trains adapters of {dense:,} B, more than the {frozen_bytes:,} B of "
            "the model beside them; lower trainable.rank, or use trainable=all"
        )
    for key, choice in (
        ("compression", config.compression),
        ("compression@downlink", config.downlink),
    ):
        compressor = choice.build(key)
        sent = compressor.expected_bytes(layout) if compressor.fixed_size else None
        if sent is not None and sent + layout.exact_bytes > dense:
            said.append(
                f"{key}={choice.name} sends {sent + layout.exact_bytes:,} B in a message, more "
                f"than the {dense:,} B of the arrays themselves; none sends less"
            )
    return said


def _payload(
    compression: CompressionConfig,
    is_update: bool,
    is_measured: bool,
    model: str,
    layout: Layout,
    recorded: tuple[int, str] | None,
) -> tuple[int, str] | None:
    """Return the bytes of one encoded vector, exact arrays too, and what they are known from."""
    compressor = compression.build()
    expected = compressor.expected_bytes(layout)
    if compressor.fixed_size:
        assert expected is not None
        return expected + layout.exact_bytes, EXACT
    if recorded is not None:
        size, basis = recorded
        return size, f"estimate: {basis}"
    if not is_measured:
        return None
    if is_update and (measured := bits_per_coordinate(compression, model)) is not None:
        bits, basis = measured
        return round(bits * layout.size / 8) + layout.exact_bytes, f"estimate: {basis}"
    if expected is None:
        return None
    return expected + layout.exact_bytes, "estimate: the method's own formula"


def bits_per_coordinate(compression: CompressionConfig, model: str) -> tuple[float, str] | None:
    """Look up what the codec bench measured of a method, between two measurements if need be.

    Parameters
    ----------
    compression : CompressionConfig
        The method; one parameter may lie between or beyond the values that were measured, bits
        are then interpolated (logarithms of both), or those of the nearest.
    model : str
        Name of the model whose update is sent; another's bits stand for one that was not measured.

    Returns
    -------
    bits : float
        Payload bits per coordinate.
    basis : str
        Where that is from.
    """
    own = compression.parameters
    if (target := own.get("target_bits")) is not None:
        return target, "compression.target_bits"
    rows = _measured(compression.name)
    models = {name for name, _, _ in rows}
    measured = model if model in models else OTHER_MODEL
    unlike = {key for key in LESSER & own.keys() if all(p[key] != own[key] for _, p, _ in rows)}
    without = "".join(f", without {key}={own[key]}" for key in sorted(unlike))
    own = {key: value for key, value in own.items() if key not in unlike}
    alike: dict[str, list[tuple[float, float]]] = {}  # by the parameter that differs
    for name, parameters, bits in rows:
        parameters = {key: value for key, value in parameters.items() if key not in unlike}
        if name != measured or parameters.keys() != own.keys():
            continue
        different = [key for key in own if parameters[key] != own[key]]
        if not different:
            basis = f"{bits:.3g} bits per coordinate, measured by the codec bench on {name}"
            return bits, basis + without
        if len(different) == 1:
            [key] = different
            if all(type(value) in (int, float) for value in (own[key], parameters[key])):
                alike.setdefault(key, []).append((math.log(parameters[key]), math.log(bits)))
    if not alike:
        return None
    key, points = max(alike.items(), key=lambda item: len(item[1]))
    bits = _interpolate(math.log(own[key]), sorted(points))
    return bits, (
        f"{bits:.3g} bits per coordinate, from the codec bench on {measured} at other {key}"
        f"{without}"
    )


def _interpolate(x: float, points: list[tuple[float, float]]) -> float:
    """Return ``exp(y)`` at `x` on the line through the two nearest points, or at the last one."""
    left = max((p for p in points if p[0] <= x), default=points[0])
    right = min((p for p in points if p[0] >= x), default=points[-1])
    share = (x - left[0]) / (right[0] - left[0]) if right[0] > left[0] else 0.0
    return math.exp(left[1] + share * (right[1] - left[1]))


@cache
def _measured(choice: str) -> list[tuple[str, dict[str, Any], float]]:
    """Return model, parameters and bits of each measurement of one choice of conf/compression."""
    with MEASURED_BITS.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["method"].split()[0] == choice]
    measured = []
    for row in rows:
        [(_, config)] = CompressionConfig.expand(row["method"])
        measured.append((row["model"], config.parameters, float(row["bits"])))
    return measured
