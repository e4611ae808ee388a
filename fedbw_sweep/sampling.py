"""Who takes part in a round, and with what weight in the mean: one rule for everyone who asks.

The server samples by it; what the way down will cost, plans and predictions draw the same clients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedbw_sweep.errors import ConfigError
from fedbw_sweep.seeding import rng_for

Numbers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Cohort:
    """The clients of one round.

    Attributes
    ----------
    clients : ndarray of int64, shape (n,)
        Their numbers, ascending; each stands there once.
    dropped : ndarray of bool, shape (n,)
        Which of them receive the model and never reply.
    draws : ndarray of int64, shape (n,)
        How often each was drawn: more than once only where a rule draws with replacement.
    by_examples : bool
        Whether a client's weight is in proportion to its training sequences.
    """

    clients: Numbers
    dropped: NDArray[np.bool_]
    draws: Numbers
    by_examples: bool

    def __len__(self) -> int:
        return len(self.clients)

    @property
    def replying(self) -> Numbers:
        """The clients that reply."""
        return self.clients[~self.dropped]

    def weight(self, client: int, examples: int) -> int:
        """Return a client's weight in the mean, before division by the sum of all weights."""
        draws = int(self.draws[np.searchsorted(self.clients, client)])
        return draws * examples if self.by_examples else draws


@dataclass(frozen=True)
class SamplingRule(ABC):
    """Chooses a round's clients. A subclass is a choice of ``conf/sampling``."""

    by_examples: ClassVar[bool] = True
    """See `Cohort`."""
    needs_sizes: ClassVar[bool] = False
    """Whether `choose` must know how many training sequences each client has."""

    @abstractmethod
    def choose(
        self,
        server_round: int,
        num_clients: int,
        count: int,
        rng: np.random.Generator,
        sizes: Numbers | None,
    ) -> Numbers:
        """Choose `count` clients.

        Parameters
        ----------
        server_round : int
            The round, from 1.
        num_clients, count : int
            Clients that exist, and how many are chosen.
        rng : numpy.random.Generator
            The round's own.
        sizes : ndarray of int64, shape (num_clients,), or None
            Training sequences of each client; never None where `needs_sizes`.

        Returns
        -------
        ndarray of int64, shape (count,)
            Their numbers, in any order. A number may repeat: then the client has the weight of
            as many, so that `by_examples` should be False.
        """


@dataclass(frozen=True)
class Uniform(SamplingRule):
    """Every client is equally likely, and none is chosen twice (McMahan et al. 2017)."""

    def choose(
        self,
        server_round: int,
        num_clients: int,
        count: int,
        rng: np.random.Generator,
        sizes: Numbers | None,
    ) -> Numbers:
        """See `SamplingRule`."""
        return rng.choice(num_clients, count, replace=False)


@dataclass(frozen=True)
class BySize(SamplingRule):
    """A client is drawn with replacement, with a chance in proportion to its training sequences.

    The plain mean over the draws is then an unbiased estimate of the mean over all clients, each
    weighted by its sequences (Li et al. 2020, arXiv:1907.02189, scheme I).
    """

    by_examples: ClassVar[bool] = False
    needs_sizes: ClassVar[bool] = True

    def choose(
        self,
        server_round: int,
        num_clients: int,
        count: int,
        rng: np.random.Generator,
        sizes: Numbers | None,
    ) -> Numbers:
        """See `SamplingRule`."""
        assert sizes is not None
        # By whole numbers: a cumulative sum of floats would depend on how it is summed.
        ends = np.cumsum(sizes)
        return np.searchsorted(ends, rng.integers(ends[-1], size=count), side="right")


@dataclass(frozen=True)
class RoundRobin(SamplingRule):
    """Clients take turns in the order of their numbers, each as often as any other."""

    def choose(
        self,
        server_round: int,
        num_clients: int,
        count: int,
        rng: np.random.Generator,
        sizes: Numbers | None,
    ) -> Numbers:
        """See `SamplingRule`."""
        return np.arange((server_round - 1) * count, server_round * count) % num_clients


@dataclass(frozen=True, eq=False)
class Sampler:
    """A run's cohorts, each a function of the run's seed and the round alone.

    Parameters
    ----------
    rule : SamplingRule
        Who is chosen.
    seed : int
        The run's seed.
    num_clients, count : int
        Clients that exist, and how many are chosen each round.
    dropout : float
        Chance of each that it never replies.
    sizes : ndarray of int64, shape (num_clients,), optional
        Training sequences of each client, where they are known.
    """

    rule: SamplingRule
    seed: int
    num_clients: int
    count: int
    dropout: float
    sizes: Numbers | None = None

    @property
    def known(self) -> bool:
        """Whether cohorts can be told: not where a rule needs sizes that nobody has loaded."""
        return self.sizes is not None or not self.rule.needs_sizes

    def cohort(self, server_round: int) -> Cohort:
        """Draw a round's clients.

        Parameters
        ----------
        server_round : int
            The round, from 1.

        Raises
        ------
        ConfigError
            If the rule chose what are no clients.
        """
        rng = rng_for(self.seed, "sample", server_round)
        chosen = self.rule.choose(server_round, self.num_clients, self.count, rng, self.sizes)
        allowed = np.shape(chosen) == (self.count,) and np.issubdtype(chosen.dtype, np.integer)
        if not allowed or chosen.min() < 0 or chosen.max() >= self.num_clients:
            raise ConfigError(
                "sampling",
                type(self.rule).__name__,
                f"chose {chosen!r} in round {server_round}: must be {self.count} whole numbers "
                f"from 0 to {self.num_clients - 1}",
            )
        clients, draws = np.unique(chosen, return_counts=True)
        drop = rng_for(self.seed, "dropout", server_round).random(len(clients)) < self.dropout
        return Cohort(clients, drop, draws, self.rule.by_examples)

    def cohorts(self, rounds: int) -> Iterator[Cohort]:
        """Yield the cohorts of the rounds from 1 on."""
        return (self.cohort(server_round) for server_round in range(1, rounds + 1))
