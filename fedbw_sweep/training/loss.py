"""The loss of a causal LM."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def device_of(model: nn.Module) -> torch.device:
    """Return the device that a model's parameters are on."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def cross_entropy(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Nats of each predicted token, flat."""
    logits = model(windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
