"""DiLoCo's outer optimizer as a Flower strategy: SGD with Nesterov momentum, which Flower lacks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg


class DiLoCo(FedAvg):
    """Take the clients' mean update as the gradient of SGD with Nesterov momentum.

    Douillard et al. 2023, arXiv:2311.08105. With ``lr=1`` and ``momentum=0`` it is `FedAvg`.

    Parameters
    ----------
    lr : float (default: 0.7)
        The outer learning rate.
    momentum : float (default: 0.9)
        Nesterov momentum.
    **settings
        Those of `FedAvg`.
    """

    def __init__(self, *, lr: float = 0.7, momentum: float = 0.9, **settings: Any) -> None:
        super().__init__(**settings)
        self.lr, self.momentum = lr, momentum
        self.model: dict[str, torch.Tensor] = {}
        self.outer: torch.optim.Optimizer | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Note the model that the round starts from."""
        if self.outer is None:
            self.model = {key: torch.tensor(array.numpy()) for key, array in arrays.items()}
            self.outer = torch.optim.SGD(
                self.model.values(), self.lr, self.momentum, nesterov=self.momentum > 0
            )
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the replies and step towards the average."""
        mean, metrics = super().aggregate_train(server_round, replies)
        if mean is None or self.outer is None:
            return mean, metrics
        for key, tensor in self.model.items():
            tensor.grad = tensor - torch.from_numpy(mean[key].numpy())
        self.outer.step()
        return ArrayRecord({k: Array(t.numpy()) for k, t in self.model.items()}), metrics
