"""What travels of a model, without torch: a layout among the assets, or kept once derived."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedbw_sweep.compression.layout import Layout, TensorSpec
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.config.section import PACKAGE

ASSETS = PACKAGE / "assets" / "layouts"
"""One file for each choice of conf/model that lists its architecture; a test compares them."""


def find_layout(config: RunConfig) -> tuple[Layout, int]:
    """Return the layout of what travels in a run, and the bytes of what is frozen.

    A layout that is not among the assets is derived from shapes alone, whatever the model's size.
    That takes the seconds of importing torch, once: it is kept in the user's cache.

    Raises
    ------
    ConfigError
        If the architecture cannot be loaded.
    """
    name = _file_name(config)
    if (ASSETS / name).is_file():
        return read_layout(ASSETS / name)
    kept = _cache() / name
    with suppress(OSError, ValueError, TypeError):  # a damaged one is made again
        return read_layout(kept)
    from fedbw_sweep.model.trainable import shapes

    found = shapes(config)
    with suppress(OSError):  # nowhere to keep it
        write_layout(*found, config, kept.parent)
    return found


def read_layout(path: Path) -> tuple[Layout, int]:
    """Read what `write_layout` wrote."""
    kept = json.loads(path.read_text(encoding="utf-8"))
    tensors = (TensorSpec(name, tuple(shape), dtype) for name, shape, dtype in kept["tensors"])
    return Layout(tuple(tensors)), int(kept["frozen_bytes"])


def write_layout(layout: Layout, frozen_bytes: int, config: RunConfig, folder: Path) -> None:
    """Write the file in which `find_layout` finds a layout."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = [json.dumps([t.name, t.shape, t.dtype]) for t in layout.tensors]
    text = '{{"of": {},\n"frozen_bytes": {},\n"tensors": [\n{}\n]}}\n'.format(
        _key(config), frozen_bytes, ",\n".join(tensors)
    )
    path = folder / _file_name(config)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _key(config: RunConfig) -> str:
    """Return what decides the shapes, as JSON: the architecture, or its place, and what trains."""
    model = config.model
    architecture: Any = model.name_or_path
    saved = Path(model.name_or_path or "") / "config.json"
    if model.weights == "random" and model.architecture is not None:
        architecture = model.architecture
    elif saved.is_file():
        architecture = json.loads(saved.read_text("utf-8"))
    if model.target is not None:
        architecture = [model.target, model.weights, architecture]
    return json.dumps([architecture, config.trainable.model_dump()], sort_keys=True)


def _file_name(config: RunConfig) -> str:
    return f"{hashlib.sha256(_key(config).encode()).hexdigest()[:12]}.json"


def _cache() -> Path:
    """Where derived layouts are kept: apart for each version of what they are derived with."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "fedbw_sweep" / f"transformers-{version('transformers')}"
