"""What is used of Flower beyond what it exports: each test names what a new version has broken."""

from __future__ import annotations

import inspect
from importlib.metadata import version

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedbw_sweep.backends.base import backend_of
from fedbw_sweep.backends.flower import FlowerBackend
from fedbw_sweep.backends.ray.grid import RayGrid
from fedbw_sweep.errors import ConfigError
from tests.conftest import config_of

PINNED = "1.42.0"


def test_a_backend_is_a_class_with_the_protocols_methods() -> None:
    assert isinstance(backend_of(config_of("backend=flower").backend), FlowerBackend)
    for target, words in (("collections.Counter", "must be a Backend"), ("no.Such", "no")):
        with pytest.raises(ConfigError, match=rf"^backend\._target_={target}: .*{words}"):
            backend_of(config_of(f"backend._target_={target}").backend)


def test_the_version_is_the_one_this_was_written_for() -> None:
    assert version("flwr") == PINNED, "go through this file, then change PINNED"


def test_messages_are_made_outside_a_superlink_once_a_task_has_an_identity() -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 0, 10
    assert (TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id) == (1, 0, 10)
    message = Message(RecordDict(), 3, "train", group_id="1")
    assert message.metadata.dst_node_id == 3
    reply = Message(RecordDict(), reply_to=message)
    assert reply.metadata.src_node_id == 3, "replies are put in order by it"
    failed = Message(Error(2, "why"), reply_to=message)
    assert failed.has_error()
    assert failed.error.reason == "why"


def test_a_context_is_made_by_hand() -> None:
    names = list(inspect.signature(Context).parameters)[:5]
    assert names == ["run_id", "node_id", "node_config", "state", "run_config"]


def test_a_grid_asks_for_no_more_than_is_there() -> None:
    assert not inspect.isabstract(RayGrid), "Grid has a new abstract method"
    assert set(inspect.signature(Grid.send_and_receive).parameters) == {
        "self", "messages", "timeout",
    }  # fmt: skip


def test_an_array_holds_whatever_bytes_it_is_given() -> None:
    array = Array("uint8", (3,), "raw", b"")
    array.data = np.arange(3, dtype=np.uint8)  # type: ignore[assignment]
    record = ArrayRecord()
    record["a"] = array
    assert record["a"] is array, "a record copies: what Ray holds would be serialised"
    assert record.count_bytes() >= 3
