"""Flower's Grid on Ray: order, state, faults."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedbw_sweep.errors import ConfigError
from fedbw_sweep.federated import grid, simulation
from fedbw_sweep.federated.grid import RayGrid
from fedbw_sweep.modeling import pick_device

from .conftest import config_of

pytestmark = [
    pytest.mark.ray,
    # Ray leaves its own processes to the end of the interpreter.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

Answer = Callable[[int, Message, Context], RecordDict]

STORE = 100 * 10**6


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=1,  # for Ray to share out; there need not be one
        object_store_memory=STORE,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=40,
    )
    yield
    ray.shutdown()


def app(answer: Answer) -> ClientApp:
    """A ClientApp that answers with what `answer` makes of its number, message and context."""
    built = ClientApp()

    @built.train()
    def train(message: Message, context: Context) -> Message:
        return Message(answer(context.node_id, message, context), reply_to=message)

    return built


def ask(clients: RayGrid, nodes: list[int], timeout: float | None = None) -> list[Message]:
    """Send the same arrays to each node; return the replies."""
    model = ArrayRecord({"payload": Array("uint8", (3,), "raw", b"abc")})
    messages = [
        Message(RecordDict({"arrays": model, "config": ConfigRecord({"n": n})}), n, "train")
        for n in nodes
    ]
    return list(clients.send_and_receive(messages, timeout=timeout))


def payload(message: Message) -> bytes:
    return bytes(message.content.array_records["arrays"]["payload"].data)


def echo(node: int, message: Message, context: Context) -> RecordDict:
    own = bytes(message.content.array_records["arrays"]["payload"].data) + bytes([node])
    return RecordDict({"arrays": ArrayRecord({"payload": Array("uint8", (4,), "raw", own)})})


def test_replies_come_in_the_order_of_the_messages() -> None:
    def slow_first(node: int, message: Message, context: Context) -> RecordDict:
        time.sleep(0.3 * (node == 7))
        return echo(node, message, context)

    replies = ask(RayGrid(100, app(slow_first)), [7, *range(30, 60), 3])
    nodes = [reply.metadata.src_node_id for reply in replies]
    assert nodes == [7, *range(30, 60), 3]
    assert [payload(reply) for reply in replies] == [b"abc" + bytes([n]) for n in nodes]


def test_only_a_bounded_number_of_messages_is_ahead_of_the_replies() -> None:
    clients = RayGrid(1000, app(echo))
    made = []

    def messages() -> Iterator[Message]:
        for node in range(100):
            made.append(node)
            yield Message(RecordDict({"arrays": ArrayRecord()}), node, "train")

    next(iter(clients.send_and_receive(messages())))
    assert len(made) == 2 * grid.IN_FLIGHT_PER_WORKER + 1


def count_in_state(node: int, message: Message, context: Context) -> RecordDict:
    held = context.state.array_records.get("seen")
    seen = np.frombuffer(held["n"].data, np.int64)[0] if held else 0
    now = np.array([seen + 1]).tobytes()
    context.state["seen"] = ArrayRecord({"n": Array("int64", (1,), "raw", now)})
    return RecordDict({"arrays": ArrayRecord({"payload": Array("int64", (1,), "raw", now)})})


def counts(replies: list[Message]) -> list[int]:
    return [int(np.frombuffer(payload(reply), np.int64)[0]) for reply in replies]


def test_state_stays_with_its_client() -> None:
    clients = RayGrid(10**6, app(count_in_state))
    assert counts(ask(clients, [1, 2, 3])) == [1, 1, 1]
    assert counts(ask(clients, [2, 3, 999_999])) == [2, 2, 1]
    assert counts(ask(clients, [3, 1])) == [3, 2]
    assert sorted(clients.states) == [1, 2, 3, 999_999]
    assert counts(ask(RayGrid(10, app(count_in_state)), [3])) == [1]


def memory() -> int:
    """Bytes that this process and all of Ray's take, what they share counted once."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(process.memory_full_info().pss for process in processes)


