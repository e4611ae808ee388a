"""The runs of a job: they train the same, and each ends after a round of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.console import MB
from fedbw_sweep.federation.rows import LOSSES, Row
from fedbw_sweep.records.schema import End


class Sink(Protocol):
    """Takes what a run measures, row by row."""

    def row(self, table: str, row: dict[str, Any]) -> End | None:
        """Take a row of ``rounds``, ``timing``, ``messages`` or ``parts``.

        After a row of ``rounds`` that was evaluated, the run ends if the sink says how.
        """

    def done(self, end: End, summary: dict[str, Any]) -> None:
        """Take how the run ended, and the values of ``results.csv``."""


def end_of(config: RunConfig, row: Mapping[str, Any]) -> End | None:
    """Say how a run ends after a round; None if it does not.

    Parameters
    ----------
    config : RunConfig
        The run.
    row : mapping
        Its row of ``rounds.csv``.
    """
    number, loss, sent = row["round"], row["loss"], row["cumulative_bytes"]
    if config.stop_at_loss is not None and loss is not None and loss <= config.stop_at_loss:
        return End("target", f"round {number}: the loss is at most stop_at_loss")
    if config.stop_at_mb is not None and sent >= config.stop_at_mb * MB:
        return End("budget", f"round {number}: {sent:,} B of payload reach stop_at_mb")
    return End("rounds") if number == config.rounds else None


def own_row(config: RunConfig, shared: Mapping[str, Any]) -> Row:
    """Return a run's row of a round: without the loss where the run does not evaluate it."""
    row = dict(shared)
    if not evaluates(config, shared):
        row |= dict.fromkeys(LOSSES)
    return row


def evaluates(config: RunConfig, row: Mapping[str, Any]) -> bool:
    """Whether a run evaluates a round: at intervals, and its last one.

    Parameters
    ----------
    config : RunConfig
        The run.
    row : mapping
        The round's row of ``rounds.csv``, with or without a loss.
    """
    regular = row["round"] % config.evaluate_every == 0
    return regular or end_of(config, {**row, "loss": None}) is not None


class JobRun:
    """One run of a job.

    Attributes
    ----------
    rows : list of dict
        Its rows of ``rounds.csv`` so far.
    end : End or None
        How it ended, once it has.
    """

    def __init__(self, config: RunConfig, sink: Sink) -> None:
        self.config, self.sink = config, sink
        self.rows: list[Row] = []
        self.end: End | None = None

    def take(self, shared: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        """Take a round that the job's runs share, and find out whether this run ends with it."""
        row = own_row(self.config, shared)
        self.rows.append(row)
        self.sink.row("timing", dict(timing))
        end = self.sink.row("rounds", dict(row))
        self.end = end_of(self.config, row) or (end if row["loss"] is not None else None)
