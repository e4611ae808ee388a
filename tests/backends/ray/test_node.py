"""Ray's processes on this machine, workers forked for it, and what is left of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedbw_sweep.backends.ray import node
from fedbw_sweep.errors import FedbwError
from tests.conftest import ROOT, SMALL

STOP_S = 30


YOUNG = """
import json, os, signal, sys, tempfile
from fedbw_sweep.backends.ray.node import Node

node = Node(2, False, 300, sys.argv[1] or None)
assert "ray" not in sys.modules  # it would keep what it read of its environment
import ray

ray.init(
    address=node.address(), runtime_env=node.runtime_env, log_to_driver=False, logging_level=40
)

@ray.remote(max_retries=5)
def about(preloaded, folder):
    import gc, os, signal, sys, time
    from pathlib import Path
    Path(folder, str(time.monotonic_ns())).touch()
    until = time.monotonic() + 20
    while len(os.listdir(folder)) < 2 and time.monotonic() < until:
        time.sleep(0.01)  # one worker does not do the work of both
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
    with tempfile.TemporaryDirectory() as folder:
        workers = ray.get([about.remote(sys.argv[2], folder) for _ in range(2)])
    print(json.dumps({"node": node.process.pid, "workers": workers}), flush=True)
ray.shutdown()
node.stop()
"""
"""Starts Ray and, for each line, tells of two workers."""

PRELOADED = "this"  # nobody imports it by chance


class Command:
    """A process that starts Ray, as the command does."""

    def __init__(self, preload: str = PRELOADED, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", YOUNG, preload, PRELOADED],
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
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

    def raylet(self) -> psutil.Process:
        """Find the process of Ray's that starts all others on its machine."""
        started = self.own.children(recursive=True)
        [raylet] = [process for process in started if says(process, "raylet/raylet ")]
        return raylet

    def suspend_agents(self) -> list[psutil.Process]:
        """Stop Ray's agents, which would otherwise notice what is gone, though only later."""
        raylet, deadline = self.raylet(), time.monotonic() + STOP_S
        while True:  # they start last; in the end they are called ray::...Agent
            agents = [process for process in raylet.children() if says(process, "gent")]
            if len(agents) == 2:
                break
            assert time.monotonic() < deadline, agents
            time.sleep(0.1)
        for agent in agents:
            agent.suspend()
        return agents


def says(process: psutil.Process, words: str) -> bool:
    """Whether a process is there with these words in its command line."""
    with suppress(psutil.Error):
        return words in " ".join(process.cmdline())
    return False


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


@pytest.mark.ray
@pytest.mark.parametrize("node_too", [True, False])
def test_rays_agents_end_with_a_command_whose_ray_was_killed(node_too: bool) -> None:
    command = Command()
    command.workers()
    processes = command.processes()
    raylet = command.raylet()
    command.suspend_agents()
    if node_too:
        psutil.Process(command.node).kill()
    raylet.kill()
    command.process.communicate()
    assert_gone(processes)


@pytest.mark.ray
@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux")
def test_rays_agents_end_with_a_command_that_is_killed_like_its_ray() -> None:
    """Who forks workers is told of the command's end, and sees to what is left."""
    command = Command()
    [nursery] = {worker["parent"] for worker in command.workers()}
    processes, agents = command.processes(), command.suspend_agents()
    node = psutil.Process(command.node)
    for process in (*node.children(recursive=True), node, command.own):
        if process not in agents:
            process.kill()
    assert nursery in [process.pid for process in processes]
    command.process.communicate()
    assert_gone(processes)


@pytest.mark.ray
def test_what_a_killed_command_left_ends_with_the_next(short_folder: Path) -> None:
    """Of Ray's own processes all may be killed but the agents, and the command with them."""
    command = Command(TMPDIR=str(short_folder))
    command.workers()
    processes, agents = command.processes(), command.suspend_agents()
    for process in reversed(processes):  # first who would see to what is left
        if process not in agents:
            process.kill()
    command.process.communicate()
    assert all(agent.is_running() for agent in agents)
    following = Command(TMPDIR=str(short_folder))
    following.workers()
    following.process.communicate()
    assert_gone(agents)
    assert not list(short_folder.glob("fedbw-*"))


THREADED = """
import threading, time
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
from fedbw_sweep.backends.ray.node import Node

node = Node(1, False, 300, "this")
print(node.runtime_env)
import ray

ray.init(address=node.address(), runtime_env=node.runtime_env, log_to_driver=False)
print(ray.get(ray.remote(lambda: 6 * 7).remote()))
ray.shutdown()
node.stop()
"""


