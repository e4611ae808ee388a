"""Ray on this machine: its processes, started and ended by a process of their own.

They start while the command imports, and the command has no threads yet when it forks the process
that forks Ray's workers (see `nursery`). Only what Ray documents is used: ``ray.init``, a runtime
environment with ``py_executable``, and environment variables. Where a fork is not safe, workers
start afresh, which takes longer.
"""

from __future__ import annotations

import logging
import os
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Collection
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from secrets import token_hex
from typing import Any

import psutil

from fedbw_sweep.backends.ray.nursery import ADDRESS, SCRIPT, Nursery, importing
from fedbw_sweep.console import message_console, size
from fedbw_sweep.environment import cores
from fedbw_sweep.errors import FedbwError
from fedbw_sweep.shutdown import kill, session_of

PREFIX = "fedbw-"
"""Of the names of Ray's folders for sockets, logs and spilled objects; a process id follows."""

SOCKET_ROOM = 107 - len("/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store.1")
"""Longest folder that leaves room for Ray's sockets: their paths have at most 107 bytes."""


ADDRESSES, STORE = 9e9, 0.3
"""Bytes of addresses that a process of Ray's maps, and what share of the memory its store is."""

END_S = 15.0
"""For how long the end of the process that ends Ray's is waited for."""

DELETIONS = 20
"""How often a folder is tried to be deleted, a tenth of a second apart."""

LINE = 300
"""Characters shown of what Ray says where it does not start."""


class Node:
    """Ray with nothing but a node, until `stop` or the end of this process.

    Only processes that know a random token can use it (``RAY_AUTH_MODE=token``), unless this
    process had imported Ray before.

    Parameters
    ----------
    workers : int or None
        Clients that can train at the same time; None for one per core.
    verbose : bool
        Whether Ray's own log is to reach the command.
    start_timeout_s : float
        Seconds that it may take to start.
    preload : str, optional
        A module to import while Ray starts. Workers are then forked from this process as it is with
        it, where that is safe; else each starts afresh.

    Raises
    ------
    FedbwError
        If Ray would have too few addresses.
    """

    def __init__(
        self,
        workers: int | None,
        verbose: bool,
        start_timeout_s: float,
        preload: str | None = None,
    ) -> None:
        self.start_timeout_s = start_timeout_s
        _refuse_few_addresses()
        _remove_what_the_dead_left()
        if "ray" not in sys.modules:  # else it has read its environment already
            os.environ.setdefault("RAY_AUTH_MODE", "token")
            os.environ.setdefault("RAY_AUTH_TOKEN", token_hex(32))
        nursery = Nursery() if preload and sys.platform == "linux" else None
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(workers or cores()), str(int(verbose))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is the command's affair
        )
        if preload:
            with importing():
                import_module(preload)
        self.runtime_env: dict[str, Any] = {}
        if nursery:
            self._open(nursery)

    def _open(self, nursery: Nursery) -> None:
        """Have workers forked, if that is safe."""
        if reason := why_not_fork():
            nursery.close()
            message_console().print(f"workers start afresh, which takes longer: {reason}")
            return
        assert self.process.stdin
        nursery.open(self.process.stdin.fileno(), last=self._end_orphans)
        self.runtime_env = {
            "py_executable": f"{sys.executable} {SCRIPT}",
            "env_vars": {ADDRESS: nursery.address},
        }

    def _end_orphans(self) -> None:
        """End what is left of Ray once the process that would do so is gone, if it was killed.

        Ray aborts a command whose GCS is gone, and agents would wait for a GCS for a minute.
        """
        with suppress(psutil.Error):
            psutil.Process(self.process.pid).wait(END_S)
        _end(_in_session(self.process.pid))

    def address(self) -> str:
        """Wait until Ray runs; return where.

        Raises
        ------
        FedbwError
            If it does not start, or not in time.
        """
        assert self.process.stdout
        ready, _, _ = select.select([self.process.stdout], [], [], self.start_timeout_s)
        if not ready:
            self.process.kill()
            raise FedbwError(
                f"Ray did not start within backend.start_timeout_s={self.start_timeout_s:g} s: the "
                "machine is very busy, or short of processes or memory"
            )
        if address := self.process.stdout.readline().strip():
            return address
        raise FedbwError(
            "Ray did not start here; what it says of it stands above, and with verbose=true more"
        )

    def stop(self) -> None:
        """End Ray's processes, and remove what they left in files."""
        self.process.communicate()
        _end(_in_session(self.process.pid))  # it may have been killed itself


