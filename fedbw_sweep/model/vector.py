"""A model as one flat vector: what of it travels, and its layout."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from fedbw_sweep.compression.layout import FloatVector, Layout, TensorSpec
from fedbw_sweep.model.architecture import token_embedding


def _arrays(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what travels: trainable parameters, tied ones once, then persistent buffers."""
    yield from ((n, p.data) for n, p in model.named_parameters() if p.requires_grad)
    persistent = model.state_dict(keep_vars=True).keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in persistent)


def _frozen(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield the parameters that do not train, tied ones once."""
    return (parameter.data for parameter in model.parameters() if not parameter.requires_grad)


def read_frozen(model: nn.Module) -> bytes:
    """Copy out a model's frozen parameters: little-endian float32, in the model's order."""
    return b"".join(
        array.float().numpy(force=True).astype("<f4", copy=False).tobytes()
        for array in _frozen(model)
    )


def frozen_parameters(model: nn.Module) -> int:
    """Count the frozen parameters."""
    return sum(array.numel() for array in _frozen(model))


def whole_model_bytes(model: nn.Module) -> int:
    """Weigh a model as it was before adapters were added: dense float32, frozen parameters too."""
    added = (p for name, p in model.named_parameters() if ".lora_" in name)
    adapters = sum(parameter.numel() for parameter in added)
    return layout_of(model).dense_bytes + 4 * (frozen_parameters(model) - adapters)


def layout_of(model: nn.Module) -> Layout:
    """Derive the layout of the arrays that travel; floating point counts as float32."""
    tokens = _of_tokens(model)
    return Layout(
        tuple(
            TensorSpec(
                name,
                tuple(array.shape),
                "float32" if array.is_floating_point() else str(array.dtype).removeprefix("torch."),
                name in tokens,
            )
            for name, array in _arrays(model)
        )
    )


def _of_tokens(model: nn.Module) -> set[str]:
    """Name the weights of the embedding of tokens and of the head."""
    if not isinstance(model, PreTrainedModel):
        return set()
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    weights = [getattr(part, "weight", None) for part in (token_embedding(model), head)]
    named = model.named_parameters()
    return {name for name, own in named if any(own is weight for weight in weights)}


def read_arrays(model: nn.Module) -> tuple[FloatVector, bytes]:
    """Copy out a model's arrays.

    Returns
    -------
    vector : ndarray of float32, shape (layout.size,)
        The floating-point arrays, flat, in layout order.
    exact : bytes, length layout.exact_bytes
        The other arrays, little-endian, in layout order.
    """
    floats, exact = [np.empty(0, np.float32)], []
    for _, array in _arrays(model):
        if array.is_floating_point():
            floats.append(array.float().numpy(force=True).ravel())
        else:
            exact.append(array.numpy(force=True).tobytes())
    return np.concatenate(floats), b"".join(exact)


def write_arrays(model: nn.Module, vector: FloatVector, exact: bytes) -> None:
    """Copy arrays into a model; the inverse of `read_arrays`."""
    source, start, exact_start = torch.from_numpy(vector), 0, 0
    for _, array in _arrays(model):
        if array.is_floating_point():
            array.copy_(source[start : start + array.numel()].view(array.shape))
            start += array.numel()
        elif array.numel():
            part = torch.frombuffer(
                bytearray(exact), dtype=array.dtype, count=array.numel(), offset=exact_start
            )
            array.copy_(part.view(array.shape))
            exact_start += array.nbytes