@pytest.mark.ray
def test_where_a_fork_is_unsafe_workers_start_afresh_and_it_is_said() -> None:
    done = subprocess.run(
        [sys.executable, "-c", THREADED],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["{}", "42"]
    assert "workers start afresh, which takes longer: this process has threads" in done.stderr


@pytest.mark.parametrize(
    ("module", "words"),
    [("ray", "Ray is imported"), ("torch", "CUDA is in use")],
)
def test_when_a_process_must_not_be_forked(
    monkeypatch: pytest.MonkeyPatch, module: str, words: str
) -> None:
    monkeypatch.setattr(node.threading, "active_count", lambda: 1)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert node.why_not_fork() is None

    class Used:
        class cuda:  # noqa: N801
            is_initialized = staticmethod(lambda: True)

    monkeypatch.setitem(sys.modules, module, Used)
    assert words in str(node.why_not_fork())


STRANGER = """
import sys, ray
ray.init(address=sys.argv[1], logging_level=40)
print("joined")
"""


@pytest.mark.ray
def test_who_does_not_know_the_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)
    own = node.Node(1, False, 300)
    try:
        address = own.address()
        for known, joined in ((True, True), (False, False)):
            names = () if known else ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
            done = subprocess.run(
                [sys.executable, "-c", STRANGER, address],
                env={key: value for key, value in os.environ.items() if key not in names},
                capture_output=True,
                text=True,
            )
            assert ("joined" in done.stdout) == joined, done.stderr
    finally:
        own.stop()


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder for temporary files whose path leaves room for sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="t") as folder:
        yield Path(folder)


def command(temporary: Path, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fedbw_sweep", *SMALL, *arguments, f"hydra.sweep.dir={folder}"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def rays(temporary: Path) -> set[Path]:
    """What Ray may have left: torch keeps a cache there on purpose."""
    return {path for path in temporary.iterdir() if not path.name.startswith("torchinductor")}


@pytest.mark.ray
def test_nothing_is_left_in_files(short_folder: Path, tmp_path: Path) -> None:
    """After a clean end, and after the next command where all of the last one's was killed."""
    temporary = short_folder
    killed = command(temporary, tmp_path, "rounds=500")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*/running.json")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for process in [*psutil.Process(killed.pid).children(recursive=True), killed]:
        process.kill()
    killed.communicate()
    [left] = temporary.glob(f"{node.PREFIX}*")
    other = temporary / f"{node.PREFIX}1-other"  # of a process that lives
    other.mkdir()
    foreign = temporary / f"{node.PREFIX}notes"
    foreign.mkdir()
    clean = command(temporary, tmp_path, "rounds=1")
    printed, _ = clean.communicate()
    assert clean.returncode == 0, printed
    assert not left.exists()
    assert rays(temporary) == {other, foreign}


@pytest.mark.ray
def test_a_path_too_long_for_sockets_is_one_line(short_folder: Path, tmp_path: Path) -> None:
    long = short_folder / ("x" * 60)
    long.mkdir()
    started = command(long, tmp_path)
    printed, _ = started.communicate()
    assert started.returncode == 2
    assert "too long a path for sockets" in printed
    assert "Traceback" not in printed
    assert not rays(long)


@pytest.mark.skipif(sys.platform != "linux", reason="addresses are limited elsewhere otherwise")
@pytest.mark.ray
def test_too_few_addresses_are_one_line(short_folder: Path, tmp_path: Path) -> None:
    def limit() -> None:
        psutil.Process().rlimit(psutil.RLIMIT_AS, (4 * 10**9,) * 2)

    ended = subprocess.run(
        [sys.executable, "-m", "fedbw_sweep", *SMALL, f"hydra.sweep.dir={tmp_path}"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(short_folder)},
        preexec_fn=limit, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert "addresses are limited to 4.00 GB (ulimit -v)" in ended.stderr
    assert not list(short_folder.iterdir())


def test_what_ray_raises_is_a_line_and_an_end(short_folder: Path, tmp_path: Path) -> None:
    """Though a thread of Ray's goes on."""
    (tmp_path / "ray.py").write_text(
        "import threading, time\n"
        "def init(**_):\n"
        "    threading.Thread(target=time.sleep, args=[600]).start()\n"
        "    raise Exception('no\\nprocesses')\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    starting = subprocess.Popen(
        [sys.executable, "-m", "fedbw_sweep.backends.ray.node", "2", "0"],
        env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(short_folder)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert starting.stdout and starting.stderr and starting.stdin  # noqa: PT018
    assert starting.stdout.read() == ""
    assert starting.stderr.read() == "Ray: no processes\n"
    assert starting.wait(timeout=20) == 1
    for pipe in (starting.stdout, starting.stderr, starting.stdin):
        pipe.close()
    assert not list(short_folder.iterdir())


def test_a_command_may_end_while_ray_starts(short_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("import time\ninit = lambda **_: time.sleep(600)\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    starting = subprocess.Popen(
        [sys.executable, "-m", "fedbw_sweep.backends.ray.node", "2", "0"],
        env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(short_folder)},
        stdin=subprocess.PIPE,
    )
    assert starting.stdin
    deadline = time.monotonic() + 60
    while not list(short_folder.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    starting.stdin.close()
    assert starting.wait(timeout=20) == 0
    assert not list(short_folder.iterdir())


@pytest.mark.ray
def test_a_start_that_takes_too_long_ends_with_a_reason() -> None:
    own = node.Node(1, False, start_timeout_s=0.01)
    with pytest.raises(FedbwError, match=r"backend\.start_timeout_s=0\.01 s"):
        own.address()
    own.process.communicate()


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
