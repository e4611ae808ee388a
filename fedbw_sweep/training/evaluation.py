"""The held-out loss."""

from __future__ import annotations

import copy
import math
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import nn

from fedbw_sweep.data.tokens import Tokens
from fedbw_sweep.model.build import drawn_from
from fedbw_sweep.training.loss import cross_entropy, device_of
from fedbw_sweep.training.state import remembers

EVALUATION_TOKENS, EVALUATION_THREADS = 1024, 8
"""Tokens per forward pass of the held-out loss (fixed, so that sums never change their order) and
the most passes at once: 1,024 x 50,304 float32 logits are 206 MB."""


def heldout_loss(model: nn.Module, windows: Tokens) -> float:
    """Mean cross-entropy in nats per token over fixed windows, shape (n, sequence_length + 1).

    Chunks of fixed size run on as many threads as there are cores, each single-threaded inside, and
    are summed in order: the result does not depend on the number of cores. A model that remembers
    what it has seen is copied first and sees one chunk after the other.
    """
    chunk_size = max(1, EVALUATION_TOKENS // (windows.shape[1] - 1))
    model.eval()
    device = device_of(model)
    alone = remembers(model, windows)
    evaluated = copy.deepcopy(model) if alone else model

    def total(start: int) -> float:
        torch.set_num_threads(1)
        chunk = torch.from_numpy(windows[start : start + chunk_size].astype(np.int64))
        with torch.inference_mode():
            losses = cross_entropy(evaluated, chunk.to(device), reduction="none")
            return float(losses.double().sum())

    starts = range(0, len(windows), chunk_size)
    if alone:
        with drawn_from(0, "evaluation", device=device):
            totals = list(map(total, starts))
    else:
        threads = 1 if device.type == "cuda" else min(EVALUATION_THREADS, os.cpu_count() or 1)
        with ThreadPoolExecutor(threads) as pool:
            totals = list(pool.map(total, starts))
    return math.fsum(totals) / windows[:, 1:].size
