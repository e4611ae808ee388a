"""Ray's processes on this machine, and workers forked for it.

What is used of Ray beyond what it exports is here: each test names what a new version has broken.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray._private.node import Node as RayNode
from ray._private.parameter import RayParams

from fedbw_sweep.backends.ray.nursery import WORKER
from tests.conftest import ROOT

PINNED = "2.55.1"
STOP_S = 30


def test_the_version_is_the_one_this_was_written_for() -> None:
    assert version("ray") == PINNED, "go through this file, then change PINNED"


def test_a_node_is_made_of_these_parameters() -> None:
    used = {
        *("num_cpus", "available_memory_bytes", "object_store_memory", "include_dashboard"),
        *("include_log_monitor", "no_monitor", "worker_path"),
    }
    assert used <= set(inspect.signature(RayParams).parameters)
    assert {"head", "ray_init_cluster"} <= set(inspect.signature(RayNode).parameters)
    assert callable(RayNode.start_api_server), "what `Bare` leaves out has another name"


def test_what_ray_starts_as_a_worker_is_where_it_was() -> None:
    worker = Path(ray.__path__[0], WORKER)
    assert 'if __name__ == "__main__":' in worker.read_text()


YOUNG = """
import json, os, signal, sys
from fedbw_sweep.backends.ray.node import Node

node = Node(2, verbose=False, preload=sys.argv[1] or None)
assert "ray" not in sys.modules  # it would keep what it read of its environment
import ray

ray.init(address=node.address(), log_to_driver=False, logging_level=40)

@ray.remote(max_retries=5)
def about(preloaded):
    import gc, os, signal, sys, time
    from pathlib import Path
    time.sleep(0.3)  # one worker does not do the work of both
    return {
        "preloaded": preloaded in sys.modules,
        "pid": os.getpid(),
        "parent": os.getppid(),
        "nice": os.nice(0),
        "oom": Path("/proc/self/oom_score_adj").read_text().strip(),
        "deaf": signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []),
        "own": os.environ["RAY_JOB_ID"],
        "collects": gc.isenabled(),
        "streams": [os.readlink(f"/proc/self/fd/{n}") for n in (1, 2)],
        "arguments": sys.argv[1:],
    }

for line in sys.stdin:
    workers = ray.get([about.remote(sys.argv[2]) for _ in range(2)])
    print(json.dumps({"node": node.process.pid, "workers": workers}), flush=True)
node.stop()
"""
"""Starts Ray and, for each line, tells of two workers."""

PRELOADED = "this"  # nobody imports it by chance


class Command:
    """A process that starts Ray, as the command does."""

    def __init__(self, preload: str = PRELOADED) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", YOUNG, preload, PRELOADED],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.own = psutil.Process(self.process.pid)

    def workers(self) -> list[dict[str, Any]]:
        """Ask about two workers."""
        assert self.process.stdin
        assert self.process.stdout
        print(file=self.process.stdin, flush=True)
        # Python prints the Zen of `this` first.
        line = next(line for line in self.process.stdout if line.startswith("{"))
        told: dict[str, Any] = json.loads(line)
        self.node = told["node"]
        workers: list[dict[str, Any]] = told["workers"]
        return workers

    def processes(self) -> list[psutil.Process]:
        """It, and all that it has started."""
        return [self.own, *self.own.children(recursive=True)]


def assert_gone(processes: list[psutil.Process]) -> None:
    """Wait until they are."""
    _, alive = psutil.wait_procs(processes, timeout=STOP_S)
    assert not alive


@pytest.mark.ray
@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux")
def test_workers_are_forked_with_what_was_imported_and_live_as_rays_own() -> None:
    command, usual = Command(), Command(preload="")
    forked, fresh = command.workers(), usual.workers()
    [nursery] = {worker.pop("parent") for worker in forked}
    assert nursery != command.process.pid
    assert psutil.Process(nursery).ppid() == command.process.pid
    assert len({worker.pop("pid") for worker in forked}) == 2
    assert all(worker.pop("preloaded") for worker in forked)
    assert not any(worker.pop("preloaded") for worker in fresh)
    for one, other in zip(forked, fresh, strict=True):
        names = [argument.partition("=")[0] for argument in one.pop("arguments")]
        assert names == [argument.partition("=")[0] for argument in other.pop("arguments")]
        assert "--node-id" in names
        for worker in (one, other):
            logs = worker.pop("streams")
            assert all("/session_" in log for log in logs), logs
        del other["pid"], other["parent"]
        assert one == other
    for each in (command, usual):
        started = {process.name() for process in psutil.Process(each.node).children()}
        assert started == {"gcs_server", "raylet"}, "Ray has something more to start"
        processes = each.processes()
        assert len(processes) >= 7
        each.process.communicate()  # ends its input, and it
        assert each.process.returncode == 0
        assert_gone(processes)


@pytest.mark.ray
@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux")
def test_without_the_nursery_workers_start_afresh_and_nothing_outlives_the_command() -> None:
    command = Command()
    before = command.workers()
    nursery = psutil.Process(before[0]["parent"])
    for process in (*nursery.children(), nursery):  # Ray may have started one ahead
        process.kill()
    after = command.workers()
    assert [worker["preloaded"] for worker in before + after] == [True, True, False, False]
    processes = command.processes()
    command.process.kill()
    command.process.communicate()
    assert_gone(processes)


@pytest.mark.ray
@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux")
def test_a_killed_command_leaves_no_forked_process() -> None:
    command = Command()
    command.workers()
    processes = command.processes()
    command.process.kill()
    command.process.communicate()
    assert_gone(processes)


OPEN = """
from fedbw_sweep.backends.ray.nursery import Nursery

nursery = Nursery()
nursery.open()
print(nursery.address, flush=True)
input()
"""

ASK = """
import os, socket, sys

os.setuid(int(sys.argv[2]))
with socket.socket(socket.AF_UNIX) as nursery:
    nursery.connect("\\0" + sys.argv[1])
    try:
        socket.send_fds(nursery, [b"."], [0, 1, 2])
        nursery.sendall(b"{}")
        nursery.shutdown(socket.SHUT_WR)
        print(nursery.recv(1).decode())
    except ConnectionError:
        print()
"""


@pytest.mark.skipif(sys.platform != "linux" or os.getuid() != 0, reason="needs another user")
def test_the_nursery_forks_nothing_for_another_user() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OPEN],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as command:
        assert command.stdout
        address = command.stdout.readline().strip()
        for user, answer in ((65534, ""), (os.getuid(), ".")):
            ask = [sys.executable, "-c", ASK, address, str(user)]
            asked = subprocess.run(ask, capture_output=True, text=True)
            assert asked.stdout.strip() == answer, asked.stderr
        command.kill()
