"""The server's step: an optimizer on the negative mean update (FedOpt, Reddi et al. 2020).

Any `torch.optim.Optimizer` will do. With `torch.optim.SGD` at a learning rate of 1 the step is
federated averaging, with momentum it is FedAvgM, with Nesterov momentum DiLoCo's outer step. The
adaptive rules of FedOpt's Algorithm 2 (arXiv:2003.00295) are here, since PyTorch's own Adam and
Adagrad are others: they correct the bias of their means, and start the second moment from zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedbw_sweep.compression.layout import FloatVector
from fedbw_sweep.config.groups import ServerConfig
from fedbw_sweep.errors import ConfigError


class _Adaptive(torch.optim.Optimizer, ABC):
    """``x += lr * m / (sqrt(v) + tau)`` with the mean update m and a second moment v from tau².

    Parameters
    ----------
    params : iterable of torch.Tensor
        The model.
    lr : float
        The server's learning rate: about how far a coordinate moves in a round.
    beta_1 : float
        Decay of the running mean of updates, a round.
    beta_2 : float
        Decay of the second moment, a round; Adagrad has none.
    tau : float
        Degree of adaptivity: updates much smaller than it are not scaled up.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        *,
        lr: float = 1e-3,
        beta_1: float = 0.9,
        beta_2: float = 0.99,
        tau: float = 1e-3,
    ) -> None:
        super().__init__(params, {"lr": lr, "beta_1": beta_1, "beta_2": beta_2, "tau": tau})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every parameter by one step of the rule."""
        for group in self.param_groups:
            for x in group["params"]:
                state, tau = self.state[x], group["tau"]
                if not state:
                    state["m"], state["v"] = torch.zeros_like(x), torch.full_like(x, tau**2)
                m, v, update = state["m"], state["v"], -x.grad
                m.mul_(group["beta_1"]).add_(update, alpha=1 - group["beta_1"])
                self._adapt(v, update.square_(), group["beta_2"])
                x.addcdiv_(m, v.sqrt().add_(tau), value=group["lr"])

    @staticmethod
    @abstractmethod
    def _adapt(v: torch.Tensor, square: torch.Tensor, beta_2: float) -> None:
        """Bring the second moment up to date with this round's squares, in place."""


class FedAdagrad(_Adaptive):
    """Adagrad on the server: ``v += update²``; see `_Adaptive`."""

    @staticmethod
    def _adapt(v: torch.Tensor, square: torch.Tensor, beta_2: float) -> None:
        v.add_(square)


class FedAdam(_Adaptive):
    """Adam on the server: ``v = beta_2 v + (1 - beta_2) update²``; see `_Adaptive`."""

    @staticmethod
    def _adapt(v: torch.Tensor, square: torch.Tensor, beta_2: float) -> None:
        v.mul_(beta_2).add_(square, alpha=1 - beta_2)


class FedYogi(_Adaptive):
    """Yogi on the server: ``v -= (1 - beta_2) update² sign(v - update²)``; see `_Adaptive`."""

    @staticmethod
    def _adapt(v: torch.Tensor, square: torch.Tensor, beta_2: float) -> None:
        v.sub_(square.mul(torch.sign(v - square)), alpha=1 - beta_2)


class ServerStep:
    """Makes the next global model of the last one and the clients' mean, in float64.

    Parameters
    ----------
    config : ServerConfig
        Which optimizer.

    Raises
    ------
    ConfigError
        If ``server`` names no optimizer, or one that refuses its parameters.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.model = torch.zeros(1, dtype=torch.float64)
        self.optimizer = config.instantiate("server", [self.model])
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise ConfigError("server._target_", config.target, "must be a torch.optim.Optimizer")

    def __call__(self, vector: FloatVector, mean: NDArray[np.float64], upload: str) -> FloatVector:
        """Take one step.

        Parameters
        ----------
        vector : ndarray of float32, shape (size,)
            The global model that the round began with.
        mean : ndarray of float64, shape (size,)
            The clients' mean update, or with ``upload=weights`` their mean weights. Overwritten.
        upload : {"update", "weights"}
            Which of the two.

        Returns
        -------
        ndarray of float32, shape (size,)
            The next global model; it may hold infinities.
        """
        self.model.data = torch.from_numpy(vector.astype(np.float64))
        gradient = torch.from_numpy(mean)
        if upload == "weights":
            gradient.sub_(self.model)
        self.model.grad = gradient.neg_()
        self.optimizer.step()
        self.model.grad = None
        with np.errstate(over="ignore", invalid="ignore"):
            return self.model.numpy().astype(np.float32)

    @property
    def keeps(self) -> bool:
        """Whether the optimizer keeps anything between rounds, which a step changes in place."""
        return bool(self.optimizer.state)

    def state(self) -> dict[str, Any]:
        """Return what the optimizer keeps between rounds; arrays share its memory."""
        kept: dict[str, Any] = self.optimizer.state_dict()
        return _mapped(kept, torch.Tensor, lambda tensor: tensor.numpy())  # type: ignore[no-any-return]

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.optimizer.load_state_dict(_mapped(state, np.ndarray, torch.as_tensor))


def _mapped(tree: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """Change what is of one kind in nested dictionaries and lists."""
    if isinstance(tree, dict):
        return {key: _mapped(value, kind, change) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_mapped(value, kind, change) for value in tree]
    return change(tree) if isinstance(tree, kind) else tree
