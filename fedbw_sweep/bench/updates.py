"""The updates that codecs are measured on: read from a file, or made by training clients."""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from pydantic import Field
from rich.progress import track
from safetensors import SafetensorError

from fedbw_sweep.compression.base import FloatVector, Layout, TensorSpec
from fedbw_sweep.config.groups import DataConfig, ModelConfig, TrainableConfig
from fedbw_sweep.config.section import Section
from fedbw_sweep.data.federate import federate
from fedbw_sweep.data.tokens import windows
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.model.tokenizer import load_tokenizer
from fedbw_sweep.model.trainable import build_trainable
from fedbw_sweep.model.vector import layout_of, read_arrays, write_arrays
from fedbw_sweep.seeding import rng_for
from fedbw_sweep.training.local import train


class BenchConfig(Section):
    """The keys of ``conf/codecs.yaml``, validated."""

    model: ModelConfig
    trainable: TrainableConfig
    data: DataConfig
    update: str | None
    clients: int = Field(ge=1, description="updates, at least 1")
    steps: int = Field(ge=1, description="steps, at least 1")
    batch_size: int = Field(ge=1, description="sequences, at least 1")
    sequence_length: int = Field(ge=1, description="tokens, at least 1")
    lr: float = Field(gt=0, allow_inf_nan=False, description="above 0")
    seed: int = Field(ge=0, description="at least 0")
    repeats: int = Field(ge=1, description="at least 1")
    peers: bool
    output: str
    methods: list[str]


def load_update(path: str) -> tuple[Layout, list[FloatVector]]:
    """Read one update's arrays from an ``.npz`` or ``.safetensors`` file, as float32.

    Raises
    ------
    ConfigError
        If the file is missing, unreadable, of another kind or holds no floating-point array.
    """
    file = Path(path)
    try:
        if file.suffix == ".npz":
            with np.load(file) as archive:
                arrays = dict(archive)
        elif file.suffix == ".safetensors":
            from safetensors.torch import load_file  # torch's reader knows bfloat16

            arrays = {
                name: tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
                for name, tensor in load_file(file).items()
            }
        else:
            raise ConfigError("update", path, "must be an .npz or .safetensors file")
    except (OSError, ValueError, BadZipFile, SafetensorError) as error:
        raise ConfigError("update", path, f"cannot be read: {error}") from None
    floats = {name: a for name, a in arrays.items() if np.issubdtype(a.dtype, np.floating)}
    if not floats:
        raise ConfigError("update", path, "holds no floating-point array")
    layout = Layout(tuple(TensorSpec(name, array.shape) for name, array in floats.items()))
    return layout, [np.concatenate([a.astype(np.float32).ravel() for a in floats.values()])]


def train_updates(config: BenchConfig) -> tuple[Layout, list[FloatVector]]:
    """Make each client's real update: its own text, the same initial weights."""
    text = federate(
        config.data,
        config.clients,
        config.sequence_length,
        config.seed,
        load_tokenizer(config.model),
    )
    model = build_trainable(config.model, config.trainable, config.seed)
    before, exact = read_arrays(model)
    updates = []
    for client in track(range(config.clients), "training", transient=True):
        write_arrays(model, before, exact)
        train(
            model,
            windows(text.clients[client], config.sequence_length),
            epochs=0,
            steps=config.steps,
            batch_size=config.batch_size,
            lr=config.lr,
            rng=rng_for(config.seed, "train", client),
        )
        updates.append(read_arrays(model)[0] - before)
    return layout_of(model), updates
