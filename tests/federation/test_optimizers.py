"""The server's step against plain NumPy, written down from the papers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from omegaconf import OmegaConf

from fedbw_sweep.config.groups import ServerConfig
from fedbw_sweep.config.section import CONF
from fedbw_sweep.federation.optimizers import ServerStep

Vector = NDArray[np.float64]
Rule = Callable[[Vector], Vector]
CHOICES = sorted(path.stem for path in (CONF / "server").glob("*.yaml"))


def step_of(name: str, **changed: float) -> ServerStep:
    values = OmegaConf.to_container(OmegaConf.load(CONF / "server" / f"{name}.yaml"))
    assert isinstance(values, dict)
    return ServerStep(ServerConfig.from_dict({**values, **changed}))  # type: ignore[dict-item]


def momentum(lr: float, decay: float, nesterov: bool) -> Rule:
    kept = np.zeros(0)

    def rule(update: Vector) -> Vector:
        nonlocal kept
        kept = decay * kept + update if kept.size else update.copy()
        return lr * (update + decay * kept if nesterov else kept)

    return rule


def adaptive(name: str, lr: float, beta_1: float, beta_2: float, tau: float) -> Rule:
    """Algorithm 2 of Reddi et al. 2020: v starts at tau squared, nothing is corrected for bias."""
    m, v = np.zeros(()), np.full((), tau**2)

    def rule(update: Vector) -> Vector:
        nonlocal m, v
        m = beta_1 * m + (1 - beta_1) * update
        if name == "fedadagrad":
            v = v + update**2
        elif name == "fedadam":
            v = beta_2 * v + (1 - beta_2) * update**2
        else:
            v = v - (1 - beta_2) * update**2 * np.sign(v - update**2)
        return lr * m / (np.sqrt(v) + tau)

    return rule


RULES: dict[str, Callable[[], Rule]] = {
    "fedavg": lambda: lambda update: update,
    "fedavgm": lambda: momentum(1.0, 0.9, False),
    "diloco": lambda: momentum(0.7, 0.9, True),
    "fedadagrad": lambda: adaptive("fedadagrad", 1e-3, 0.0, 0.0, 1e-3),
    "fedadam": lambda: adaptive("fedadam", 1e-3, 0.9, 0.99, 1e-3),
    "fedyogi": lambda: adaptive("fedyogi", 1e-3, 0.9, 0.99, 1e-3),
}


def rounds(size: int = 50) -> Iterator[Vector]:
    rng = np.random.default_rng(5)
    return (rng.normal(0, 10.0 ** rng.integers(-5, 0, size)) for _ in range(6))


def test_every_choice_is_checked() -> None:
    assert sorted(RULES) == CHOICES


@pytest.mark.parametrize("name", CHOICES)
def test_the_step_is_the_papers(name: str) -> None:
    step, rule = step_of(name), RULES[name]()
    model = np.random.default_rng(1).standard_normal(50).astype(np.float32)
    for update in rounds():
        expected = (model.astype(np.float64) + rule(update)).astype(np.float32)
        model = step(model, update.copy(), "update")
        np.testing.assert_array_almost_equal_nulp(model, expected, 1)


def test_federated_averaging_rounds_once() -> None:
    """To the last bit: the model in float32 plus the mean in float64, rounded to float32."""
    model = np.random.default_rng(2).standard_normal(50).astype(np.float32)
    for update in rounds():
        assert np.array_equal(
            step_of("fedavg")(model, update.copy(), "update"), (model + update).astype(np.float32)
        )


@pytest.mark.parametrize("name", CHOICES)
def test_mean_weights_are_the_model_plus_a_mean_update(name: str) -> None:
    model = np.random.default_rng(3).standard_normal(50).astype(np.float32)
    of_updates, of_weights = step_of(name), step_of(name)
    for update in rounds():
        after = of_weights(model, model + update, "weights")
        model = of_updates(model, update, "update")
        np.testing.assert_array_almost_equal_nulp(after, model, 1)


@pytest.mark.parametrize("name", CHOICES)
def test_a_step_goes_on_from_its_state(name: str) -> None:
    model = np.zeros(50, np.float32)
    whole, first = step_of(name), step_of(name)
    updates = list(rounds())
    for update in updates[:3]:
        first(model, update.copy(), "update")
    second: Any = step_of(name)
    second.load(first.state())
    for update in updates[:3]:
        whole(model, update.copy(), "update")
    for update in updates[3:]:
        assert np.array_equal(
            second(model, update.copy(), "update"), whole(model, update.copy(), "update")
        )
