"""Two Ray nodes on one machine, each with an object store of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .conftest import ROOT, SMALL
from .test_simulation import assert_same_runs, start, sweep

pytestmark = pytest.mark.ray

GRID = ("-m", *SMALL, "compression=none,topk,lowrank")

RAY = sys.executable, "-m", "ray.scripts.scripts"
Node = subprocess.Popen[bytes]


def ray_node(*arguments: str) -> Node:
    """Start a Ray node with one CPU; its processes are a group of their own."""
    return subprocess.Popen(
        [*RAY, "start", "--num-cpus=1", "--block", *arguments, "--object-store-memory=200000000"],
        cwd="/",
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def stop(node: Node) -> None:
    """End a node at once, as when its machine is switched off."""
    os.killpg(node.pid, signal.SIGKILL)
    node.communicate()


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, Callable[[], None]]]:
    """An address, and what switches off the second of the two nodes behind it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    head = ray_node("--head", f"--port={address.split(':')[1]}", "--include-dashboard=false")
    wait_for("to terminate the Ray runtime", head)
    second = ray_node(f"--address={address}")
    wait_for("To terminate the Ray runtime", second)
    yield address, lambda: stop(second)
    for node in (head, second):
        if node.returncode is None:
            stop(node)


def wait_for(words: str, node: Node) -> None:
    """Read what a starting node prints until it says so."""
    assert node.stdout is not None
    printed = b""
    while words.lower().encode() not in printed.lower():
        line = node.stdout.readline()
        assert line, printed.decode()
        printed += line


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same sweep on a Ray of its own."""
    folder = tmp_path_factory.mktemp("alone")
    sweep(folder, *GRID, "backend.workers=1", "backend.runs=1")
    return folder / "outputs" / "main"


USE_BOTH = """
import sys, time, ray
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from fedbw_sweep.federated.grid import RayGrid
ray.init(address=sys.argv[1], log_to_driver=False)
app = ClientApp()
@app.train()
def train(message, context):
    import time, ray
    from flwr.app import ConfigRecord, Message, RecordDict
    time.sleep(0.5)
    where = ConfigRecord({"node": ray.get_runtime_context().get_node_id()})
    return Message(RecordDict({"where": where}), reply_to=message)
clients = RayGrid(12, app)
asked = [Message(RecordDict(), n, "train") for n in clients.get_node_ids()]
replies = clients.send_and_receive(asked)
print(len({reply.content["where"]["node"] for reply in replies}))
"""


def test_a_sweep_on_two_nodes_leaves_the_same_bytes(
    cluster: tuple[str, Callable[[], None]], alone: Path, tmp_path: Path
) -> None:
    address, _ = cluster
    used = subprocess.run(
        [sys.executable, "-c", USE_BOTH, address],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert used.stdout.strip() == "2"
    sweep(tmp_path, *GRID, f"backend.address={address}")
    assert_same_runs(tmp_path / "outputs" / "main", alone)


def test_a_node_that_goes_away_costs_its_own_tasks_only(
    cluster: tuple[str, Callable[[], None]], alone: Path, tmp_path: Path
) -> None:
    address, switch_off = cluster
    process = start(tmp_path, *GRID, f"backend.address={address}", "backend.runs=1")
    folder = tmp_path / "outputs" / "main"
    while not list(folder.glob("*/status.json")):
        assert process.poll() is None
        time.sleep(0.1)
    switch_off()
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    assert_same_runs(folder, alone)


def test_no_cluster_there_is_said_at_once(tmp_path: Path) -> None:
    printed = sweep(tmp_path, *SMALL, "backend.address=127.0.0.1:1", code=2)
    assert "backend.address=127.0.0.1:1: no Ray cluster answers there" in printed
    assert "ray start --head" in printed
