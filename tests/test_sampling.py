"""Sampling rules: who takes part, with what weight, the same for all who ask."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbw_sweep.config.defaults import offered
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.sampling import BySize, Numbers, RoundRobin, Sampler, SamplingRule, Uniform
from tests.conftest import config_of

RULES = [config_of(f"sampling={name}").sampler().rule for name in offered("sampling")]
SIZES = np.array([1, 2, 3, 4, 90])


@given(
    st.sampled_from(RULES),
    st.integers(0, 2**32),
    st.integers(1, 40),
    st.data(),
)
def test_what_holds_for_every_rule(
    rule: SamplingRule, seed: int, num_clients: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, num_clients))
    sizes = np.array(
        data.draw(st.lists(st.integers(1, 99), min_size=num_clients, max_size=num_clients))
    )
    sampler = Sampler(rule, seed, num_clients, count, 0.3, sizes)
    for cohort, again in zip(sampler.cohorts(3), sampler.cohorts(3), strict=True):
        assert np.array_equal(cohort.clients, again.clients)
        assert np.array_equal(cohort.dropped, again.dropped)
        assert np.all(np.diff(cohort.clients) > 0)
        assert cohort.clients[0] >= 0
        assert cohort.clients[-1] < num_clients
        assert cohort.draws.sum() == count
        assert len(cohort.dropped) == len(cohort)
        if rule.by_examples:
            assert len(cohort) == count


def test_uniform_weights_are_training_sequences() -> None:
    cohort = Sampler(Uniform(), 1, 5, 3, 0.0).cohort(1)
    for client in cohort.clients.tolist():
        assert cohort.weight(client, 7) == 7


@pytest.mark.slow
def test_every_client_is_as_likely_as_any_other() -> None:
    sampler = Sampler(Uniform(), 3, 5, 2, 0.0)
    seen = Counter(c for cohort in sampler.cohorts(5000) for c in cohort.clients.tolist())
    # Binomial(5000, 2/5): the deviation is 35, so that 5 of them are 173.
    assert all(abs(n - 2000) < 173 for n in seen.values())


@pytest.mark.slow
def test_the_mean_over_draws_by_size_is_unbiased() -> None:
    """The estimate's mean over many rounds is the mean over all clients, weighted by sequences."""
    updates = np.array([1.0, -2.0, 4.0, 8.0, 0.5])
    exact = SIZES @ updates / SIZES.sum()
    sampler = Sampler(BySize(), 1, 5, 4, 0.0, SIZES)
    estimates = []
    for cohort in sampler.cohorts(4000):
        weights = np.array([cohort.weight(c, int(SIZES[c])) for c in cohort.clients.tolist()])
        assert weights.sum() == 4
        estimates.append(weights @ updates[cohort.clients] / weights.sum())
    deviation = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - exact) < 5 * deviation
    assert deviation < 0.02 * abs(updates).max()


def test_a_client_drawn_twice_counts_twice() -> None:
    cohort = Sampler(BySize(), 1, 5, 20, 0.0, SIZES).cohort(1)
    assert cohort.draws[-1] > 1
    assert cohort.weight(4, 90) == cohort.draws[-1]


def test_clients_take_turns() -> None:
    cohorts = Sampler(RoundRobin(), 1, 5, 2, 0.0).cohorts(5)
    assert [cohort.clients.tolist() for cohort in cohorts] == [
        [0, 1],
        [2, 3],
        [0, 4],
        [1, 2],
        [3, 4],
    ]


def test_cohorts_are_unknown_without_the_sizes_that_a_rule_needs() -> None:
    assert not Sampler(BySize(), 1, 5, 2, 0.0).known
    assert Sampler(BySize(), 1, 5, 2, 0.0, SIZES).known
    assert Sampler(RoundRobin(), 1, 5, 2, 0.0).known


def test_a_rule_is_chosen_by_config(run_config: Callable[..., RunConfig]) -> None:
    assert run_config().sampler().rule == Uniform()
    assert run_config("sampling=by_size").sampler(SIZES).rule == BySize()
    with pytest.raises(ConfigError, match=r"sampling\._target_=collections\.Counter: must be"):
        run_config("sampling._target_=collections.Counter")
    with pytest.raises(ConfigError, match=r"sampling=uniform: .*count"):
        run_config("+sampling.count=3")


@dataclass(frozen=True)
class Wrong(SamplingRule):
    chosen: tuple[float, ...]

    def choose(self, *arguments: Any) -> Numbers:
        return np.array(self.chosen)


@pytest.mark.parametrize("chosen", [(0, 4), (-1, 0), (1,), (0, 1, 2), (0.0, 1.0)])
def test_a_rule_that_chooses_what_are_no_clients_is_refused(chosen: tuple[float, ...]) -> None:
    sampler = Sampler(Wrong(chosen), seed=1, num_clients=4, count=2, dropout=0.0)
    with pytest.raises(ConfigError, match=r"sampling=Wrong: .* must be 2 whole numbers"):
        sampler.cohort(1)
