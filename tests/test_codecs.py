"""The codec bench on a small update."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedbw_sweep import codecs
from fedbw_sweep.bench.measures import COLUMNS
from fedbw_sweep.config.groups import CompressionConfig
from fedbw_sweep.errors import ConfigError


def bench(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> pd.DataFrame:
    monkeypatch.setattr(
        sys,
        "argv",
        ["codecs", "repeats=1", f"output={folder}", f"hydra.run.dir={folder}", *arguments],
    )
    codecs.main()
    return pd.read_csv(folder / "codecs.csv").set_index("method")


@pytest.fixture
def update(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "update.npz"
    np.savez(
        path,
        a=rng.standard_normal((64, 100)).astype(np.float32),
        b=(rng.standard_normal(600) / 8).astype(np.float16),
        steps=np.array([3]),
    )
    return path


@pytest.mark.slow
def test_every_column_against_its_definition(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, update: Path
) -> None:
    methods = 'methods=[none,int8,"topk density=0.01 values=fp32"]'
    table = bench(monkeypatch, tmp_path, f"update={update}", methods)
    assert list(table.columns) == list(COLUMNS)[1:]
    assert table.loc["none", ["bytes", "bits", "ratio", "nmse"]].tolist() == [28_000, 32, 1, 0]
    # 7,000 coordinates in blocks of 128: 55 scales of 2 bytes, and the frame
    assert table.loc["int8", "bytes"] == 7000 + 2 * 55 + 4
    assert table.loc["int8", "bits"] == pytest.approx(8 * 7114 / 7000)
    assert 1e-6 < table.loc["int8", "nmse"] < 1e-4
    assert table.loc["int8", "percent_of_bound"] == pytest.approx(
        100 * table.loc["int8", "bound_bits"] / table.loc["int8", "bits"]
    )
    kept = table.loc["topk density=0.01 values=fp32"]
    with np.load(update) as arrays:
        vector = np.concatenate([arrays["a"].ravel(), arrays["b"].astype(np.float32)])
    squares = np.sort(vector.astype(np.float64) ** 2)
    assert kept["nmse"] == pytest.approx(squares[:-70].sum() / squares.sum(), rel=1e-6)
    import math

    assert kept["index_bound_bits"] == pytest.approx(math.log2(math.comb(7000, 70)) / 7000)
    for picture in ("rate_distortion.png", "rate_distortion.svg"):
        assert (tmp_path / picture).stat().st_size > 5_000


@pytest.mark.slow
def test_real_updates_of_several_clients(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = bench(
        monkeypatch,
        tmp_path,
        "steps=1",
        "clients=4",
        "batch_size=1",
        'methods=["eden bits=1",int4]',
    )
    assert table.loc["eden bits=1", "mean_nmse"] < table.loc["eden bits=1", "nmse"]


@pytest.mark.parametrize(
    ("method", "word"),
    [("zip", "no such method"), ("int8 bits=3", "bits=3"), ("topk densty=1", "densty")],
)
def test_a_bad_method_is_named(method: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        [choice.build() for _, choice in CompressionConfig.expand(method)]
