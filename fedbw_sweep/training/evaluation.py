"""The held-out loss."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import nn

from fedbw_sweep.data.tokens import Tokens
from fedbw_sweep.training.loss import cross_entropy, device_of

EVALUATION_TOKENS, EVALUATION_THREADS = 1024, 8
"""Tokens per forward pass of the held-out loss (fixed, so that sums never change their order) and
the most passes at once: 1,024 x 50,304 float32 logits are 206 MB."""


def heldout_loss(model: nn.Module, windows: Tokens) -> float:
    """Mean cross-entropy in nats per token over fixed windows, shape (n, sequence_length + 1).

    Chunks of fixed size run on as many threads as there are cores, each single-threaded inside, and
    are summed in order: the result does not depend on the number of cores.
    """
    chunk_size = max(1, EVALUATION_TOKENS // (windows.shape[1] - 1))

    def total(start: int) -> float:
        torch.set_num_threads(1)
        chunk = torch.from_numpy(windows[start : start + chunk_size].astype(np.int64))
        with torch.inference_mode():
            return float(cross_entropy(model, chunk.to(device), reduction="none").double().sum())

    model.eval()
    device = device_of(model)
    threads = 1 if device.type == "cuda" else min(EVALUATION_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        totals = list(pool.map(total, range(0, len(windows), chunk_size)))
    return math.fsum(totals) / windows[:, 1:].size
