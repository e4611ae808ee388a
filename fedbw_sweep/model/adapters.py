"""Low-rank adapters beside frozen weights (LoRA: Hu et al. 2021, arXiv:2106.09685) by peft."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedbw_sweep.config.groups import TrainableLora
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.extras import require
from fedbw_sweep.model.architecture import token_embedding
from fedbw_sweep.model.build import drawn_from

ALL_LINEAR = "all-linear"
"""Every linear layer but the output embedding, and the matrices of experts."""

READ_ELSEWHERE = {
    model_type: {"out_proj"}
    for model_type in ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
}
"""Layers whose weights a model multiplies by itself, so that an adapter would not be used."""


def add_adapters(model: PreTrainedModel, lora: TrainableLora, seed: int) -> None:
    """Put peft's adapters beside the targets' weights; B starts at zero, so the model is the same.

    A linear layer gets `rank` rows of A and columns of B. The matrices of experts, which are one
    array for all experts of a block, get as many for each expert. With ``freeze_a`` only B trains
    (FFA-LoRA, Sun et al. 2024, arXiv:2403.12313), so that the mean of clients' adapters is the
    adapter of their mean.

    Raises
    ------
    ConfigError
        If a target names nothing that can have an adapter, saying which names can.
    """
    require("trainable", "lora")
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds: only where it is used

    layers, experts = _resolve(model, lora.targets)
    transposed = any(isinstance(module, Conv1D) for module in model.modules())  # as GPT-2's are
    adapters = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # a float is as good
        # Whole names: by their last parts peft may find others, or names of its own.
        target_modules=layers,
        target_parameters=experts or None,
        fan_in_fan_out=transposed,
    )
    try:
        with drawn_from(seed, "lora"):
            inject_adapter_in_model(adapters, model)
    except ValueError as error:
        raise ConfigError("trainable.targets", lora.targets, f"{error}; {_give(model)}") from None
    if lora.freeze_a:
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)


def swaps_modules(model: nn.Module) -> bool:
    """Say whether a forward pass puts other arrays in a module's place while it lasts.

    peft does so where an array of experts has an adapter. Two threads must not do so at a time.
    """
    return any(type(module).__name__ == "ParamWrapper" for module in model.modules())


def _resolve(model: PreTrainedModel, targets: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Return the whole names of the layers, and of the experts' arrays, that targets name."""
    layers, experts = list(_layers(model)), list(_experts(model))
    if targets is None:
        targets = _default(model)
    if not targets:
        raise ConfigError("trainable.targets", targets, f"names no layer; {_give(model)}")
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    found: set[str] = set()
    for target in targets:
        if target == ALL_LINEAR:
            named = {name for name in layers if model.get_submodule(name) is not head} | {*experts}
        else:
            named = {n for n in [*layers, *experts] if n == target or n.endswith(f".{target}")}
        if not named:
            raise ConfigError(
                "trainable.targets",
                list(targets),
                f"{type(model).__name__} has no linear layer {target} with weights of its own; "
                + _give(model),
            )
        found |= named
    return [name for name in layers if name in found], [name for name in experts if name in found]


def _layers(model: PreTrainedModel) -> Iterator[str]:
    """Name the linear layers that can have an adapter."""
    tied = getattr(token_embedding(model), "weight", None)  # an adapter would change both uses
    elsewhere = READ_ELSEWHERE.get(str(model.config.model_type), set())
    for name, module in model.named_modules():
        can = isinstance(module, nn.Linear | Conv1D) and module.weight is not tied
        if can and name.rpartition(".")[2] not in elsewhere:
            yield name


def _experts(model: PreTrainedModel) -> Iterator[str]:
    """Name the arrays that hold a matrix for each expert, shape (experts, rows, columns)."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 and "experts" in name.split("."):
            yield name


def _default(model: PreTrainedModel) -> list[str]:
    """Return what peft adapts where it is not told what: layers of attention."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    named = DEFAULTS.get(str(model.config.model_type))
    if not isinstance(named, list):
        raise ConfigError(
            "trainable.targets",
            None,
            f"peft has no choice of layers for {type(model).__name__}; {_give(model)}",
        )
    return named


def _give(model: PreTrainedModel) -> str:
    names = sorted({name.rpartition(".")[2] for name in [*_layers(model), *_experts(model)]})
    return f"give [{ALL_LINEAR}], any of {', '.join(names)}, or null for peft's choice"
