"""Federated averaging, round by round (McMahan et al. 2017, arXiv:1602.05629, Algorithm 1)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flwr.serverapp import Grid

from fedbw_sweep.compression.base import all_finite
from fedbw_sweep.compression.layout import FloatVector, Layout
from fedbw_sweep.config.groups import CompressionConfig
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.errors import ClientError, DivergenceError
from fedbw_sweep.federation.average import WeightedMean
from fedbw_sweep.federation.exchange import Exchange, in_order
from fedbw_sweep.federation.optimizers import ServerStep
from fedbw_sweep.sampling import Numbers

CONNECT_S = 60.0
"""Seconds that clients have to connect."""

Evaluate = Callable[[int, "Server"], bool]
"""Evaluates and records the global model after a round; says whether to end there."""


class Server:
    """Samples clients, sends them the model, averages what they reply, and steps.

    Flower numbers its nodes at random and lists them in any order, so clients are numbered by the
    sorted node ids, and their replies are summed in the order of these numbers, each as soon as
    those before it are.

    Parameters
    ----------
    config : RunConfig
        The run.
    layout : Layout
        The arrays that travel.
    vector : ndarray of float32, shape (layout.size,)
        The initial model.
    exact : bytes
        Its arrays that are not floating point.
    frozen : bytes
        The frozen arrays, for the first message to each client; empty if clients have them.
    sizes : ndarray of int64, shape (num_clients,)
        Training sequences of each client.
    may_end : callable
        Whether a run may end with a round; unless it is given, with the last one alone.
    methods : sequence of CompressionConfig
        Those of the job's runs, if they are others than the config's.
    """

    def __init__(
        self,
        config: RunConfig,
        layout: Layout,
        vector: FloatVector,
        exact: bytes,
        frozen: bytes,
        sizes: Numbers,
        may_end: Callable[[int], bool] | None = None,
        methods: Sequence[CompressionConfig] = (),
    ) -> None:
        self.config, self.layout = config, layout
        self.vector, self.exact = vector, exact
        self.sampler = config.sampler(sizes)
        may_end = may_end or config.rounds.__eq__
        self.exchange = Exchange(config, layout, frozen, vector, may_end, methods)
        self.server_step = ServerStep(config.server)
        self.finished = 0  # the last round that is over; 0 is the initial model

    def run(
        self, grid: Grid, evaluate: Evaluate, before_step: Callable[[], None] = lambda: None
    ) -> None:
        """Do the rounds that are left, each evaluated after its step.

        Rounds that are over are evaluated again, which costs nothing where they are recorded.

        Parameters
        ----------
        grid : Grid
            The clients.
        evaluate : callable
            See `Evaluate`.
        before_step : callable
            Called before what `state` returned changes in place.

        Raises
        ------
        ClientError
            If a client failed or did not answer in time; see also `connected`.
        MeteringError
            If a client counted other bytes than the server.
        DivergenceError
            If a model is not finite.
        """
        nodes = connected(grid, self.config.num_clients)
        for number in range(self.config.rounds + 1):
            if number > self.finished:
                self._train(number, grid, nodes, before_step)
                self.finished = number
            if evaluate(number, self):
                return

    def _train(
        self, number: int, grid: Grid, nodes: list[int], before_step: Callable[[], None]
    ) -> None:
        cohort = self.sampler.cohort(number)
        messages = self.exchange.instruct(number, cohort, nodes, self.vector, self.exact)
        replies = grid.send_and_receive(messages, timeout=self.config.backend.client_timeout_s)
        mean = WeightedMean(self.layout.size)
        for client, reply in in_order(replies, cohort.replying.tolist(), nodes):
            upload, exact, report = self.exchange.receive(number, client, reply)
            weight = cohort.weight(client, report.examples)
            mean.add(upload, exact, weight, report.examples)
        if not mean.weight:  # all dropped out: the model stays
            return
        before_step()
        self.vector = self.server_step(self.vector, mean.take(), self.config.upload)
        self.exact = mean.exact
        if not all_finite(self.vector):
            raise DivergenceError(
                f"round {number}: the new global model is not finite; lower lr, or server.lr"
            )

    def state(self) -> dict[str, Any]:
        """Return all that the next round depends on, without copies, but what clients keep.

        Arrays of the optimizer's change in place with the next step, all others never.
        """
        return {
            "round": self.finished,
            "vector": self.vector,
            "exact": self.exact,
            "optimizer": self.server_step.state(),
            "exchange": self.exchange.state(),
        }

    def load(self, state: dict[str, Any], made: bytes) -> Iterator[tuple[FloatVector, list[int]]]:
        """Go on after the round that `state` was taken in, from a server that has done none.

        See `Downlink.load`, whose `made` it is and which yields the models that clients hold.
        """
        initial = self.vector
        if state["vector"].shape != initial.shape or state["vector"].dtype != initial.dtype:
            raise ValueError(f"a model of {state['vector'].shape} {state['vector'].dtype}")
        self.finished, self.vector, self.exact = state["round"], state["vector"], state["exact"]
        self.server_step.load(state["optimizer"])
        return self.exchange.load(state["exchange"], initial, made)


def connected(grid: Grid, clients: int) -> list[int]:
    """Return the node ids of all clients, sorted.

    Flower's engine starts the server first and its clients meanwhile, so they are waited for.

    Raises
    ------
    ClientError
        If another number than there should be is connected after `CONNECT_S`.
    """
    until = time.monotonic() + CONNECT_S
    while len(nodes := sorted(grid.get_node_ids())) != clients:
        if time.monotonic() >= until:
            raise ClientError(f"{len(nodes)} of {clients} clients are connected")
        time.sleep(0.05)
    return nodes
