"""A client's local steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from fedbw_sweep.data.tokens import Tokens
from fedbw_sweep.errors import DivergenceError
from fedbw_sweep.training.loss import cross_entropy, device_of
from fedbw_sweep.training.state import keep_buffers, remembers, untouched

ADAMW = partial(torch.optim.AdamW, fused=True)


@dataclass(frozen=True)
class LocalTraining:
    """What one client did in one round: mean `loss` in nats per token, `steps` taken."""

    loss: float
    steps: int


def train(
    model: nn.Module,
    windows: Tokens,
    *,
    epochs: int,
    steps: int | None,
    batch_size: int,
    lr: float,
    rng: np.random.Generator,
    optimizer: Callable[..., torch.optim.Optimizer] = ADAMW,
    proximal_mu: float = 0.0,
) -> LocalTraining:
    """Train in place at a constant learning rate, the optimizer's state fresh.

    Parameters
    ----------
    model : nn.Module
        A causal LM whose forward returns ``logits``.
    windows : ndarray of int32, shape (n, sequence_length + 1)
        The client's training sequences; each predicts its last ``sequence_length`` tokens.
    epochs : int
        Passes over `windows`, each in a new random order.
    steps : int or None
        When set, exactly this many steps instead of `epochs`.
    batch_size : int
        Sequences per step; the last batch of a pass may be smaller.
    lr : float
        Learning rate.
    rng : numpy.random.Generator
        Draws the orders, and the seed of any dropout.
    optimizer : callable
        ``optimizer(parameters, lr=lr)`` makes it.
    proximal_mu : float
        Adds ``proximal_mu / 2 * |w - w0|^2`` to what is minimised, ``w0`` being the weights that
        training starts from (FedProx: Li et al. 2020, arXiv:1812.06127). The loss that is returned
        is without it.

    Raises
    ------
    DivergenceError
        As soon as the loss is NaN or infinite.
    """
    losses: list[float] = []
    device = device_of(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed = int(rng.integers(2**63))
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        model.train()
        trained = untouched(model) if remembers(model, windows) else model
        trainable = [p for p in model.parameters() if p.requires_grad]
        stepper = optimizer(trainable, lr=lr)
        start = [p.detach().clone() for p in trainable] if proximal_mu else []
        for batch in _batches(windows, epochs, steps, batch_size, rng):
            loss = cross_entropy(trained, batch.to(device), reduction="mean")
            if not math.isfinite(loss.item()):
                raise DivergenceError(f"loss is {loss.item()} after {len(losses)} steps; lower lr")
            losses.append(loss.item())
            stepper.zero_grad()
            if loss.requires_grad:  # not if this step skips all layers that train
                loss.backward()  # type: ignore[no-untyped-call]
            for parameter, received in zip(trainable, start, strict=False):
                if parameter.grad is None:  # a layer that this step skips is pulled back as well
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad.add_(parameter.detach() - received, alpha=proximal_mu)
            stepper.step()
        stepper.zero_grad()  # frees the gradients: as much memory as the model
        if trained is not model:
            keep_buffers(trained, model)
    return LocalTraining(float(np.mean(losses)) if losses else math.nan, len(losses))


def _batches(
    windows: Tokens, epochs: int, steps: int | None, batch_size: int, rng: np.random.Generator
) -> Iterator[torch.Tensor]:
    per_epoch = -(-len(windows) // batch_size)
    remaining = epochs * per_epoch if steps is None else steps
    while remaining > 0:
        order = rng.permutation(len(windows))
        for start in range(0, len(windows), batch_size)[:remaining]:
            chosen = windows[order[start : start + batch_size]]
            yield torch.from_numpy(chosen.astype(np.int64))
        remaining -= per_epoch
