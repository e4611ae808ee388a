"""BlazeFL as a peer in `simulation.py`: its server handler and both of its pools of clients.

Written as BlazeFL's examples are: each client starts from a model of the selector and answers with
its whole model, and a pool of threads or of (forked) processes is started every round. A process's
answer comes back through shared memory. Runs on BlazeFL 2 and 3.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.multiprocessing as mp
from blazefl.contrib import FedAvgBaseServerHandler
from blazefl.core import (
    ProcessPoolClientTrainer,
    SHMHandle,
    ThreadPoolClientTrainer,
    deserialize_model,
    serialize_model,
)
from floor import apart, train_client
from torch import nn
from workloads import (
    ECHO_BYTES,
    ECHO_CLIENTS,
    ECHO_ROUNDS,
    JOB_A,
    NO_STEP,
    WORKERS,
    Parts,
    compose,
)

from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.data.tokens import windows
from fedbw_sweep.federation.shared import federated_text
from fedbw_sweep.model import build
from fedbw_sweep.training import evaluation, process


@dataclass
class Downlink:
    model_parameters: torch.Tensor
    round: int


@dataclass
class Uplink:
    cid: int
    model_parameters: torch.Tensor | SHMHandle
    data_size: int


@lru_cache(maxsize=1)
def initial_model(config: str) -> nn.Module:
    """Build a run's model once; forked processes have it too."""
    run = RunConfig.model_validate_json(config)
    return build.build_model(run.model, run.seed)


class TrainedModel:
    """Clients that train: what BlazeFL's examples give to a worker, small to pickle."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def select_model(self, model_name: str) -> nn.Module:
        return copy.deepcopy(initial_model(self.config.model_dump_json(by_alias=True)))

    def client(self, cid: int, payload: Downlink) -> Uplink:
        config = self.config
        torch.set_num_threads(1)
        sequences = windows(federated_text(config).clients[cid], config.sequence_length)
        model = self.select_model("")
        deserialize_model(model, payload.model_parameters)
        train_client(model, sequences, config, config.seed, cid, payload.round)
        return Uplink(cid, serialize_model(model), len(sequences))

    def evaluate(self, model: nn.Module) -> None:
        evaluation.heldout_loss(model, federated_text(self.config).heldout)


class EchoedModel:
    """Clients that send back what they received."""

    def select_model(self, model_name: str) -> nn.Module:
        return nn.ParameterList([torch.ones(ECHO_BYTES // 4)])

    def client(self, cid: int, payload: Downlink) -> Uplink:
        return Uplink(cid, payload.model_parameters.clone(), 1)

    def evaluate(self, model: nn.Module) -> None:
        assert torch.isclose(next(model.parameters())[0], torch.tensor(1.0))


Task = TrainedModel | EchoedModel


class Server(FedAvgBaseServerHandler):  # type: ignore[misc]
    """BlazeFL's federated averaging, all clients in each round."""

    def __init__(self, task: Task, clients: int, rounds: int, seed: int) -> None:
        super().__init__(
            model_selector=task,
            model_name="",
            dataset=None,
            global_round=rounds,
            num_clients=clients,
            sample_ratio=1.0,
            device="cpu",
            batch_size=0,
            seed=seed,
        )

    def downlink_package(self) -> Downlink:
        return Downlink(serialize_model(self.model), self.round + 1)


class Threads(ThreadPoolClientTrainer):  # type: ignore[misc]
    def __init__(self, task: Task, model: nn.Module) -> None:
        self.task, self.num_parallels, self.device, self.device_count = task, WORKERS, "cpu", 0
        self.cache: list[Uplink] = []
        self.stop_event = threading.Event()

    def worker(self, cid: int, device: str, payload: Downlink, stop_event: Any) -> Uplink:
        return self.task.client(cid, payload)

    def uplink_package(self) -> list[Uplink]:
        package, self.cache = self.cache, []
        return package


class Processes(ProcessPoolClientTrainer):  # type: ignore[misc]
    ipc_mode = "SHARED_MEMORY"  # BlazeFL 2 has another, slower one; 3 has this alone

    def __init__(self, task: Task, model: nn.Module) -> None:
        self.task, self.num_parallels, self.device, self.device_count = task, WORKERS, "cpu", 0
        self.cache: list[Uplink] = []
        self.manager = mp.Manager()
        self.stop_event = self.manager.Event()
        self.buffer = serialize_model(model)

    def get_client_config(self, cid: int) -> tuple[Task, int]:
        return self.task, cid

    def prepare_uplink_package_buffer(self) -> Uplink:
        return Uplink(-1, self.buffer.clone(), 0)

    def convert_buffer_to_uplink(self, buffer: Uplink) -> Uplink:
        return buffer

    @staticmethod
    def worker(
        config: tuple[Task, int],
        payload: Downlink,
        device: str,
        stop_event: Any,
        *,
        shm_buffer: Uplink,
    ) -> Uplink:
        task, cid = config
        package = task.client(cid, payload)
        shm_buffer.model_parameters.copy_(package.model_parameters)
        package.model_parameters = SHMHandle()
        return package

    def uplink_package(self) -> list[Uplink]:
        package, self.cache = self.cache, []
        return package


def pipeline(
    pool: type[Threads | Processes], task: Task, clients: int, rounds: int, seed: int
) -> tuple[nn.Module, Parts]:
    """Do a run as the examples do; return the final model and the seconds spent evaluating."""
    evaluating = 0.0

    def evaluate() -> None:
        nonlocal evaluating
        started = time.perf_counter()
        task.evaluate(server.model)
        evaluating += time.perf_counter() - started

    server = Server(task, clients, rounds, seed)
    trainer = pool(task, server.model)
    evaluate()
    while server.round < server.global_round:
        sampled, broadcast = server.sample_clients(), server.downlink_package()
        trainer.local_process(broadcast, sampled)
        for package in trainer.uplink_package():
            server.load(package)
        evaluate()
    return server.model, {"evaluate_seconds": evaluating}


class Training:
    """Runs of a config, the text at hand."""

    def __init__(self, pool: type[Threads | Processes], *overrides: str) -> None:
        process.prepare_process()
        self.pool, self.config = pool, compose(*overrides)
        federated_text(self.config)

    def run(self, seed: int = 1) -> Parts:
        task = TrainedModel(self.config.model_copy(update={"seed": seed}))
        self.model, parts = pipeline(
            self.pool, task, self.config.num_clients, self.config.rounds, seed
        )
        return parts


def echoing(pool: type[Threads | Processes]) -> Callable[[int], Parts]:
    torch.set_num_threads(1)  # no more: with glibc told to keep memory, this would grow and slow
    return lambda seed: pipeline(pool, EchoedModel(), ECHO_CLIENTS, ECHO_ROUNDS, seed)[1]


JOBS: dict[str, Callable[[], Callable[[int], Parts]]] = {
    "blazefl-threads": lambda: Training(Threads, *JOB_A).run,
    "blazefl-processes": lambda: Training(Processes, *JOB_A).run,
    "blazefl-threads-apart": lambda: apart(Training(Threads, *JOB_A)),
    "blazefl-processes-apart": lambda: apart(Training(Processes, *JOB_A)),
    "blazefl-threads-echo": lambda: echoing(Threads),
    "blazefl-processes-echo": lambda: echoing(Processes),
    "blazefl-threads-fixed": lambda: Training(Threads, *NO_STEP).run,
    "blazefl-processes-fixed": lambda: Training(Processes, *NO_STEP).run,
}
