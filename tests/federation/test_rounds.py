"""The round loop: it can start at any round, be ended by an evaluation, and skip evaluations."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
from flwr.supercore.task_identity import TaskIdentity

from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.federation.client import client_app
from fedbw_sweep.federation.job import Job, serve
from fedbw_sweep.federation.packing import MODEL, unpack_state
from fedbw_sweep.federation.server import Server
from fedbw_sweep.federation.shared import federated_text
from fedbw_sweep.model.trainable import build_trainable
from fedbw_sweep.model.vector import layout_of, read_arrays
from fedbw_sweep.records.schema import End
from fedbw_sweep.training.process import prepare_process
from tests.conftest import SMALL
from tests.local import LocalGrid

pytestmark = pytest.mark.slow

Build = Callable[..., RunConfig]


class Rows:
    """A sink that keeps everything, and ends the run after a round if it is told so."""

    def __init__(self, last: int | None = None) -> None:
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self.last, self.end = last, End("failed")

    def row(self, table: str, row: dict[str, Any]) -> End | None:
        self.tables.setdefault(table, []).append(row)
        enough = table == "rounds" and row["round"] == self.last
        return End("target", "it is enough") if enough else None

    def done(self, end: End, summary: dict[str, Any]) -> None:
        self.end, self.summary = end, summary


def grid_of(job: Job) -> LocalGrid:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 0, 1
    return LocalGrid(job.config.num_clients, client_app(job), random.Random(0), lambda reply: reply)


def server_of(config: RunConfig) -> Server:
    prepare_process()
    model = build_trainable(config.model, config.trainable, config.seed)
    sizes = federated_text(config).clients.sequences(config.sequence_length)
    return Server(config, layout_of(model), *read_arrays(model), b"", sizes)


@pytest.mark.parametrize(
    "settings",
    [
        ("compression=topk", "server=diloco", "sampling=by_size"),
        ("compression=lowrank", "compression@downlink=int8", "downlink.error_feedback=true",
         "server=fedyogi", "clients.dropout=0.3"),
        ("compression=lowrank_ecsq", "compression@downlink=lowrank", "server=fedavgm"),
    ],
    ids=["topk", "lowrank", "lowrank_ecsq"],
)  # fmt: skip
def test_a_server_goes_on_at_any_round(run_config: Build, settings: tuple[str, ...]) -> None:
    """Stopped after two rounds, its state pickled, a new server does the others alike."""
    config = run_config(*SMALL, "rounds=4", *settings)
    job = Job.of(config)
    whole, grid = server_of(config), grid_of(job)
    whole.run(grid, lambda number, server: False)
    assert whole.finished == 4
    first, grid, made = server_of(config), grid_of(job), [b""]

    def second_round(number: int, server: Server) -> bool:
        made.append(server.exchange.downlink.made if number > 1 else b"")
        return number == 2

    first.run(grid, second_round)
    assert first.finished == 2
    second = server_of(config)
    state = pickle.loads(pickle.dumps(first.state()))
    nodes = sorted(grid.get_node_ids())
    for model, clients in second.load(state, b"".join(made)):
        for client in clients:
            held = grid.contexts[nodes[client]].state.array_records[MODEL]
            assert unpack_state(held)[MODEL].tobytes() == model.tobytes()
    second.run(grid, lambda number, server: False)
    assert second.vector.tobytes() == whole.vector.tobytes() != first.vector.tobytes()
    late = [row for row in whole.exchange.own.ledger.rows() if int(row["round"]) > 2]
    assert list(second.exchange.own.ledger.rows()) == late


def test_a_job_is_plain_data_that_any_process_can_do(run_config: Build) -> None:
    job = Job.of(run_config(*SMALL))
    copy = pickle.loads(pickle.dumps(job))
    assert copy == job
    assert len(pickle.dumps(job)) < 10_000, "it carries no text and no model"
    rows = [Rows(), Rows()]
    for each, sink in zip((job, copy), rows, strict=True):
        serve(each, grid_of(each), [sink])
    assert rows[0].summary == rows[1].summary
    assert rows[0].end == End("rounds")


def test_an_evaluation_may_end_a_run(run_config: Build) -> None:
    job = Job.of(run_config(*SMALL, "rounds=3"))
    sink, whole = Rows(last=1), Rows()
    serve(job, grid_of(job), [sink])
    serve(job, grid_of(job), [whole])
    assert sink.end == End("target", "it is enough")
    assert sink.tables["rounds"] == whole.tables["rounds"][:2]
    assert sink.summary["loss"] == whole.tables["rounds"][1]["loss"]
    assert sink.summary["uplink_bytes"] == whole.tables["rounds"][1]["cumulative_uplink_bytes"]


def test_evaluations_are_spared_and_change_nothing_else(run_config: Build) -> None:
    every, third = Rows(), Rows()
    for sink, overrides in ((every, ()), (third, ("evaluate_every=3",))):
        job = Job.of(run_config(*SMALL, "rounds=4", *overrides))
        serve(job, grid_of(job), [sink])
    losses = [row["loss"] for row in third.tables["rounds"]]
    assert [loss is not None for loss in losses] == [True, False, False, True, True]
    blank = {"loss": None, "perplexity": None, "bits_per_byte": None}
    for row, other in zip(every.tables["rounds"], third.tables["rounds"], strict=True):
        assert other == (row if other["loss"] is not None else {**row, **blank})
    assert every.summary == third.summary
