"""The Ray backend: one Ray for the whole command, its workers warm from run to run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedbw_sweep.backends.ray.node import Node
from fedbw_sweep.backends.ray.nursery import importing
from fedbw_sweep.config.groups import BackendConfig
from fedbw_sweep.config.run import RunConfig

if TYPE_CHECKING:  # it imports torch, which loads while Ray starts
    from fedbw_sweep.federation.job import Job
    from fedbw_sweep.federation.runs import Sink
    from fedbw_sweep.records.checkpoint import Store


class RayBackend:
    """Trains clients in Ray's workers; the server runs in the command's own process.

    Ray is started on this machine, or a cluster is joined, once a process.
    """

    def __init__(self, config: BackendConfig) -> None:
        self.config = config

    def start(self, config: RunConfig) -> None:
        """See `Backend`; this process imports what a run needs while Ray starts."""
        if "ray" in sys.modules and sys.modules["ray"].is_initialized():
            return
        node = None
        if self.config.address is None:
            preload = "fedbw_sweep.federation.client"
            own = self.config
            node = Node(own.workers, config.verbose, own.start_timeout_s, preload)
        with importing():
            from fedbw_sweep.backends.ray import cluster
        cluster.connect(config, node)

    def runs_at_a_time(self, configs: Sequence[RunConfig]) -> int:
        """See `Backend`: as many as fill the workers, and one while another's server works."""
        from fedbw_sweep.backends.ray.cluster import alive_nodes, worker_count

        if self.config.runs:
            return self.config.runs
        fewest = min(config.clients_per_round for config in configs)
        return -(-worker_count(alive_nodes()) // fewest) + 1

    def run(self, job: Job, sinks: Sequence[Sink], store: Store | None = None) -> None:
        """See `Backend`."""
        self.start(job.config)  # in a job of another launcher nobody has
        from flwr.app import Context, RecordDict

        from fedbw_sweep.backends.ray.grid import RayGrid
        from fedbw_sweep.federation.client import client_app
        from fedbw_sweep.federation.job import server_app
        from fedbw_sweep.federation.shared import federated_text

        config = job.config
        # The text is in this process anyway; workers read it where Ray keeps it.
        grid = RayGrid.of(config, client_app(job, federated_text(config).clients))
        server_app(job, sinks, store)(grid, Context(0, config.num_clients, {}, RecordDict(), {}))
