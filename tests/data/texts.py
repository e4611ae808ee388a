"""Configs and texts that the tests of data share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedbw_sweep.config.defaults import choice
from fedbw_sweep.config.groups import DataConfig

LENGTH = 16


def config(**changes: Any) -> DataConfig:
    values: dict[str, Any] = {
        "name": "shakespeare",
        "partition": "natural",
        "alpha": 0.5,
        "min_characters": 2000,
        "heldout_fraction": 0.1,
        "heldout_tokens": 1024,
    }
    values |= changes
    target = (choice("data", values["name"]) or {})["_target_"]
    return DataConfig(**{"_target_": target, **values})


def text_config(file: Path, **changes: Any) -> DataConfig:
    return config(**{"name": "text", "path": str(file), "partition": "iid", **changes})


def to_bytes(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode(), np.uint8)


def decoded(tokens: NDArray[np.int32]) -> str:
    return bytes(tokens.astype(np.uint8)).decode()


def lines_of(tokens: NDArray[np.int32]) -> list[str]:
    return decoded(tokens).split("\n")
