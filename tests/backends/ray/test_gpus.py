"""Clients that share GPUs. Ray shares out one here, which need not be there."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedbw_sweep.backends.ray import cluster, grid
from fedbw_sweep.backends.ray.grid import RayGrid
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.training.process import pick_device
from tests.backends.ray.test_grid import app, echo
from tests.conftest import config_of

pytestmark = [
    pytest.mark.ray,
    # Ray leaves its own processes to the end of the interpreter.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=1,
        object_store_memory=10**8,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=40,
    )
    yield
    ray.shutdown()


@pytest.mark.parametrize(("share", "at_a_time"), [(1.0, 1), (0.25, 4)])
def test_clients_share_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, share: float, at_a_time: int
) -> None:
    # A client takes so little of a core that only the GPU limits how many train.
    small: Any = ray.remote(num_cpus=0.1, num_returns=2, max_retries=0, max_calls=0)(grid._answer)
    monkeypatch.setattr(cluster, "_task", lambda function: small)

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

    config = config_of(f"num_clients={2 * at_a_time}", f"backend.client_gpus={share}")
    clients = RayGrid.of(config, app(stay))
    nodes = list(range(2 * at_a_time))  # in full batches
    messages = [Message(RecordDict(), node, "train") for node in nodes]
    seen: list[Any] = [r.content["seen"] for r in clients.send_and_receive(messages)]
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
def test_the_share_of_a_gpu(settings: tuple[str, ...], share: float) -> None:
    assert RayGrid.of(config_of(*settings), app(echo)).client_gpus == share


def test_more_gpus_than_there_are_is_said_before_any_training() -> None:
    with pytest.raises(ConfigError, match=r"backend\.client_gpus=2\.0: must be at most 1,"):
        RayGrid.of(config_of("backend.client_gpus=2"), app(echo))


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
        cluster.client_gpus(config_of(*settings))


def test_workers_get_ready_on_the_gpu_that_they_share(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def submit(function: object, arguments: list[str], gpus: float) -> None:
        asked.append(gpus)

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **settings: None)  # it runs already
    monkeypatch.setattr(cluster, "submit", submit)
    cluster.connect(config_of("backend.client_gpus=0.25"))
    assert asked == [0.25] * cluster.worker_count(cluster.alive_nodes())


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
