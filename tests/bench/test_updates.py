"""A file of an update is read as what it holds, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedbw_sweep.bench.updates import load_update
from fedbw_sweep.compression.base import Layout, TensorSpec
from fedbw_sweep.errors import ConfigError


def test_a_safetensors_file(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "update.safetensors"
    save_file(
        {"w": torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16), "n": torch.ones(1).int()}, path
    )
    layout, [vector] = load_update(str(path))
    assert layout == Layout((TensorSpec("w", (1, 2)),))
    assert vector.tolist() == [1.5, -2.0]


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("none.npz", None, "cannot be read"),
        ("bad.npz", b"PK not a zip", "cannot be read"),
        ("bad.safetensors", b"\x00" * 16, "cannot be read"),
        ("update.bin", b"", "must be an .npz or .safetensors file"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: bytes | None, word: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=word):
        load_update(str(path))