def test_states_larger_than_the_object_store_are_kept_on_disk() -> None:
    size, nodes = 16 * 10**6, list(range(64))

    def note(node: int, message: Message, context: Context) -> RecordDict:
        held = context.state.array_records.get("notes")
        last = np.frombuffer(held["n"].data, np.int64)[-1] if held else node
        now = np.full(size // 8, last + 1000).tobytes()
        context.state["notes"] = ArrayRecord({"n": Array("int64", (size // 8,), "raw", now)})
        own = now[:8]
        return RecordDict({"arrays": ArrayRecord({"payload": Array("int64", (1,), "raw", own)})})

    clients = RayGrid(len(nodes), app(note))
    assert counts(ask(clients, [0, 1])) == [1000, 1001]  # starts the workers
    before = memory()
    assert counts(ask(clients, nodes[2:])) == [1000 + node for node in nodes[2:]]
    grown = memory() - before
    assert grown < 0.5 * size * len(nodes)
    assert counts(ask(clients, nodes)) == [2000 + node for node in nodes]


@pytest.mark.parametrize("times", [1, grid.RETRIES])
def test_a_killed_worker_is_replaced_and_its_client_asked_again(tmp_path: Path, times: int) -> None:
    def die_at_first(node: int, message: Message, context: Context) -> RecordDict:
        reply = count_in_state(node, message, context)
        attempts = tmp_path / f"{node}"
        attempts.write_bytes(attempts.read_bytes() + b"." if attempts.exists() else b".")
        if node == 2 and attempts.stat().st_size <= times:
            os.kill(os.getpid(), signal.SIGKILL)
        return reply

    clients = RayGrid(4, app(die_at_first))
    assert counts(ask(clients, [0, 1, 2, 3])) == [1, 1, 1, 1]
    assert counts(ask(clients, [0, 1, 2, 3])) == [2, 2, 2, 2]
    assert (tmp_path / "2").stat().st_size == times + 2


def test_a_client_whose_worker_always_dies_fails_with_a_word_on_memory() -> None:
    def die(node: int, message: Message, context: Context) -> RecordDict:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    [reply] = ask(RayGrid(1, app(die)), [0])
    assert f"worker process failed {grid.RETRIES + 1} times" in reply.error.reason
    assert "backend.workers" in reply.error.reason


def test_a_client_that_hangs_is_stopped_and_its_worker_goes_on() -> None:
    def hang(node: int, message: Message, context: Context) -> RecordDict:
        if node == 1:
            time.sleep(600)
        return echo(node, message, context)

    started = time.monotonic()
    replies = ask(RayGrid(3, app(hang)), [0, 1, 2], timeout=1)
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert "backend.client_timeout_s=1 s (it was in" in replies[1].error.reason
    assert time.monotonic() - started < 60


def test_a_client_deaf_to_signals_is_killed_and_not_asked_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def deaf(node: int, message: Message, context: Context) -> RecordDict:
        (tmp_path / str(time.monotonic_ns())).touch()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        time.sleep(600)
        raise AssertionError

    [reply] = ask(RayGrid(1, app(deaf)), [0], timeout=1)
    assert "no reply within backend.client_timeout_s=1 s" in reply.error.reason
    assert len(list(tmp_path.iterdir())) == 1


def test_a_client_that_raises_answers_with_its_own_words() -> None:
    def fail(node: int, message: Message, context: Context) -> RecordDict:
        raise ValueError("no such thing as seven")

    [reply] = ask(RayGrid(1, app(fail)), [0])
    assert "no such thing as seven" in reply.error.reason
    assert "ray" not in reply.error.reason


@pytest.mark.parametrize(("share", "at_a_time"), [(1.0, 1), (0.25, 4)])
def test_clients_share_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, share: float, at_a_time: int
) -> None:
    # A client takes so little of a core that only the GPU limits how many train.
    small: Any = ray.remote(num_cpus=0.1, num_returns=2, max_retries=0, max_calls=0)(grid._answer)
    monkeypatch.setattr(grid, "_task", small)

    def stay(node: int, message: Message, context: Context) -> RecordDict:
        own = tmp_path / str(node)
        own.touch()
        deadline = time.monotonic() + 120
        most = 0
        while most < at_a_time and time.monotonic() < deadline:  # until as many are here as may be
            most = max(most, len(list(tmp_path.glob("[0-9]"))))
            time.sleep(0.01)
        time.sleep(0.3)  # one more would come in
        most = max(most, len(list(tmp_path.glob("[0-9]"))))
        own.rename(tmp_path / f"{node}.left")
        gpu = ray.get_runtime_context().get_assigned_resources()["GPU"]
        return RecordDict({"seen": ConfigRecord({"most": most, "gpu": gpu})})

    def main(clients: Grid, context: Context) -> None:
        nodes = list(range(2 * at_a_time))  # in full batches
        messages = [Message(RecordDict(), node, "train") for node in nodes]
        seen.extend(reply.content["seen"] for reply in clients.send_and_receive(messages))

    seen: list[Any] = []
    config = config_of(f"num_clients={2 * at_a_time}", f"backend.client_gpus={share}")
    server = ServerApp()
    server.main()(main)
    simulation.simulate(config, server, app(stay))
    assert [dict(each) for each in seen] == [{"most": at_a_time, "gpu": share}] * len(seen)
    assert len(seen) == 2 * at_a_time


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        (("device=auto",), 0.5),  # one GPU for two workers
        (("device=cuda", "backend.client_gpus=0.25"), 0.25),
        (("device=auto", "backend.client_gpus=0"), 0.0),
        (("device=cpu", "backend.client_gpus=0.25"), 0.0),
    ],
)
def test_the_share_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...], share: float
) -> None:
    asked = []
    monkeypatch.setattr(grid, "RayGrid", lambda *arguments: asked.append(arguments[2]))
    server = ServerApp()
    server.main()(lambda clients, context: None)
    simulation.simulate(config_of(*settings), server, app(echo))
    assert asked == [share]


