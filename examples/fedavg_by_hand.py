"""Federated averaging by hand (McMahan et al. 2017, arXiv:1602.05629, Algorithm 1).

It sends the same bytes and reaches the same losses as ``python -m fedbw_sweep`` with the same
overrides: python examples/fedavg_by_hand.py model=tiny compression=int8 num_clients=8 rounds=3
"""

import sys

import numpy as np
from hydra import compose, initialize_config_dir

from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.config.section import CONF
from fedbw_sweep.data.tokens import windows
from fedbw_sweep.federation.shared import federated_text
from fedbw_sweep.model.build import build_model
from fedbw_sweep.model.vector import layout_of, read_arrays, write_arrays
from fedbw_sweep.seeding import rng_for
from fedbw_sweep.training.evaluation import heldout_loss
from fedbw_sweep.training.local import train


def fedavg(config: RunConfig) -> tuple[list[float], int]:
    """Return the held-out loss of each round in nats per token, and the bytes sent up in all."""
    text, compressor = federated_text(config), config.compression.build()
    model = build_model(config.model, config.seed)
    layout, (weights, exact) = layout_of(model), read_arrays(model)
    losses, sent, seed = [heldout_loss(model, text.heldout)], 0, config.seed
    for number in range(1, config.rounds + 1):
        updates, examples = [], []
        for client in config.sampler().cohort(number).clients.tolist():
            sequences = windows(text.clients[client], config.sequence_length)
            write_arrays(model, weights, exact)
            rng = rng_for(seed, "train", client, number)
            steps = {"epochs": config.local_epochs, "steps": config.local_steps}
            train(model, sequences, **steps, batch_size=config.batch_size, lr=config.lr, rng=rng)
            update = read_arrays(model)[0] - weights
            payload = compressor.encode(update, layout, rng_for(seed, "encode", client, number))
            updates.append(compressor.decode(payload, layout))
            examples.append(len(sequences))
            sent += len(payload)
        mean = np.average(np.array(updates, np.float64), axis=0, weights=examples)
        weights = (weights + mean).astype(np.float32)
        write_arrays(model, weights, exact)
        losses.append(heldout_loss(model, text.heldout))
    return losses, sent


if __name__ == "__main__":
    with initialize_config_dir(str(CONF), version_base="1.3"):
        losses, sent = fedavg(RunConfig.from_hydra(compose("config", sys.argv[1:])))
    for number, loss in enumerate(losses):
        print(f"round {number}: held-out loss {loss:.3f}")
    print(f"{sent:,} bytes up")
