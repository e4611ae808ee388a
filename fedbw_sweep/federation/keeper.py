"""What a job's next round depends on: handed to the store after a round, and taken back from it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from threading import Lock
from typing import Any, Protocol, runtime_checkable

from flwr.app import RecordDict
from flwr.serverapp import Grid

from fedbw_sweep.compression.feedback import StatefulCompressor
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.errors import DamagedError, FedbwError
from fedbw_sweep.federation.ledger import Entry
from fedbw_sweep.federation.packing import COMPRESSOR, MODEL, pack_state, unpack_state
from fedbw_sweep.federation.rows import Row
from fedbw_sweep.federation.server import Server, connected
from fedbw_sweep.records.checkpoint import LOGS, ROUNDS, UPDATES, Checkpoint, Store
from fedbw_sweep.shutdown import before_end

SHARE = 0.02
"""A state is saved after each round, unless that would take more than this share of the time."""

SERVER, CLIENT = "server", "client-"
"""What the parts of a state are called; a client's with its number."""


Round = tuple[dict[str, Row], dict[str, Row]]
"""Rows of ``rounds.csv`` and of ``timing.csv``, as a job's runs share them, by their methods."""


@runtime_checkable
class StatefulGrid(Protocol):
    """A grid whose clients' states can be read and set between rounds."""

    def hold(self, nodes: Iterable[int]) -> Iterator[tuple[int, RecordDict]]:
        """Yield what clients keep, as it is now, whenever it is read; not those that keep nothing.

        Parameters
        ----------
        nodes : iterable of int
            Their node ids.
        """

    def give(self, node: int, kept: RecordDict) -> None:
        """Let a client have kept something."""


@dataclass(frozen=True)
class _Snapshot:
    """A state that is not written yet: references, no copies."""

    number: int
    whole: bool
    server: dict[str, Any]
    clients: Iterator[tuple[int, RecordDict]]
    changed: set[int]  # clients whose state the store has not

    def trees(self) -> Iterator[tuple[str, Any]]:
        """Yield the parts of the state, one after the other."""
        yield SERVER, self.server
        for client, kept in self.clients:
            if COMPRESSOR in kept.array_records:
                yield f"{CLIENT}{client}", unpack_state(kept.array_records[COMPRESSOR])


