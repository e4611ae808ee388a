"""pfl-research as a peer in `simulation.py`: two processes, each with the model and all the data.

pfl ships no models: every process trains its share of a round's clients, and the sums of their
updates are all-reduced. On CPUs that is torch.distributed's gloo, started by torchrun as in pfl's
own benchmarks; the first process alone evaluates.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from floor import apart, train_client
from workloads import JOB_A, WORKERS, Parts, compose

from fedbw_sweep.data.tokens import windows
from fedbw_sweep.federation.shared import federated_text
from fedbw_sweep.model import build
from fedbw_sweep.training import evaluation, process

if "TORCHELASTIC_RUN_ID" not in os.environ:
    launcher = "torch.distributed.run", "--standalone", f"--nproc-per-node={WORKERS}"
    os.execv(sys.executable, [sys.executable, "-m", *launcher, *sys.argv])

from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.internal.ops.pytorch_ops import distributed
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel


class Averaging(FederatedAveraging):  # type: ignore[misc]
    """pfl's federated averaging over our local training."""

    def __init__(self, config: Any, seed: int) -> None:
        super().__init__()
        self.config, self.seed = config, seed

    def train_one_user(
        self, initial_model_state: Any, model: PyTorchModel, user_dataset: Any, central_context: Any
    ) -> tuple[Any, Metrics]:
        train_client(
            model.pytorch_model,
            user_dataset.raw_data[0],
            self.config,
            self.seed,
            user_dataset.user_id,
            central_context.current_central_iteration + 1,
        )
        return model.get_model_difference(initial_model_state), Metrics()


class Evaluation(TrainingProcessCallback):  # type: ignore[misc]
    def __init__(self, heldout: Any) -> None:
        self.heldout, self.seconds = heldout, 0.0

    def evaluate(self, model: PyTorchModel) -> Metrics:
        if distributed.global_rank == 0:
            started = time.perf_counter()
            evaluation.heldout_loss(model.pytorch_model, self.heldout)
            self.seconds += time.perf_counter() - started
        return Metrics()

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        return self.evaluate(model)

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        return False, self.evaluate(model)


class Training:
    """Runs of a config; only the first process returns from its construction."""

    def __init__(self, *overrides: str) -> None:
        process.prepare_process()
        asyncio.set_event_loop(asyncio.new_event_loop())
        self.config = compose(*overrides)
        text = federated_text(self.config)
        self.heldout = text.heldout
        self.users = {
            client: [windows(text.clients[client], self.config.sequence_length)]
            for client in range(self.config.num_clients)
        }
        if distributed.global_rank == 0:
            atexit.register(self.agree, None)
            return
        while (seed := self.agree(None)) is not None:
            self.train(seed)
        sys.exit()

    def agree(self, seed: int | None) -> int | None:
        """Return the first process's seed in every process."""
        agreed = [seed]
        torch.distributed.broadcast_object_list(agreed)
        return agreed[0]

    def run(self, seed: int = 1) -> Parts:
        self.agree(seed)
        return self.train(seed)

    def train(self, seed: int) -> Parts:
        config = self.config
        np.random.seed(seed)  # noqa: NPY002 - pfl draws from it, alike everywhere
        self.model = build.build_model(config.model, seed)
        # pfl asks for these two, but training is ours, and so is evaluation.
        self.model.loss, self.model.metrics = None, lambda *batch: {}
        model = PyTorchModel(
            self.model,
            local_optimizer_create=torch.optim.AdamW,
            central_optimizer=torch.optim.SGD(self.model.parameters(), lr=1.0),
        )
        data = FederatedDataset.from_slices(
            self.users, get_user_sampler("minimize_reuse", list(self.users))
        )
        evaluation = Evaluation(self.heldout)
        Averaging(config, seed).run(
            backend=SimulatedBackend(data, data, postprocessors=[WeightByDatapoints()]),
            model=model,
            algorithm_params=NNAlgorithmParams(
                central_num_iterations=config.rounds,
                evaluation_frequency=config.rounds,
                train_cohort_size=config.num_clients,
                val_cohort_size=None,
            ),
            model_train_params=NNTrainHyperParams(
                local_num_epochs=config.local_epochs,
                local_learning_rate=config.lr,
                local_batch_size=config.batch_size,
            ),
            callbacks=[evaluation],
            send_metrics_to_platform=False,
        )
        return {"evaluate_seconds": evaluation.seconds}


JOBS: dict[str, Callable[[], Callable[[int], Parts]]] = {
    "pfl": lambda: Training(*JOB_A).run,
    "pfl-apart": lambda: apart(Training(*JOB_A)),
}
