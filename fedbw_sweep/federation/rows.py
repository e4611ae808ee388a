"""What is recorded of a round, and of a run: rows made of the server's ledger and reports."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from fedbw_sweep.cost.prediction import Prediction
from fedbw_sweep.data.weight import TextWeight
from fedbw_sweep.federation.books import Books
from fedbw_sweep.federation.ledger import ClientReport
from fedbw_sweep.federation.server import Server
from fedbw_sweep.model.vector import frozen_parameters, read_frozen, whole_model_bytes

Row = dict[str, Any]

SUMMED = (
    "uplink_bytes",
    "downlink_bytes",
    "uplink_message_bytes",
    "downlink_message_bytes",
    "dense_uplink_bytes",
    "dense_downlink_bytes",
)
"""Columns of ``rounds.csv`` that add up to the run's."""


LOSSES = "loss", "perplexity", "bits_per_byte"
"""Columns of ``rounds.csv`` that an evaluation fills."""


def round_row(
    server: Server,
    books: Books,
    number: int,
    prediction: Prediction | None,
    earlier: Mapping[str, Any],
) -> Row:
    """Make a row of ``rounds.csv``, without a loss.

    Parameters
    ----------
    server : Server
        After the round.
    books : Books
        Of the run's method.
    number : int
        The round; 0 is the initial model.
    prediction : Prediction or None
        The run's.
    earlier : mapping
        The row of the round before; empty in round 0.
    """
    entries = [entry for entry in books.ledger.entries if entry.round == number]
    up = [entry for entry in entries if entry.direction == "uplink"]
    down = [entry for entry in entries if entry.direction == "downlink"]
    uplink, downlink = (sum(entry.payload_bytes for entry in part) for part in (up, down))
    dense, dense_down = (sum(entry.dense_bytes for entry in part) for part in (up, down))
    reports = server.exchange.reports[number]
    return {
        "round": number,
        **dict.fromkeys(LOSSES),
        "train_loss": _mean_train_loss(reports),
        "clients": len(reports),
        "uplink_bytes": uplink,
        "downlink_bytes": downlink,
        "uplink_message_bytes": sum(entry.message_bytes for entry in up),
        "downlink_message_bytes": sum(entry.message_bytes for entry in down),
        "dense_uplink_bytes": dense,
        "dense_downlink_bytes": dense_down,
        "uplink_ratio": dense / uplink if uplink else None,
        "downlink_ratio": dense_down / downlink if downlink else None,
        "predicted_bytes": None if prediction is None else prediction.round_bytes(number),
        "cumulative_uplink_bytes": uplink + earlier.get("cumulative_uplink_bytes", 0),
        "cumulative_bytes": uplink + downlink + earlier.get("cumulative_bytes", 0),
    }


def losses(loss: float, tokens_per_byte: float) -> Row:
    """Return the columns `LOSSES`.

    Parameters
    ----------
    loss : float
        Held-out loss in nats per token.
    tokens_per_byte : float
        Of the held-out text.
    """
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / math.log(2) * tokens_per_byte,
    }


def timing_row(server: Server, books: Books, number: int, seconds: float, evaluating: float) -> Row:
    """Make a row of ``timing.csv``; both durations are wall-clock seconds."""
    reports = server.exchange.reports[number]
    return {
        "round": number,
        "round_seconds": seconds,
        "evaluate_seconds": evaluating,
        "train_seconds": sum(report.train_seconds for report in reports),
        "encode_seconds": books.encode_seconds[number],
        "decode_seconds": books.decode_seconds[number],
    }


def part_rows(books: Books) -> list[Row]:
    """Make the rows of ``parts.csv``."""
    return [
        {"tensor": tensor, "part": part, "bytes": count}
        for (tensor, part), count in books.parts.items()
    ]


def _mean_train_loss(reports: Sequence[ClientReport]) -> float | None:
    trained = [report for report in reports if report.steps]
    examples = sum(report.examples for report in trained)
    return sum(r.examples * r.train_loss for r in trained) / examples if trained else None


def summary(
    server: Server,
    books: Books,
    model: nn.Module,
    prediction: Prediction | None,
    rounds: Sequence[Row],
    weight: TextWeight,
) -> Row:
    """Sum a run up: what it adds to its settings in ``results.csv``.

    Parameters
    ----------
    server : Server
        After the run's last round.
    books : Books
        Of the run's method.
    model : nn.Module
        Whose frozen part is the run's.
    prediction : Prediction or None
        The run's, had it done every round.
    rounds : sequence of dict
        Its rows of ``rounds.csv``.
    weight : TextWeight
        Of its training text.
    """
    layout = server.layout
    totals = {name: sum(row[name] for row in rounds) for name in SUMMED}
    uplink, total = totals["uplink_bytes"], totals["uplink_bytes"] + totals["downlink_bytes"]
    dense, dense_down = totals["dense_uplink_bytes"], totals["dense_downlink_bytes"]
    updates = sum(row["clients"] for row in rounds)
    digest = hashlib.sha256(server.vector.data)
    digest.update(server.exact + read_frozen(model))
    last = [row for row in rounds if row["loss"] is not None][-1]
    made = {
        "clients_per_round": server.config.clients_per_round,
        "model_parameters": layout.size,
        "frozen_parameters": frozen_parameters(model),
        "dense_message_bytes": layout.dense_bytes,
        **totals,
        "total_bytes": total,
        "frozen_bytes": sum(entry.frozen_bytes for entry in books.ledger.entries),
        **asdict(weight),
        "initial_loss": rounds[0]["loss"],
        **{name: last[name] for name in LOSSES},
        "model_hash": digest.hexdigest(),
    }
    if total:
        made["downlink_ratio"] = dense_down / totals["downlink_bytes"]
        made["total_ratio"] = (dense + dense_down) / total
    if updates:
        made["uplink_ratio"] = dense / uplink
        made["whole_model_ratio"] = updates * whole_model_bytes(model) / uplink
        made["bits_per_coordinate"] = 8 * uplink / (updates * layout.size)
    if prediction is not None:
        made["predicted_bytes"] = sum(row["predicted_bytes"] for row in rounds)
        made["prediction"] = prediction.basis
    return made
