"""Ray on this machine: its processes, started and ended by a process of their own.

They start while the command imports, and the command has no threads yet when it forks (see
`nursery`). Ray's own way to start them, ``ray.init``, takes a dashboard's server that waits to be
looked at, an autoscaler and more; a run needs none, and their start takes longer than the rest.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from importlib import import_module

from fedbw_sweep.backends.ray.nursery import ADDRESS, SCRIPT, Nursery, importing
from fedbw_sweep.environment import cores
from fedbw_sweep.errors import FedbwError


class Node:
    """Ray with nothing but a node, until `stop` or the end of this process.

    Parameters
    ----------
    workers : int or None
        Clients that can train at the same time; None for one per core.
    verbose : bool
        Whether what workers print is to reach the command.
    preload : str, optional
        A module to import while Ray starts. Workers are then forked from this process as it is with
        it, on Linux (see `Nursery.open` for what it must not be); else each starts afresh.
    """

    def __init__(self, workers: int | None, verbose: bool, preload: str | None = None) -> None:
        nursery = Nursery() if preload and sys.platform == "linux" else None
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", __name__, str(workers or cores())),
                *("verbose" if verbose else "quiet", nursery.address if nursery else ""),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is the command's affair
        )
        if preload:
            with importing():
                import_module(preload)
        if nursery:
            assert self.process.stdin
            nursery.open(self.process.stdin.fileno())

    def address(self) -> str:
        """Wait until Ray runs; return where.

        Raises
        ------
        FedbwError
            If it does not start.
        """
        assert self.process.stdout
        if address := self.process.stdout.readline().strip():
            return address
        raise FedbwError("Ray did not start here; what it says of it stands above")

    def stop(self) -> None:
        """End Ray's processes, and remove what they have spilled to disk."""
        self.process.communicate()


def main() -> None:
    """Be the process that starts Ray's, and ends them when its standard input does."""
    # Imported here: not for who only starts this process.
    from ray._private.node import (
        Node as RayNode,  # not exported, see tests/backends/ray/test_node.py
    )
    from ray._private.parameter import RayParams
    from ray._private.utils import estimate_available_memory, resolve_object_store_memory

    class Bare(RayNode):
        def start_api_server(self, **_: object) -> None:
            """Start no dashboard's server."""

    workers, how, nursery = sys.argv[1:]
    os.environ[ADDRESS] = nursery
    verbose = how == "verbose"
    logging.getLogger("ray").setLevel(logging.INFO if verbose else logging.ERROR)
    memory: int = estimate_available_memory()  # type: ignore[no-untyped-call]
    parameters = RayParams(
        num_cpus=int(workers),
        available_memory_bytes=memory,
        object_store_memory=resolve_object_store_memory(memory, None),
        include_dashboard=False,
        include_log_monitor=verbose,  # type: ignore[arg-type]  # a bool by its description
        no_monitor=True,
        worker_path=SCRIPT if nursery else None,
    )
    node = Bare(parameters, head=True, ray_init_cluster=True)
    print(node.gcs_address, flush=True)
    sys.stdin.read()
    node.destroy_external_storage()  # type: ignore[no-untyped-call]  # its processes end with this one


if __name__ == "__main__":
    main()
