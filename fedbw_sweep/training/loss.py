"""The cross-entropy of a causal LM, without its logits where its head is a plain linear layer."""

from __future__ import annotations

import copy
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from fedbw_sweep.model.build import drawn_from

OPTIONS = nn.LinearCrossEntropyOptions(batch_chunk_size=128)
"""Tokens whose logits exist at a time. torch's own choice, one token on a CPU, is 11 times slower
than whole logits are; 128 x 50,304 float32 logits are 26 MB."""
CHECKED_TOKENS = 8

_linear: WeakKeyDictionary[nn.Module, dict[bool, bool]] = WeakKeyDictionary()
"""Whether a model's logits are a linear layer of its decoder's output, by ``model.training``."""


def cross_entropy(
    model: nn.Module, windows: torch.Tensor, *, reduction: Literal["mean", "none"]
) -> torch.Tensor:
    """Compute the nats that a causal LM needs for each predicted token.

    Where `has_linear_head`, the head is evaluated and differentiated 128 tokens at a time
    (`torch.nn.functional.linear_cross_entropy`), so that the logits of all tokens are never held.

    Parameters
    ----------
    model : nn.Module
        A causal LM whose forward returns ``logits``.
    windows : Tensor of int64, shape (n, sequence_length + 1)
        Token ids on the model's device; each sequence predicts its last ``sequence_length``.
    reduction : {"mean", "none"}
        The mean over all tokens, or each token's own. A backward pass through "none" computes the
        logits a second time.

    Returns
    -------
    Tensor of float32, shape () or (n * sequence_length,)
    """
    inputs, targets = windows[:, :-1], windows[:, 1:].flatten()
    if isinstance(model, PreTrainedModel) and has_linear_head(model, inputs):
        head = _head(model)
        return F.linear_cross_entropy(
            _decoder(model)(inputs, use_cache=False).last_hidden_state.flatten(0, 1),
            head.weight,
            targets,
            linear_bias=head.bias,
            reduction=reduction,
            options=OPTIONS,
        )
    logits = model(inputs, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), targets, reduction=reduction)


def device_of(model: nn.Module) -> torch.device:
    """Return the device that a model's parameters are on."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def has_linear_head(model: PreTrainedModel, inputs: torch.Tensor) -> bool:
    """Say whether a model's logits are one linear layer of its decoder's output, and no more.

    They are not where the logits are scaled or capped, where the head has an adapter or several
    layers, or where the whole forward pass changes buffers that the decoder's does not. The model
    is tried on a few tokens, once in training and once outside, and left as it was. Its weights do
    not enter: a scale would not show while they are zero.

    Parameters
    ----------
    model : PreTrainedModel
        A causal LM.
    inputs : Tensor of int64, shape (n, sequence_length)
        Token ids, of which the first few are tried.
    """
    if type(_head(model)) is not nn.Linear:  # nor a layer that peft or torch has wrapped
        return False
    answers = _linear.get(model, {})
    if model.training not in answers:
        with drawn_from(0, "tried"), torch.no_grad():  # one thread at a time
            answers = _linear.setdefault(model, {})
            if model.training not in answers:
                answers[model.training] = _is_linear(model, inputs[:1, :CHECKED_TOKENS])
    return answers[model.training]


def _head(model: PreTrainedModel) -> Any:
    return model.get_output_embeddings()  # type: ignore[no-untyped-call]


def _decoder(model: PreTrainedModel) -> Any:
    return model.get_decoder()  # type: ignore[no-untyped-call]


def _is_linear(model: PreTrainedModel, inputs: torch.Tensor) -> bool:
    """Follow made-up values from the decoder to the head, and from the head to the logits."""
    seen: dict[str, Any] = {}

    def after_decoder(module: nn.Module, arguments: object, output: Any) -> Any:
        seen["hidden"] = getattr(output, "last_hidden_state", None)
        if seen["hidden"] is not None:
            output.last_hidden_state = seen["given"] = _ramp(seen["hidden"])
        return output

    def after_head(module: nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> Any:
        seen["taken"] = arguments[0] if arguments else None
        seen["made"] = _ramp(output)
        return seen["made"]

    if _decoder(model) in (model, _head(model)):  # some call their head the decoder
        return False
    whole, alone = copy.deepcopy(model), copy.deepcopy(model)
    _decoder(whole).register_forward_hook(after_decoder)
    _head(whole).register_forward_hook(after_head)
    with drawn_from(0, "tried", device=inputs.device):
        seen["logits"] = whole(inputs, use_cache=False).logits
    with drawn_from(0, "tried", device=inputs.device):
        hidden = _decoder(alone)(inputs, use_cache=False).last_hidden_state
    return (
        all(map(_equal, whole.buffers(), alone.buffers()))
        and _equal(seen.get("hidden"), hidden, 1e-4)  # a GPU may sum in any order
        and _equal(seen.get("given"), seen.get("taken"))
        and _equal(seen.get("made"), seen["logits"])
    )


def _ramp(like: torch.Tensor) -> torch.Tensor:
    """Fill a tensor's shape with values that any scale, shift or cap would change."""
    return torch.linspace(-50, 50, like.numel(), device=like.device).view(like.shape).to(like)


def _equal(one: torch.Tensor | None, other: torch.Tensor | None, tolerance: float = 0.0) -> bool:
    """Compare shapes and values; NaN equals NaN, so that a diverged model gets the same answer."""
    if one is None or other is None or one.shape != other.shape:
        return False
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)
