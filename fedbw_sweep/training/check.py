"""What a model must show before anything trains: that it fits its text and does not see ahead."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from fedbw_sweep.config.groups import ModelConfig
from fedbw_sweep.data.tokens import FederatedText
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.model.architecture import token_embedding
from fedbw_sweep.model.build import drawn_from
from fedbw_sweep.training.loss import cross_entropy

LEAK = 1e-5
"""Of how far logits move where tokens change, how far earlier ones may. Rounding moves them by less
than 1e-7; attention to all tokens, weights just drawn, by 1e-3 and more."""

SWITCHES = {"is_decoder": True, "causal": True, "attn_type": "uni", "is_causal": True}
"""Keys by which an architecture that also reads backwards is made causal."""

ATTEMPTS = 3
"""Passes that all must draw elsewhere: another thread of the process may have, in one of them."""


def check_model(model: PreTrainedModel, config: ModelConfig, text: FederatedText) -> None:
    """Try a model on one sequence of its text; the model is left as it was.

    Parameters
    ----------
    model : PreTrainedModel
        A causal LM on the CPU.
    config : ModelConfig
        What it was built from.
    text : FederatedText
        What it is to train on.

    Raises
    ------
    ConfigError
        If a token has no row in an embedding, a sequence is longer than the model's positions, the
        model fails on any sequence, its prediction of a token depends on later tokens, or it draws
        numbers outside torch's generators.
    """
    largest = max(int(text.clients.flat.max()), int(text.heldout.max()))
    rows = getattr(token_embedding(model), "num_embeddings", None)
    if rows is not None:
        _check_rows(config, largest, rows)
    tried = copy.deepcopy(model)
    tried.train(False)
    with drawn_from(0, "checked"), torch.no_grad():
        for parameter in tried.parameters():
            if not parameter.any():  # would hide what it is multiplied with
                parameter.normal_(std=0.02)
    tokens = torch.from_numpy(text.heldout[:1, :-1].astype(np.int64))
    logits = _check_length(tried, config, tokens)
    _check_rows(config, largest, logits.shape[-1])
    _check_draws(tried, config, tokens)
    _check_causal(tried.train(False), config, tokens, logits)


def check_step(model: PreTrainedModel, config: ModelConfig, text: FederatedText) -> None:
    """Do one forward and one backward pass on one sequence; the model keeps the gradients.

    Raises
    ------
    ConfigError
        If the model fails, saying what it says.
    """
    windows = torch.from_numpy(text.heldout[:1].astype(np.int64))
    try:
        with drawn_from(0, "checked"):
            loss = cross_entropy(model.train(), windows, reduction="mean")
            if loss.requires_grad:  # not if dropout left out all that trains
                loss.backward()  # type: ignore[no-untyped-call]
    except Exception as error:  # what a model's own code raises has no common base
        raise _refused(config, f"{_cannot(model, error)} in training") from None


def _logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Run a copy, so that nothing that it remembers stays."""
    with drawn_from(0, "checked"), torch.no_grad():
        logits: torch.Tensor = copy.deepcopy(model)(tokens, use_cache=False).logits
    return logits


def _check_rows(config: ModelConfig, largest: int, rows: int) -> None:
    if largest >= rows:
        raise _refused(
            config,
            f"the text has token {largest}, the model has {rows} rows of tokens, 0 to {rows - 1}; "
            "give a tokenizer that fits the model, or resize its embeddings",
        )


def _check_length(model: nn.Module, config: ModelConfig, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits, or say of which length at most they can be had."""
    try:
        return _logits(model, tokens)
    except Exception as error:  # as above
        reason = _cannot(model, error)

    def runs(length: int) -> bool:
        try:
            _logits(model, tokens[:, :length])
        except Exception:
            return False
        return True

    longest, too_long = 0, tokens.shape[1]
    while too_long - longest > 1:
        middle = (longest + too_long) // 2
        longest, too_long = (middle, too_long) if runs(middle) else (longest, middle)
    if not longest:
        raise _refused(config, reason)
    raise ConfigError(
        "sequence_length",
        tokens.shape[1],
        f"at most {longest} with {type(model).__name__}, which has no more positions; lower it, or "
        "raise the model's",
    )


def _check_causal(
    model: PreTrainedModel, config: ModelConfig, tokens: torch.Tensor, logits: torch.Tensor
) -> None:
    """Change the last tokens: no earlier logits may move."""
    first = tokens.shape[1] - max(1, tokens.shape[1] // 3)
    if not first:  # one token alone sees no other
        return
    changed = tokens.clone()
    changed[:, first:] = tokens[:, first:].flip(1).roll(1, 1)
    changed[:, first:] += (changed[:, first:] == tokens[:, first:]) * (
        1 - 2 * (tokens[:, first:] > 0)
    )
    moved = (_logits(model, changed) - logits).abs()
    earlier, later = float(moved[:, :first].max()), float(moved[:, first:].max())
    if not earlier > LEAK * later:
        return
    own = model.config.get_text_config()
    switches = [
        f"{key}={str(value).lower()}"
        for key, value in SWITCHES.items()
        if getattr(own, key, value) != value
    ]
    if config.architecture is not None and config.weights == "random":
        remedy = f"add {' '.join(f'+model.architecture.{s}' for s in switches)}" if switches else ""
    else:
        remedy = f"set {', '.join(switches)} in its config.json" if switches else ""
    raise _refused(
        config,
        f"{type(model).__name__} predicts a token from later ones too: with other tokens from "
        f"{first} on, logits before {first} moved by {earlier:.2g}. It would read the answer; "
        f"{remedy + ', or ' if remedy else ''}choose a causal architecture",
    )


def _check_draws(model: PreTrainedModel, config: ModelConfig, tokens: torch.Tensor) -> None:
    """Refuse draws that no seed of a run decides, in training and outside."""
    for training in (False, True):
        model.train(training)
        outcomes: list[torch.Tensor] = []
        drawn = None
        for _ in range(ATTEMPTS):
            found = _draws(lambda: outcomes.append(_logits(model, tokens)))  # noqa: B023
            drawn = found if drawn is None else drawn & found
            if not drawn and len(outcomes) > 1:
                break
        if not torch.allclose(outcomes[0], outcomes[1], rtol=1e-4, atol=1e-4, equal_nan=True):
            drawn = drawn or {"a source of its own"}
        if drawn:
            raise _refused(
                config,
                f"{type(model).__name__} draws numbers from {' and '.join(sorted(drawn))}, outside "
                "torch's generators, so that no seed decides its results; choose another "
                "architecture, or settings with which it draws none",
            )


def _draws(run: Callable[[], object]) -> set[str]:
    """Name the generators of the process, but for torch's, that a call draws from or seeds."""
    kept = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        random.seed(0)
        np.random.seed(987_654_321)  # noqa: NPY002  # none that a model is likely to set
        before = random.getstate(), str(np.random.get_state())  # noqa: NPY002
        run()
        after = random.getstate(), str(np.random.get_state())  # noqa: NPY002
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])  # noqa: NPY002
    names = ("Python's random", "numpy.random")
    return {name for name, a, b in zip(names, before, after, strict=True) if a != b}


def _cannot(model: nn.Module, error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"{type(model).__name__} fails on the text: {reason}"


def _refused(config: ModelConfig, why: str) -> ConfigError:
    if config.weights == "random" and config.architecture is not None:
        return ConfigError("model.architecture", config.architecture, why)
    return ConfigError("model.name_or_path", config.name_or_path, why)
