"""Runs as any process can do them: a job that is plain data, and sinks for what it measures."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.cost.prediction import predict
from fedbw_sweep.errors import DamagedError, DivergenceError
from fedbw_sweep.federation.keeper import Keeper
from fedbw_sweep.federation.rows import losses, part_rows, round_row, summary, timing_row
from fedbw_sweep.federation.runs import JobRun, Sink, evaluates
from fedbw_sweep.federation.server import Server
from fedbw_sweep.federation.shared import federated_text, initial_loss, lent_model
from fedbw_sweep.model.vector import layout_of, read_frozen, write_arrays
from fedbw_sweep.records.checkpoint import Store
from fedbw_sweep.training.evaluation import heldout_loss
from fedbw_sweep.training.process import prepare_process


@dataclass(frozen=True)
class Job:
    """Runs to do that train the same. It is picklable; each side loads its own text and model.

    Attributes
    ----------
    runs : tuple of str
        Each `RunConfig` as JSON, those of more rounds first.
    """

    runs: tuple[str, ...]

    @classmethod
    def of(cls, *configs: RunConfig) -> Job:
        """Make the job of runs of one trajectory; see `trajectory_of`."""
        ordered = sorted(configs, key=lambda config: -config.rounds)
        return cls(tuple(config.model_dump_json(by_alias=True) for config in ordered))

    @property
    def configs(self) -> list[RunConfig]:
        """The runs, those of more rounds first."""
        return [RunConfig.model_validate_json(run) for run in self.runs]

    @property
    def config(self) -> RunConfig:
        """The run of most rounds: what all of them train like."""
        return RunConfig.model_validate_json(self.runs[0])


LARGEST_LOSS = math.log(sys.float_info.max)
"""Nats per token, about 709.8: its exponential is the largest number that there is."""


def server_app(job: Job, sinks: Sequence[Sink], store: Store | None = None) -> ServerApp:
    """Make the ServerApp that does a job; it may run in this process or in another."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        serve(job, grid, sinks, store)

    return app


def serve(job: Job, grid: Grid, sinks: Sequence[Sink], store: Store | None = None) -> None:
    """Do a job against the clients behind a grid.

    Parameters
    ----------
    job : Job
    grid : Grid
    sinks : sequence of Sink
        One for each of ``job.configs``, in their order.
    store : Store, optional
        Where checkpoints are kept, and gone on from.

    Raises
    ------
    FedbwError
        What `Server.run` raises; what was measured until then is in the sinks of the runs that have
        not ended.
    """
    prepare_process()
    runs = [JobRun(config, sink) for config, sink in zip(job.configs, sinks, strict=True)]
    config = job.config
    text = federated_text(config)
    sizes = text.clients.sequences(config.sequence_length)
    with lent_model(config) as (model, vector, exact):
        frozen = read_frozen(model) if config.initial_model == "sent" else b""
        may_end = _may_end(job.configs)
        layout = layout_of(model)

        def begin() -> tuple[Server, Keeper]:
            server = Server(config, layout, vector, exact, frozen, sizes, may_end)
            return server, Keeper(config, server, grid, store)

        server, keeper = begin()
        try:
            rounds = keeper.resume()
        except DamagedError as error:
            assert store is not None
            store.say(f"{error}; the run starts over")
            store.restart(None)
            keeper.close()
            (server, keeper), rounds = begin(), []
        prediction = predict(config, layout, len(frozen), sizes=sizes)
        started = time.perf_counter()
        evaluated: tuple[Any, float] = None, math.nan

        def measure() -> float:
            write_arrays(model, server.vector, server.exact)
            return heldout_loss(model, text.heldout)

        def measured(number: int) -> dict[str, Any]:
            nonlocal evaluated
            if server.vector is not evaluated[0]:  # else all clients have dropped out since
                loss = measure() if number else initial_loss(config, measure)
                evaluated = server.vector, loss
            loss = evaluated[1]
            if not loss <= LARGEST_LOSS:
                why = f"round {number}: held-out loss is {loss:g}"
                raise DivergenceError(f"{why}, which has no finite perplexity; lower lr")
            return losses(loss, text.heldout_tokens_per_byte)

        def evaluate(number: int, server: Server) -> bool:
            nonlocal started
            under_way = [run for run in runs if run.end is None]
            if is_new := number == len(rounds):
                earlier = rounds[-1][0] if rounds else {}
                row, timing = round_row(server, number, prediction, earlier), None
            else:
                row, timing = rounds[number]
            before = time.perf_counter()
            if row["loss"] is None and any(evaluates(run.config, row) for run in under_way):
                row = {**row, **measured(number)}
            now = time.perf_counter()
            if timing is None:
                timing = timing_row(server, number, now - started, now - before)
            started = now
            if is_new:
                rounds.append((row, timing))
                keeper.after(number, row, timing)
            for run in under_way:
                run.take(row, timing)
            ended = [run for run in under_way if run.end is not None]
            if ended:
                keeper.flush()
            for run in ended:
                finish(run)
            return all(run.end is not None for run in runs)

        def finish(run: JobRun) -> None:
            hand_over(run)
            assert run.end is not None
            run.sink.done(run.end, summary(server, model, prediction, run.rows))

        def hand_over(run: JobRun) -> None:
            for message in server.exchange.ledger.rows():
                run.sink.row("messages", message)
            for part in part_rows(server):
                run.sink.row("parts", part)

        try:
            server.run(grid, evaluate, keeper.before_step)
        except BaseException:
            for run in runs:
                if run.end is None:
                    hand_over(run)
            raise
        finally:
            keeper.close()


def _may_end(configs: Sequence[RunConfig]) -> Any:
    """Return whether some of the runs may end with a round, by its number."""
    last = {config.rounds for config in configs}
    anywhere = any(c.stop_at_loss is not None or c.stop_at_mb is not None for c in configs)
    return lambda number: anywhere or number in last
