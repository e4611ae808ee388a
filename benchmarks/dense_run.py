"""What real federated training sends, without compression: global models, and clients' updates."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
from hydra import compose, initialize_config_dir

from fedbw_sweep.compression.layout import FloatVector, Layout
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.config.section import CONF
from fedbw_sweep.data.tokens import Tokens, windows
from fedbw_sweep.federation.average import WeightedMean
from fedbw_sweep.federation.shared import federated_text, lent_model
from fedbw_sweep.model.vector import layout_of, read_arrays, write_arrays
from fedbw_sweep.seeding import rng_for
from fedbw_sweep.training.local import train
from fedbw_sweep.training.process import prepare_process

FEDERATION = "experiment=few_bytes", "compression=none", "seed=1"
"""135 speakers, 4 a round, 20 steps."""


def config_of(*overrides: str) -> RunConfig:
    """Compose a run."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return RunConfig.from_hydra(compose("config", [*FEDERATION, *overrides]))


class DenseRun:
    """A dense run, round by round.

    Attributes
    ----------
    vector : ndarray of float32, shape (layout.size,)
        The global model after the last round.
    """

    def __init__(self, config: RunConfig) -> None:
        prepare_process()
        self.config, self._text = config, federated_text(config)
        with lent_model(config) as (model, self.vector, self._exact):
            self.layout: Layout = layout_of(model)

    def rounds(self, count: int) -> Iterator[FloatVector]:
        """Yield the global model: the initial one, and that of each round."""
        sampler = self.config.sampler()
        yield self.vector
        for number in range(1, count + 1):
            mean = WeightedMean(self.vector.size)
            for client in sampler.cohort(number).clients.tolist():
                weight = len(self._sequences(client))
                mean.add(self.update(client, number), self._exact, weight, weight)
            self.vector = self.vector + mean.take().astype(np.float32)
            yield self.vector

    def update(self, client: int, number: int) -> FloatVector:
        """Return what a client would send in a round, from the present global model."""
        config = self.config
        with lent_model(config) as (model, _, _):
            write_arrays(model, self.vector, self._exact)
            train(
                model, self._sequences(client), epochs=1, steps=config.local_steps, lr=config.lr,
                batch_size=config.batch_size, rng=rng_for(config.seed, "train", client, number),
                optimizer=partial(config.optimizer.instantiate, "optimizer"),
            )  # fmt: skip
            return read_arrays(model)[0] - self.vector

    def _sequences(self, client: int) -> Tokens:
        return windows(self._text.clients[client], self.config.sequence_length)
