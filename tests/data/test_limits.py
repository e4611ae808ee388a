"""The largest number of clients is the true one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbw_sweep.config.groups import DataConfig
from fedbw_sweep.data.federate import federate
from fedbw_sweep.data.tokens import Tokenize
from fedbw_sweep.errors import ConfigError
from tests.data.texts import config, text_config, to_bytes


def words(text: str) -> np.ndarray:
    """Tokens that span records: "tail" and "head" of neighbours are one token."""
    joined = text.replace("tail\nhead", "@")
    return np.frombuffer(joined.encode(), np.uint8)


def works(cfg: DataConfig, count: int, length: int, tokenize: Tokenize) -> bool:
    try:
        federate(cfg, count, length, 1, tokenize)
    except ConfigError:
        return False
    return True


def told(cfg: DataConfig, count: int, length: int, tokenize: Tokenize) -> int:
    with pytest.raises(ConfigError, match=rf"^num_clients={count}: at most \d+: ") as caught:
        federate(cfg, count, length, 1, tokenize)
    return int(str(caught.value).split("at most ")[1].partition(":")[0])


@pytest.mark.slow
@pytest.mark.parametrize("asked", [15_000, 14_999, 10_000, 5_829])
def test_point_11_shakespeare_has_5828_iid_clients(asked: int) -> None:
    cfg = config(partition="iid")
    assert told(cfg, asked, 64, to_bytes) == 5_828
    assert works(cfg, 5_828, 64, to_bytes)


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "a.csv"
    texts = [
        f"head{'x' * int(rng.integers(1, 40))}tail,{'abcdefgh'[i % 8]},{'uvw'[i % 3]}"
        for i in range(120)
    ]
    path.write_text("\n".join(["text,who,topic", *texts, ""]))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("tokenize", [to_bytes, words])
@pytest.mark.parametrize("length", [16, 60, 200, 300])
@pytest.mark.parametrize("partition", ["iid", "natural"])
def test_point_11_no_larger_number_works(
    lines: Path, partition: str, length: int, tokenize: Callable[[str], Any]
) -> None:
    """Against every number of clients, tried one by one."""
    cfg = text_config(
        lines, partition=partition, client_column="who", min_characters=0, heldout_fraction=0.3
    )
    most = max((n for n in range(1, 121) if works(cfg, n, length, tokenize)), default=0)
    assert told(cfg, 121, length, tokenize) == most


@pytest.mark.slow
@pytest.mark.parametrize("length", [60, 120])
def test_point_11_one_dirichlet_client_more_does_not_work(lines: Path, length: int) -> None:
    cfg = text_config(lines, partition="dirichlet", label_column="topic", alpha=5.0)
    most = told(cfg, 110, length, to_bytes)
    assert most > 1
    assert works(cfg, most, length, to_bytes)
    assert not works(cfg, most + 1, length, to_bytes)
