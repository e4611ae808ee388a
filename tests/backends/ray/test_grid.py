"""Flower's Grid on Ray: order, state, faults."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedbw_sweep.backends.ray import grid
from fedbw_sweep.backends.ray.grid import RayGrid

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


def test_states_larger_than_the_object_store_are_kept_on_disk(tmp_path: Path) -> None:
    size, nodes = 16 * 10**6, list(range(36))
    some, others = nodes[:16], nodes[16:]

    def note(node: int, message: Message, context: Context) -> RecordDict:
        (tmp_path / str(node)).touch()
        while len(list(tmp_path.iterdir())) < 2:  # neither worker answers alone
            time.sleep(0.01)
        held = context.state.array_records.get("notes")
        last = np.frombuffer(held["n"].data, np.int64)[-1] if held else node
        now = np.full(size // 8, last + 1000).tobytes()
        context.state["notes"] = ArrayRecord({"n": Array("int64", (size // 8,), "raw", now)})
        own = now[:8]
        return RecordDict({"arrays": ArrayRecord({"payload": Array("int64", (1,), "raw", own)})})

    clients = RayGrid(len(nodes), app(note))
    assert size * len(some) > 2 * STORE  # starts the workers, and what spills for them
    assert counts(ask(clients, some)) == [1000 + node for node in some]
    before = memory()
    assert counts(ask(clients, others)) == [1000 + node for node in others]
    grown = memory() - before
    assert grown < 0.5 * size * len(others), f"{grown:,}"
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
