"""A run as any process can do it: a job that is plain data, and a sink for what it measures."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from typing import Any, Protocol

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.cost.prediction import predict
from fedbw_sweep.errors import DivergenceError
from fedbw_sweep.federation.rows import part_rows, round_row, summary, timing_row
from fedbw_sweep.federation.server import Server
from fedbw_sweep.federation.shared import federated_text, lent_model
from fedbw_sweep.model.vector import layout_of, read_frozen, write_arrays
from fedbw_sweep.records.schema import End
from fedbw_sweep.training.evaluation import heldout_loss
from fedbw_sweep.training.process import prepare_process


@dataclass(frozen=True)
class Job:
    """One run to do. It is picklable; each side loads its own text and model.

    Attributes
    ----------
    run_config : str
        The `RunConfig` as JSON.
    """

    run_config: str

    @classmethod
    def of(cls, config: RunConfig) -> Job:
        """Make a run's job."""
        return cls(config.model_dump_json(by_alias=True))

    @property
    def config(self) -> RunConfig:
        """The run."""
        return RunConfig.model_validate_json(self.run_config)


class Sink(Protocol):
    """Takes what a run measures, row by row."""

    def row(self, table: str, row: dict[str, Any]) -> End | None:
        """Take a row of ``rounds``, ``timing``, ``messages`` or ``parts``.

        After a row of ``rounds`` that was evaluated, the run ends if the sink says how.
        """

    def done(self, end: End, summary: dict[str, Any]) -> None:
        """Take how the run ended, and the values of ``results.csv``."""


LARGEST_LOSS = math.log(sys.float_info.max)
"""Nats per token, about 709.8: its exponential is the largest number that there is."""


def server_app(job: Job, sink: Sink) -> ServerApp:
    """Make the ServerApp that does a job; it may run in this process or in another."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        serve(job, grid, sink)

    return app


def serve(job: Job, grid: Grid, sink: Sink) -> None:
    """Do a job against the clients behind a grid.

    Raises
    ------
    FedbwError
        What `Server.run` raises; what was measured until then is in the sink.
    """
    prepare_process()
    config = job.config
    text = federated_text(config)
    sizes = text.clients.sequences(config.sequence_length)
    with lent_model(config) as (model, vector, exact):
        frozen = read_frozen(model) if config.initial_model == "sent" else b""
        server = Server(config, layout_of(model), vector, exact, frozen, sizes)
        prediction = predict(config, server.layout, len(frozen), sizes=sizes)
        rounds: list[dict[str, Any]] = []
        started = time.perf_counter()

        def evaluate(number: int, server: Server) -> End | None:
            nonlocal started
            before, loss = time.perf_counter(), None
            if number % config.evaluate_every == 0 or number == config.rounds:
                write_arrays(model, server.vector, server.exact)
                loss = heldout_loss(model, text.heldout)
                if not loss <= LARGEST_LOSS:
                    why = f"round {number}: held-out loss is {loss:g}"
                    raise DivergenceError(f"{why}, which has no finite perplexity; lower lr")
            now = time.perf_counter()
            earlier = rounds[-1] if rounds else {}
            tokens_per_byte = text.heldout_tokens_per_byte
            row = round_row(server, number, loss, tokens_per_byte, prediction, earlier)
            rounds.append(row)
            sink.row("timing", timing_row(server, number, now - started, now - before))
            started = now
            end = sink.row("rounds", row)
            return end if loss is not None else None

        try:
            end = server.run(grid, evaluate)
        finally:
            for message in server.exchange.ledger.rows():
                sink.row("messages", message)
            for part in part_rows(server):
                sink.row("parts", part)
        sink.done(end, summary(server, model, prediction, rounds))
