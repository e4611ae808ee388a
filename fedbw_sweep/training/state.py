"""What modules remember outside the arrays that travel, and models that start without it.

Some modules keep more than arrays: frequencies scaled to the longest text so far, switches that are
thrown once, weights that are rescaled for evaluation. What one client or one run leaves there must
not reach the next one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from fedbw_sweep.data.tokens import Tokens
from fedbw_sweep.model.adapters import swaps_modules
from fedbw_sweep.model.build import drawn_from
from fedbw_sweep.training.loss import device_of

_answers: WeakKeyDictionary[nn.Module, dict[tuple[bool, int], bool]] = WeakKeyDictionary()
"""Whether a model remembers, by ``model.training`` and the tokens of a sequence."""


def remembers(model: nn.Module, windows: Tokens) -> bool:
    """Say whether a forward pass leaves traces in a model, or draws numbers outside training.

    A copy is tried on one sequence, once in training and once outside, and for each length. A model
    that has ever left a trace counts as one that does.

    Parameters
    ----------
    model : nn.Module
        A causal LM that has not run on sequences of this length yet, unless it leaves no traces.
    windows : ndarray of int32, shape (n, sequence_length + 1)
        Token ids, of which the first sequence is tried.
    """
    key = model.training, windows.shape[1]
    answers = _answers.get(model, {})
    if key not in answers and not any(answers.values()) and len(windows):
        with drawn_from(0, "tried", device=device_of(model)):  # one thread at a time
            answers = _answers.setdefault(model, {})
            if key not in answers:
                answers[key] = swaps_modules(model) or bool(traces(model, windows[:1]))
    return any(answers.values())


def traces(model: nn.Module, windows: Tokens) -> list[str]:
    """Name what a forward pass of a copy of a model changes in it, or in torch's generators.

    The arrays that travel are left out in training, where they may change, and so are the
    generators, which each client seeds.
    """
    tried, inputs = copy.deepcopy(model), torch.from_numpy(windows[:, :-1].astype(np.int64))
    before = torch.random.get_rng_state()
    with torch.no_grad():
        tried(inputs.to(device_of(model)), use_cache=False)
    drew = not model.training and not torch.equal(before, torch.random.get_rng_state())
    travel = {id(array) for array in _arrays(model)} if model.training else set()
    return [*_different(model, tried, "model", {*travel}), *["torch's generator"] * drew]


def untouched(model: nn.Module) -> nn.Module:
    """Return a copy of a model in the state that the model is in, which shares what travels.

    Training the copy trains the model, which itself remembers nothing of it.
    """
    return copy.deepcopy(model, {id(array): array for array in _arrays(model)})


def keep_buffers(copied: nn.Module, model: nn.Module) -> None:
    """Copy the buffers that travel, and that a copy has put others in place of, into the model."""
    arrays = model.state_dict(keep_vars=True)
    for name, array in copied.state_dict(keep_vars=True).items():
        if array is not arrays[name]:
            arrays[name].copy_(array)


def _arrays(model: nn.Module) -> Iterable[torch.Tensor]:
    return model.state_dict(keep_vars=True).values()


def _different(one: Any, other: Any, name: str, seen: set[int]) -> list[str]:
    """Name the parts in which an object differs from its copy; `seen` need not be looked at."""
    if one is other or id(one) in seen:
        return []
    seen.add(id(one))
    if type(one) is not type(other):
        return [name]
    if isinstance(one, torch.Tensor):
        same = one.shape == other.shape and one.dtype == other.dtype
        same = same and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
        return [] if same else [name]
    if isinstance(one, np.ndarray):
        return [] if np.array_equal(one, other) else [name]
    if isinstance(one, nn.Module) or (hasattr(one, "__dict__") and not callable(one)):
        one, other = vars(one), vars(other)
    if isinstance(one, Mapping):
        if one.keys() != other.keys():
            return [f"{name}.{key}" for key in one.keys() ^ other.keys()]
        pairs: Iterable[Any] = ((f"{name}.{key}", one[key], other[key]) for key in one)
    elif isinstance(one, list | tuple):
        if len(one) != len(other):
            return [name]
        pairs = ((name, *pair) for pair in zip(one, other, strict=True))
    else:
        return [] if callable(one) or one == other else [name]
    return [found for part, a, b in pairs for found in _different(a, b, part, seen)]
