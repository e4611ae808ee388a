"""The runs of a job: they train the same, and each ends after a round of its own."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from fedbw_sweep.compression.layout import FloatVector
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.console import MB
from fedbw_sweep.cost.prediction import Prediction, predict
from fedbw_sweep.data.tokens import FederatedText
from fedbw_sweep.errors import DivergenceError
from fedbw_sweep.federation.books import Books, books_key
from fedbw_sweep.federation.keeper import Keeper, Round
from fedbw_sweep.federation.rows import (
    LOSSES,
    Row,
    losses,
    part_rows,
    round_row,
    summary,
    timing_row,
)
from fedbw_sweep.federation.server import Server
from fedbw_sweep.federation.shared import initial_loss, text_weight
from fedbw_sweep.model.vector import write_arrays
from fedbw_sweep.records.schema import End
from fedbw_sweep.shutdown import await_end
from fedbw_sweep.training.evaluation import heldout_loss

LARGEST_LOSS = math.log(sys.float_info.max)
"""Nats per token, about 709.8: its exponential is the largest number that there is."""


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
    key : str
        Names the books of its method.
    rows : list of dict
        Its rows of ``rounds.csv`` so far.
    end : End or None
        How it ended, once it has.
    """

    def __init__(self, config: RunConfig, sink: Sink) -> None:
        self.config, self.sink = config, sink
        self.key = books_key(config.compression)
        self.rows: list[Row] = []
        self.end: End | None = None

    def take(self, shared: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        """Take a round that the job's runs share, and find out whether this run ends with it."""
        row = own_row(self.config, shared)
        self.rows.append(row)
        self.sink.row("timing", dict(timing))
        end = self.sink.row("rounds", dict(row))
        self.end = end_of(self.config, row) or (end if row["loss"] is not None else None)

    def hand_over(self, books: Books) -> None:
        """Hand on what was counted for the run."""
        for message in books.ledger.rows():
            self.sink.row("messages", message)
        for part in part_rows(books):
            self.sink.row("parts", part)


class Evaluations:
    """Evaluates the rounds that a job's runs share, and lets each run end where it ends.

    Parameters
    ----------
    runs : sequence of JobRun
    model : nn.Module
        Overwritten with each model that is evaluated.
    text : FederatedText
    frozen_bytes : int
        Of what is frozen, if first messages carry it.
    server : Server
    keeper : Keeper
    rounds : sequence of Round
        Those that are over.
    """

    def __init__(
        self,
        runs: Sequence[JobRun],
        model: nn.Module,
        text: FederatedText,
        frozen_bytes: int,
        server: Server,
        keeper: Keeper,
        rounds: Sequence[Round],
    ) -> None:
        self.runs, self.model, self.text = runs, model, text
        self.server, self.keeper, self.rounds = server, keeper, list(rounds)
        sizes = server.sampler.sizes
        self.predictions: dict[str, Prediction | None] = {}
        for run in runs:  # those of more rounds first
            if run.key not in self.predictions:
                method = {"compression": run.config.compression}
                config = server.config.model_copy(update=method)
                prediction = predict(config, server.layout, frozen_bytes, sizes=sizes)
                self.predictions[run.key] = prediction
        self.started = time.perf_counter()
        self.evaluated: tuple[FloatVector | None, float] = None, math.nan

    @property
    def under_way(self) -> list[JobRun]:
        """The runs that have not ended."""
        return [run for run in self.runs if run.end is None]

    def __call__(self, number: int, server: Server) -> bool:
        """Evaluate the model after a round, if a run does; say whether all runs have ended.

        Raises
        ------
        DivergenceError
            If the loss is not finite, or has no finite perplexity.
        """
        under_way, is_new = self.under_way, number == len(self.rounds)
        rows, timings = (self._rows(number), {}) if is_new else self.rounds[number]
        began = time.perf_counter()
        if any(
            rows[run.key]["loss"] is None and evaluates(run.config, rows[run.key])
            for run in under_way
        ):
            measured = self._measured(number)
            rows = {key: {**row, **measured} for key, row in rows.items()}
        now = time.perf_counter()
        if is_new:
            await_end()  # a round that is told of after a signal may be saved no more
            spent = now - self.started, now - began
            timings = {
                key: timing_row(server, books, number, *spent)
                for key, books in server.exchange.books.items()
            }
            self.rounds.append((rows, timings))
            self.keeper.after(number, rows, timings)
        self.started = now
        for run in under_way:
            run.take(rows[run.key], timings[run.key])
        ended = [run for run in under_way if run.end is not None]
        if ended:
            self.keeper.flush()
        for run in ended:
            self._finish(run)
        return not self.under_way

    def _rows(self, number: int) -> dict[str, Row]:
        earlier = self.rounds[-1][0] if self.rounds else {}
        return {
            key: round_row(self.server, books, number, self.predictions[key], earlier.get(key, {}))
            for key, books in self.server.exchange.books.items()
        }

    def _measured(self, number: int) -> Row:
        vector = self.server.vector
        if vector is not self.evaluated[0]:  # else all clients have dropped out since
            loss = self._loss() if number else initial_loss(self.server.config, self._loss)
            self.evaluated = vector, loss
        loss = self.evaluated[1]
        if not loss <= LARGEST_LOSS:
            why = f"round {number}: held-out loss is {loss:g}"
            raise DivergenceError(f"{why}, which has no finite perplexity; lower lr")
        return losses(loss, self.text.heldout_tokens_per_byte)

    def _loss(self) -> float:
        write_arrays(self.model, self.server.vector, self.server.exact)
        return heldout_loss(self.model, self.text.heldout)

    def _finish(self, run: JobRun) -> None:
        assert run.end is not None
        books = self.server.exchange.books[run.key]
        run.hand_over(books)
        prediction, weight = self.predictions[run.key], text_weight(run.config)
        summed = summary(self.server, books, self.model, prediction, run.rows, weight)
        run.sink.done(run.end, summed)

    def give_up(self) -> None:
        """Hand on what was counted for the runs that have not ended."""
        for run in self.under_way:
            run.hand_over(self.server.exchange.books[run.key])