class Keeper:
    """Saves the state after a round as often as that costs little, in a thread of its own.

    Parameters
    ----------
    config : RunConfig
        What the job's runs train like.
    server : Server
        Before its first round.
    grid : Grid
        Its clients.
    store : Store or None
        Where states go; None to keep nothing.
    """

    def __init__(self, config: RunConfig, server: Server, grid: Grid, store: Store | None) -> None:
        if store is not None and keeps_state(config) and not isinstance(grid, StatefulGrid):
            store.say(f"no checkpoints: backend={config.backend.name} hides what clients keep")
            store = None
        self.server, self.grid, self.store = server, grid, store
        self.nodes = [] if store is None else connected(grid, config.num_clients)
        self._booked = 0  # entries of each ledger that the store has
        self._changed: set[int] = set()  # clients whose state the store has not
        self._unsaved: _Snapshot | None = None
        self._saving: Future[None] | None = None
        self._turn = Lock()  # a signal has the last round's state saved from another thread
        self._due = 0.0  # on time.monotonic()'s clock
        self._thread = ThreadPoolExecutor(1)
        self._leave = before_end(self._save_unsaved)

    def resume(self) -> list[Round]:
        """Go on from what the store starts from; return the rounds that are over.

        Raises
        ------
        DamagedError
            If it cannot be gone on from; then neither server nor keeper can be used any more.
        """
        if self.store is None or self.store.start is None:
            return []
        start, given = self.store.start, list[int]()
        try:
            lines = [json.loads(line) for line in start.log(ROUNDS).splitlines()]
            for key, books in self.server.exchange.books.items():
                for line in lines:
                    books.ledger.entries += [Entry(**each) for each in line["messages"][key]]
            for client, kept in self._kept(start):
                given.append(client)
                self._give(client, kept)
        except (FedbwError, LookupError, TypeError, ValueError, RuntimeError) as error:
            for client in given:
                self._give(client, RecordDict())
            raise DamagedError(f"{start.folder} cannot be gone on from: {error}") from error
        self._booked = len(self.server.exchange.own.ledger.entries)
        if start.folder != self.store.folder:  # all is new there
            self._changed = set(range(len(self.nodes)))
            for name in LOGS:
                self._append(name, start.log(name))
        return [(line["rows"], line["timings"]) for line in lines]

    def _give(self, client: int, kept: RecordDict) -> None:
        assert isinstance(self.grid, StatefulGrid)  # else nothing is kept where clients do
        self.grid.give(self.nodes[client], kept)

    def _kept(self, start: Checkpoint) -> Iterator[tuple[int, RecordDict]]:
        """Bring the server to where it was, and yield what each client kept."""
        kept = {int(name.removeprefix(CLIENT)) for name in start.trees if name != SERVER}

        def of_method(client: int) -> RecordDict:
            if client not in kept:
                return RecordDict()
            return RecordDict({COMPRESSOR: pack_state(start.tree(f"{CLIENT}{client}"))})

        with_model = set()
        for model, clients in self.server.load(start.tree(SERVER), start.log(UPDATES)):
            for client in clients:
                with_model.add(client)
                both = of_method(client)
                both[MODEL] = pack_state({MODEL: model})
                yield client, both
        for client in sorted(kept - with_model):
            yield client, of_method(client)

    def after(self, number: int, rows: dict[str, Row], timings: dict[str, Row]) -> None:
        """Keep a round that is over: now, or with one of the next."""
        if self.store is None:
            return
        began = time.monotonic()
        exchange = self.server.exchange
        messages = {
            key: [asdict(entry) for entry in books.ledger.entries[self._booked :]]
            for key, books in exchange.books.items()
        }
        self._booked = len(exchange.own.ledger.entries)
        line = {"rows": rows, "timings": timings, "messages": messages}
        self._append(UPDATES, exchange.downlink.made)
        self._append(ROUNDS, f"{json.dumps(line)}\n".encode())
        replied = {report.client for report in exchange.reports[number]}
        with self._turn:
            self._changed |= replied
            changed = set(self._changed)
            server, clients = self.server.state(), self._hold(changed)
            whole = exchange.may_end(number)
            self._unsaved = _Snapshot(number, whole, server, clients, changed)
        busy = self._saving is not None and not self._saving.done()
        if number and not busy and time.monotonic() >= self._due:
            self._save(time.monotonic() - began)

    def _hold(self, clients: Iterable[int]) -> Iterator[tuple[int, RecordDict]]:
        """Return what clients keep, as it is now, whenever it is read."""
        if not isinstance(self.grid, StatefulGrid):
            return iter(())
        client_of = {self.nodes[client]: client for client in sorted(clients)}
        return ((client_of[node], kept) for node, kept in self.grid.hold(client_of))

    def before_step(self) -> None:
        """Let what the next step changes in place be written first, or not at all."""
        if self.store is None or not self.server.server_step.keeps:
            return
        with self._turn:
            self._unsaved = None
        self._wait()

    def flush(self) -> None:
        """Save the state now, before a run's end is recorded, if it is light enough to be kept."""
        self._wait()
        if self.store is not None and (self.store.saved < 0 or self.store.is_kept):
            self._save_unsaved()
        self._unsaved = None

    def close(self) -> None:
        """Save what is not saved, and end the thread."""
        self._save_unsaved()
        self._leave()
        self._thread.shutdown()

    def _save_unsaved(self) -> None:
        self._wait()
        self._save(0.0)
        self._wait()

    def _wait(self) -> None:
        if self._saving is not None:
            self._saving.result()

    def _save(self, seconds: float) -> None:
        """Have the last round's state written, of which so many seconds were spent already."""

        def write(store: Store, state: _Snapshot) -> None:
            began = time.thread_time()
            try:
                store.save(state.number, state.whole, state.trees())
            except Exception as error:  # no run fails for it
                with self._turn:
                    self._changed |= state.changed
                store.complain(error)
            took = seconds + time.thread_time() - began
            self._due = time.monotonic() + took * (1 / SHARE - 1)

        with self._turn:
            state, self._unsaved = self._unsaved, None
            if state is None or self.store is None:
                return
            self._changed = self._changed - state.changed
            self._saving = self._thread.submit(write, self.store, state)

    def _append(self, name: str, data: bytes) -> None:
        def write(store: Store) -> None:
            try:
                store.append(name, data)
            except OSError as error:  # the next one tries again
                store.complain(error)

        if data and self.store is not None:
            self._thread.submit(write, self.store)


def keeps_state(config: RunConfig) -> bool:
    """Whether clients keep something from round to round: a model, a residual, a method's state."""
    stateful = isinstance(config.compression.build(), StatefulCompressor)
    return stateful or config.compression.error_feedback or not config.downlink.codes_weights
