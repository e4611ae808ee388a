"""Two Ray nodes on one machine, each with an object store of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import SMALL
from tests.sweeps.test_simulation import STOP_S, assert_same_runs, start, sweep

pytestmark = pytest.mark.ray

GRID = ("-m", *SMALL, "compression=none,topk,lowrank")

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
QUIET: dict[str, Any] = {"env": ENVIRONMENT, "capture_output": True, "text": True}
Node = subprocess.Popen[bytes]


def ray_node(python: str, *arguments: str) -> Node:
    """Start a Ray node with one CPU; its processes are a group of their own."""
    command = [python, "-m", "ray.scripts.scripts", "start", "--num-cpus=1", "--block"]
    return subprocess.Popen(
        [*command, *arguments, "--object-store-memory=200000000"],
        cwd="/",
        env={**ENVIRONMENT, "RAY_USAGE_STATS_ENABLED": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def stop(node: Node) -> None:
    """End a node at once, as when its machine is switched off."""
    os.killpg(node.pid, signal.SIGKILL)
    node.communicate()


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python with all packages that this one has, except ours."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    own = sysconfig.get_path("purelib", vars={"base": str(folder)})
    # A folder named there is looked in, but the .pth files in it, such as ours, aren't read.
    (Path(own) / "others.pth").write_text(sysconfig.get_path("purelib"))
    python = str(folder / "bin" / "python")
    ours = subprocess.run([python, "-c", "import ray, fedbw_sweep.config"], cwd="/", **QUIET)
    assert "No module named 'fedbw_sweep.config'" in ours.stderr
    return python


@pytest.fixture(scope="module")
def cluster(bare: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """An address, and what switches off the second of the two nodes behind it.

    The second has everything that the first has, except the package.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    port = f"--port={address.split(':')[1]}"
    head = ray_node(sys.executable, "--head", port, "--include-dashboard=false")
    wait_for("to terminate the Ray runtime", head)
    second = ray_node(bare, f"--address={address}")
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


WHERE = """
import json, sys
from pathlib import Path
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from hydra import initialize_config_dir
from fedbw_sweep.sweeps.grid import Composer
from fedbw_sweep.config.section import CONF
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.backends.ray.grid import RayGrid

client = ClientApp()

folder = Path.cwd()

@client.train()
def train(message, context):
    import sys, time
    from flwr.app import ConfigRecord, Message, RecordDict
    import fedbw_sweep.config.section
    (folder / str(message.metadata.dst_node_id)).touch()
    while len(list(folder.iterdir())) < 2:  # neither node answers for both
        time.sleep(0.01)
    where = ConfigRecord({"python": sys.prefix, "module": fedbw_sweep.config.section.__file__})
    return Message(RecordDict({"where": where}), reply_to=message)

with initialize_config_dir(str(CONF), version_base="1.3"):
    config = RunConfig.from_hydra(Composer("config").config(sys.argv[1:]))
grid = RayGrid.of(config, client)
asked = [Message(RecordDict(), n, "train") for n in grid.get_node_ids()]
replies = [reply.content["where"] for reply in grid.send_and_receive(asked)]
print(json.dumps({reply["python"]: reply["module"] for reply in replies}))
"""
"""Prints which module a client gets from the package, by the Python that its node runs on."""


def test_the_driver_brings_the_package_to_every_node(
    cluster: tuple[str, Callable[[], None]], bare: str, tmp_path: Path
) -> None:
    address, _ = cluster
    settings = ("num_clients=2", f"backend.address={address}")
    # Not from the folder of the sources: Ray lets workers import from where the driver runs.
    ran = subprocess.run([sys.executable, "-c", WHERE, *settings], cwd=tmp_path, **QUIET)
    assert ran.returncode == 0, ran.stderr
    modules = json.loads(ran.stdout)
    assert set(modules) == {sys.prefix, str(Path(bare).parent.parent)}
    for module in modules.values():
        assert "/runtime_resources/py_modules_files/" in module


def test_a_sweep_on_two_nodes_leaves_the_same_bytes(
    cluster: tuple[str, Callable[[], None]], alone: Path, tmp_path: Path
) -> None:
    address, _ = cluster
    sweep(tmp_path, *GRID, f"backend.address={address}")
    assert_same_runs(tmp_path / "outputs" / "main", alone)


WORKING = "ray::_answer"


def workers(address: str, *names: str) -> set[psutil.Process]:
    """The worker processes of a cluster's nodes that do this."""
    found = set()
    port = address[address.index(":") :]
    for raylet in psutil.process_iter():
        with suppress(psutil.NoSuchProcess):
            if raylet.name() == "raylet" and any(word.endswith(port) for word in raylet.cmdline()):
                found |= {w for w in raylet.children() if w.name() in names}
    return found


def at_work(process: subprocess.Popen[str], address: str) -> None:
    """Wait for a worker that is at work for a command."""
    while not workers(address, WORKING):
        assert process.poll() is None
        time.sleep(0.05)


def test_workers_end_with_a_command_that_ends_before_them(
    cluster: tuple[str, Callable[[], None]], tmp_path: Path
) -> None:
    address, _ = cluster
    process = start(tmp_path, *SMALL, "local_steps=1000000", f"backend.address={address}")
    # Past what gets them ready, which ends by itself, into training, which does not for hours.
    at_work(process, address)
    time.sleep(STOP_S / 2)
    assert process.poll() is None
    process.kill()
    process.communicate()
    deadline = time.monotonic() + STOP_S
    while workers(address, WORKING):
        assert time.monotonic() < deadline
        time.sleep(0.5)


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


def test_gpus_that_no_node_has_are_said_at_once(
    cluster: tuple[str, Callable[[], None]], tmp_path: Path
) -> None:
    settings = (*SMALL, f"backend.address={cluster[0]}", "backend.client_gpus=0.25")
    printed = sweep(tmp_path, *settings, code=2)
    assert "backend.client_gpus=0.25: must be at most 0, the GPUs that Ray finds" in printed
