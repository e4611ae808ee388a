"""What travels of a model, without torch: a layout among the assets, or kept once derived."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from fedbw_sweep.compression.layout import Layout, TensorSpec
from fedbw_sweep.config.cache import cache_folder
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.config.section import PACKAGE
from fedbw_sweep.errors import ConfigError

ASSETS = PACKAGE / "assets" / "layouts"
"""One file for each choice of conf/model that lists its architecture; a test compares them."""


def find_layout(config: RunConfig) -> tuple[Layout, int]:
    """Return the layout of what travels in a run, and the bytes of what is frozen.

    A layout that is not among the assets is derived, which takes the seconds of importing torch,
    once: it is kept in the user's cache.

    Raises
    ------
    ConfigError
        If the model cannot be loaded, or has rows for fewer positions than a sequence has tokens.
    """
    found = _find(config)
    if found.positions is not None and config.sequence_length > found.positions:
        raise ConfigError(
            "sequence_length",
            config.sequence_length,
            f"the model has {found.positions} positions; lower it, or raise the model's",
        )
    return found.layout, found.frozen_bytes


class Shapes(NamedTuple):
    """What is kept of a model.

    Attributes
    ----------
    layout : Layout
        What travels.
    frozen_bytes : int
        What does not.
    positions : int or None
        Rows of its table of positions; None where it has none.
    """

    layout: Layout
    frozen_bytes: int
    positions: int | None


def _find(config: RunConfig) -> Shapes:
    name = _file_name(config)
    for path in (ASSETS / name, _cache() / name):
        with suppress(OSError, ValueError, TypeError, KeyError):  # a damaged one is made again
            return _read(path)
    from fedbw_sweep.model.trainable import shapes

    found = Shapes(*shapes(config))
    with suppress(OSError):  # nowhere to keep it
        write_layout(found, config, _cache())
    return found


def _read(path: Path) -> Shapes:
    kept = json.loads(path.read_text(encoding="utf-8"))
    tensors = (
        TensorSpec(name, tuple(shape), dtype, *tokens)
        for name, shape, dtype, *tokens in kept["tensors"]
    )
    return Shapes(Layout(tuple(tensors)), int(kept["frozen_bytes"]), kept["positions"])


def write_layout(found: Shapes, config: RunConfig, folder: Path) -> None:
    """Write the file in which `find_layout` finds a layout."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = [
        json.dumps([t.name, t.shape, t.dtype, *([True] * t.tokens)]) for t in found.layout.tensors
    ]
    text = '{{"of": {},\n"frozen_bytes": {},\n"positions": {},\n"tensors": [\n{}\n]}}\n'.format(
        _key(config), found.frozen_bytes, json.dumps(found.positions), ",\n".join(tensors)
    )
    path = folder / _file_name(config)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _key(config: RunConfig) -> str:
    """Return what decides the shapes, as JSON: the architecture, or its place, and what trains.

    Of a folder that holds weights these are its files as well, each by its size and its time.
    """
    model = config.model
    architecture: Any = model.name_or_path
    folder = Path(model.name_or_path or "")
    saved = folder / "config.json"
    if model.weights == "random" and model.architecture is not None:
        architecture = model.architecture
    elif saved.is_file():
        architecture = json.loads(saved.read_text("utf-8"))
        if model.weights == "pretrained":
            files = {path.name: path.stat() for path in sorted(folder.iterdir())}
            sizes = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in files.items()}
            architecture = [architecture, sizes]
    if model.target is not None:
        architecture = [model.target, model.weights, architecture]
    return json.dumps([architecture, config.trainable.model_dump()], sort_keys=True)


def _file_name(config: RunConfig) -> str:
    return f"{hashlib.sha256(_key(config).encode()).hexdigest()[:12]}.json"


def _cache() -> Path:
    """Where derived layouts are kept: apart for each version of what they are derived with."""
    return cache_folder() / f"transformers-{version('transformers')}"