def test_more_gpus_than_there_are_is_said_before_any_training() -> None:
    server = ServerApp()
    server.main()(lambda clients, context: pytest.fail("it began"))
    with pytest.raises(ConfigError, match=r"backend\.client_gpus=2\.0: must be at most 1,"):
        simulation.simulate(config_of("backend.client_gpus=2"), server, app(echo))


@pytest.mark.parametrize(
    ("gpus", "settings", "words"),
    [
        ([0, 0], ("backend.client_gpus=0.25",), "backend.client_gpus=0.25: must be at most 0,"),
        ([1, 1], ("backend.client_gpus=2",), "backend.client_gpus=2.0: must be at most 1,"),
        ([0, 4], ("backend.client_gpus=1.5",), "backend.client_gpus=1.5: must be at most 4,"),
        ([0, 4], ("backend.client_gpus=1e-5",), "backend.client_gpus=1e-05: must be at most 4,"),
        ([0, 0], ("device=cuda",), "device=cuda: Ray finds no GPU"),
    ],
)
def test_a_share_that_no_node_has(
    monkeypatch: pytest.MonkeyPatch, gpus: list[int], settings: tuple[str, ...], words: str
) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 1.0, "GPU": float(n)}} for n in gpus]
    gone = {"Alive": False, "Resources": {"CPU": 1.0, "GPU": 8.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, gone])
    with pytest.raises(ConfigError, match=re.escape(words)):
        simulation.client_gpus(config_of(*settings))


def test_workers_get_ready_on_the_gpu_that_they_share(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class GetReady:
        def options(self, num_gpus: float) -> GetReady:
            asked.append(num_gpus)
            return self

        def remote(self, run_config: str) -> None: ...

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **settings: None)  # it runs already
    monkeypatch.setattr(simulation, "_get_ready", GetReady())
    simulation.start(config_of("backend.client_gpus=0.25"))
    assert asked == [0.25]


@pytest.mark.parametrize("there", [False, True])
def test_auto_is_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert pick_device("auto").type == ("cuda" if there else "cpu")
    assert pick_device("cpu").type == "cpu"
    if there:
        assert pick_device("cuda").type == "cuda"
    else:
        with pytest.raises(ConfigError, match="device=cuda: no CUDA device is visible"):
            pick_device("cuda")
