"""This engine and Flower's in `simulation.py`.

The package is imported where it is used: Ray starts meanwhile.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from workloads import ECHO_BYTES, ECHO_CLIENTS, ECHO_ROUNDS, compose


class Engine:
    """Runs in this process, on Ray workers that stay."""

    def __init__(self, *overrides: str) -> None:
        from fedbw_sweep.backends.base import backend_of, set_verbosity

        set_verbosity(False)
        self.config = compose(*overrides)
        self.folder = Path(tempfile.mkdtemp())
        backend_of(self.config.backend).start(self.config)

    def again(self, number: int) -> dict[str, float]:
        """Do a run that starts from the same model as the others, but is none of them."""
        return self.run(lr=number * 1e-6)

    def run(self, seed: int = 1, **settings: Any) -> dict[str, float]:
        """Do a run; return the seconds its parts took."""
        from fedbw_sweep.sweeps.run import execute

        config = self.config.model_copy(update={"seed": seed, **settings})
        record = execute(config, self.folder)
        assert record.error is None, record.error
        return {
            name: sum(row[name] for row in record.timing)
            for name in record.timing[0].keys() - {"round"}
        }


def echo(*overrides: str) -> Callable[[int], None]:
    """Return a run in which ten clients send back 56 MB three times, and the server sums."""
    from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp

    from fedbw_sweep.backends.flower import simulate
    from fedbw_sweep.backends.ray.grid import RayGrid
    from fedbw_sweep.training.process import prepare_process

    prepare_process()
    config = compose(f"num_clients={ECHO_CLIENTS}", *overrides)
    client, server = ClientApp(), ServerApp()

    def record(data: bytes) -> Any:
        return ArrayRecord({"model": Array("float32", (ECHO_BYTES // 4,), "raw", data)})

    @client.train()
    def answer(message: Any, context: Any) -> Any:
        received = message.content["arrays"]["model"].data
        return Message(RecordDict({"arrays": record(bytes(received))}), reply_to=message)

    @server.main()
    def main(grid: Any, context: Any) -> None:
        while len(nodes := list(grid.get_node_ids())) < ECHO_CLIENTS:
            time.sleep(0.01)
        arrays = record(np.ones(ECHO_BYTES // 4, np.float32).tobytes())
        for _ in range(ECHO_ROUNDS):
            asked = [Message(RecordDict({"arrays": arrays}), node, "train") for node in nodes]
            total = np.zeros(ECHO_BYTES // 4, np.float32)
            for reply in grid.send_and_receive(asked):
                total += np.frombuffer(reply.content["arrays"]["model"].data, np.float32)
            arrays = record((total / len(nodes)).tobytes())
        assert total[0] == len(nodes)

    def run(seed: int) -> None:
        if config.backend.name == "flower":
            simulate(config, server, client)
        else:
            server(RayGrid.of(config, client), Context(0, 0, {}, RecordDict(), {}))

    return run