def why_not_fork() -> str | None:
    """Say why this process must not be forked, or None if it may be."""
    if threading.active_count() > 1:  # those of OpenBLAS know of forks
        return "this process has threads, which a fork would lack"
    if "ray" in sys.modules:
        return "Ray is imported, and keeps what it read of its surroundings"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "CUDA is in use, which a fork cannot go on with"
    return None


def _refuse_few_addresses() -> None:
    """Refuse a limit of addresses that Ray would run into, which says so in pages."""
    if sys.platform != "linux":
        return
    limit, _ = psutil.Process().rlimit(psutil.RLIMIT_AS)
    needed = ADDRESSES + STORE * psutil.virtual_memory().total
    if limit != psutil.RLIM_INFINITY and limit < needed:
        raise FedbwError(
            f"addresses are limited to {size(limit)} (ulimit -v), and Ray maps some {size(needed)} "
            "of them, most of which it never uses; raise the limit: ulimit -v unlimited"
        )


def _remove_what_the_dead_left() -> None:
    """Remove folders of Ray's whose processes have been killed, and end its agents.

    Those wait for Ray's killed store of metadata (GCS) for a minute.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(ValueError, OSError):
            owner = int(folder.name.removeprefix(PREFIX).partition("-")[0])
            if folder.stat().st_uid == os.getuid() and not _lives(owner):
                _end(_in_session(owner))
                _delete(folder)


def _lives(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def main() -> None:
    """Be the process that starts Ray's, and ends them when its standard input does."""
    workers, verbose = map(int, sys.argv[1:])
    folder = tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-")
    # The command may end while Ray starts, which takes a busy machine a minute.
    watcher = threading.Thread(target=_end_with_the_command, args=[folder], daemon=True)
    watcher.start()
    try:
        if len(os.fsencode(folder)) > SOCKET_ROOM:
            raise FedbwError(
                f"the folder of temporary files has too long a path for sockets: {folder}"
            )
        os.environ["RAY_TMPDIR"] = folder
        # Imported here: not for who only starts this process.
        import ray

        ray.init(
            address="local",
            num_cpus=workers,
            include_dashboard=False,
            logging_level=logging.INFO if verbose else logging.ERROR,
            log_to_driver=False,
        )
        print(ray.get_runtime_context().gcs_address, flush=True)
        watcher.join()
    except Exception as error:  # whatever Ray raises
        if verbose:
            traceback.print_exc()
        print(f"Ray: {' '.join(str(error).split())[:LINE]}", file=sys.stderr, flush=True)
    _remove(folder)
    os._exit(1)  # threads of Ray's may hold up any other end


def _end_with_the_command(folder: str) -> None:
    sys.stdin.read()
    _remove(folder)
    os._exit(0)  # what Ray registers for the end would make its folder anew


def _remove(folder: str) -> None:
    """End what Ray has started, and remove its folder."""
    _end({*psutil.Process().children(recursive=True), *_in_session(os.getpid())})
    _delete(Path(folder))


def _delete(folder: Path) -> None:
    """Delete a folder, which a worker of the nursery's that is ending may still write to."""
    for _ in range(DELETIONS):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def _in_session(leader: int) -> list[psutil.Process]:
    """Return a session's processes but its leader: Ray's, also those whose parents were killed."""
    each = psutil.process_iter()
    return [process for process in each if session_of(process) == leader != process.pid]


def _end(processes: Collection[psutil.Process]) -> None:
    kill(processes)  # ray.shutdown takes a second
    psutil.wait_procs(processes, timeout=10)  # else one may write once more


if __name__ == "__main__":
    main()
