"""What a run will send, before it does: exact for methods of fixed size, else an estimate."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fedbw_sweep.compression.layout import Layout
from fedbw_sweep.config import CompressionConfig, RunConfig
from fedbw_sweep.federated.downlink import expected_update_bytes, update_bytes_sent
from fedbw_sweep.seeding import dropped_out
from fedbw_sweep.theory import first_messages

MEASURED_BITS = Path(__file__).parent / "shipped" / "bits.csv"
"""Bits per coordinate, measured as by the codec bench; ``python -m tests.test_prediction`` does."""

OTHER_MODEL = "tiny"
"""The model whose measured bits stand for those of models that were not measured."""

EXACT = "exact"


@dataclass(frozen=True)
class Prediction:
    """A run's payload, by the seed's formula.

    Attributes
    ----------
    model_bytes : tuple of int
        Payload of all messages down in each round, without what is frozen.
    update_bytes : int
        Payload of one message up.
    clients_per_round : int
        Messages down in each round.
    updates_received : int
        Messages up in all rounds; fewer than down where clients drop out.
    frozen_bytes : tuple of int
        Payload of what is frozen, in all messages down of each round.
    basis : str
        ``exact``, or what an estimate rests on.
    """

    model_bytes: tuple[int, ...]
    update_bytes: int
    clients_per_round: int
    updates_received: int
    frozen_bytes: tuple[int, ...]
    basis: str

    @property
    def models_sent(self) -> int:
        """Messages down in all rounds."""
        return self.clients_per_round * len(self.model_bytes)

    @property
    def mean_model_bytes(self) -> int:
        """Payload of one message down, in the mean over rounds."""
        return round(sum(self.model_bytes) / max(1, self.models_sent))

    @property
    def downlink_bytes(self) -> int:
        """Payload bytes, server to clients, all rounds."""
        return sum(self.model_bytes) + sum(self.frozen_bytes)

    @property
    def uplink_bytes(self) -> int:
        """Payload bytes, clients to server, all rounds."""
        return self.update_bytes * self.updates_received

    @property
    def total_bytes(self) -> int:
        """Payload bytes in both directions.

        *bandwidth = (model sent to the client + update received) x clients x fraction sampled per
        round x rounds*, with the clients and the fraction combined into a whole number.
        """
        return self.downlink_bytes + self.uplink_bytes

    def round_bytes(self, server_round: int, updates: int) -> int:
        """Payload bytes in both directions of a round with so many messages up."""
        if server_round == 0:
            return 0
        this = server_round - 1
        return self.model_bytes[this] + self.frozen_bytes[this] + updates * self.update_bytes


def predict(
    config: RunConfig,
    layout: Layout,
    frozen_bytes: int = 0,
    recorded: tuple[int, str] | None = None,
) -> Prediction | None:
    """Predict a run's payload from its config and the shapes of what travels.

    Takes no longer for a million clients than for one, and none of the model's weights. Only where
    it matters which clients they are are the run's own draws made: where some drop out, where what
    is frozen is sent to each once, and where updates of fixed size are sent down.

    Parameters
    ----------
    config : RunConfig
    layout : Layout
        The arrays that travel.
    frozen_bytes : int
        Payload bytes of what is frozen; they count if first messages carry it.
    recorded : tuple of int and str, optional
        Bytes of one update of such runs, and where they are recorded: the basis of an estimate.

    Returns
    -------
    Prediction or None
        None where nothing is known of a method's size.
    """
    name = config.model.name
    up = _payload(config.compression, config.upload == "update", name, layout, recorded)
    down = _payload(config.downlink, not config.downlink.codes_weights, name, layout, None)
    if up is None or down is None:
        return None
    sampled, dropout = config.clients_per_round, config.clients.dropout
    models = (sampled * down[0],) * config.rounds
    of_the_way_down = down[1] if down[1] == EXACT else f"{down[1]} (the way down)"
    if not config.downlink.codes_weights:
        update = down[0] - layout.exact_bytes
        if down[1] == EXACT:
            models = tuple(update_bytes_sent(config, layout, update))
        else:
            mean = expected_update_bytes(config, layout, update)
            models = tuple(sampled * each for each in mean)
            of_the_way_down += ", sent to clients that have missed rounds in the mean"
    lost = sum(
        int(dropped_out(config.seed, server_round, sampled, dropout).sum())
        for server_round in range(1, config.rounds + 1 if dropout else 1)
    )
    frozen = (0,) * config.rounds
    if frozen_bytes and config.initial_model == "sent":
        first = first_messages(config.seed, config.num_clients, sampled, config.rounds, dropout)
        frozen = tuple((frozen_bytes * first).tolist())
    basis = "; ".join(dict.fromkeys(b for b in (up[1], of_the_way_down) if b != EXACT)) or EXACT
    return Prediction(models, up[0], sampled, sampled * config.rounds - lost, frozen, basis)


def _payload(
    compression: CompressionConfig,
    is_update: bool,
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
    alike: dict[str, list[tuple[float, float]]] = {}  # by the parameter that differs
    for name, parameters, bits in rows:
        if name != measured or parameters.keys() != own.keys():
            continue
        different = [key for key in own if parameters[key] != own[key]]
        if not different:
            return bits, f"{bits:.3g} bits per coordinate, measured by the codec bench on {name}"
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
