"""Runs as any process can do them: a job that is plain data, and sinks for what it measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.errors import DamagedError
from fedbw_sweep.federation.keeper import Keeper
from fedbw_sweep.federation.runs import Evaluations, JobRun, Sink
from fedbw_sweep.federation.server import Server
from fedbw_sweep.federation.shared import federated_text, lent_model
from fedbw_sweep.model.vector import layout_of, read_frozen
from fedbw_sweep.records.checkpoint import Store
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
        return list(_configs(self.runs))

    @property
    def config(self) -> RunConfig:
        """What all of them train like: the run of most rounds.

        Where they differ in their methods, which then are lossless, the one travels that takes
        longest to encode: clients do that at the same time, the server one after the other.
        """
        return _trained(self.runs)


@lru_cache(maxsize=16)
def _configs(runs: tuple[str, ...]) -> tuple[RunConfig, ...]:
    """Parse a job's runs: a worker asks for them with every message."""
    return tuple(RunConfig.model_validate_json(run) for run in runs)


@lru_cache(maxsize=16)
def _trained(runs: tuple[str, ...]) -> RunConfig:
    longest, *others = _configs(runs)
    coded = [c.compression for c in [longest, *others] if not c.compression.build().fixed_size]
    return longest.model_copy(update={"compression": coded[0]}) if coded else longest


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
    config, configs = job.config, job.configs
    text = federated_text(config)
    sizes = text.clients.sequences(config.sequence_length)
    methods = [each.compression for each in configs]
    with lent_model(config) as (model, vector, exact):
        frozen = read_frozen(model) if config.initial_model == "sent" else b""
        layout, may_end = layout_of(model), _may_end(configs)

        def begin() -> tuple[Server, Keeper]:
            server = Server(config, layout, vector, exact, frozen, sizes, may_end, methods)
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
        runs = [JobRun(config, sink) for config, sink in zip(configs, sinks, strict=True)]
        evaluate = Evaluations(runs, model, text, len(frozen), server, keeper, rounds)
        try:
            server.run(grid, evaluate, keeper.before_step)
        except BaseException:
            evaluate.give_up()
            raise
        finally:
            keeper.close()


def _may_end(configs: Sequence[RunConfig]) -> Callable[[int], bool]:
    """Return whether some of the runs may end with a round, by its number."""
    last = {config.rounds for config in configs}
    anywhere = any(config.may_stop for config in configs)
    return lambda number: anywhere or number in last
