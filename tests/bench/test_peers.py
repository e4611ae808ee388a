"""Other packages' codecs: those that are installed, and what is said of those that fail."""

from __future__ import annotations

import numpy as np
import pytest

from fedbw_sweep.bench import peers
from fedbw_sweep.bench.measures import error
from fedbw_sweep.compression.layout import FloatVector, Layout, TensorSpec

LAYOUT = Layout((TensorSpec("a", (40, 51)), TensorSpec("bias", (40,)), TensorSpec("b", (7, 300))))
"""Sizes that are multiples of no block; one tensor so small that peers send it as it is."""

LOSSLESS = {"blosc2 zstd+shuffle", "zipnn", "zstandard level 3"}

EXPECTED = {
    # 4,180 coordinates in 33 groups of 128, each with a float32 scale
    "torchao int8 group 128": (33 * (128 + 4), 1e-4),
    "torchao int4 group 128": (33 * (64 + 4), 2e-2),
    "bitsandbytes int8 block 4096": (4180 + 2 * 4, 1e-3),
    "bitsandbytes nf4 block 64": (4180 // 2 + 66 * 4, 2e-2),
    # 21 of 2,040, 1 of 40 and 21 of 2,100, each a float32 and an int64
    "FedLab top-1%": (12 * (21 + 1 + 21), 0.95),
    "OpenFL Eden 1 bit": (None, 0.8),
    "OpenFL Eden 2 bit": (None, 0.2),
    "OpenFL Eden 4 bit": (None, 2e-2),
    "NVFlare float16": (None, 1e-6),
    "NVFlare adaquant": (None, 0.5),
    "NVFlare blockwise8": (None, 1e-3),
    "NVFlare normfloat4": (None, 2e-2),
    "SZ3 abs 0.005": (None, 1e-4),
    "SZ3 abs 0.002": (None, 1e-4),
    "SZ3 rel 0.001": (None, 1e-4),
    **dict.fromkeys(
        (f"SZ3 {bound} no prediction" for bound in ("abs 0.005", "abs 0.002", "rel 0.001")),
        (None, 1e-4),
    ),
    **{f"NNCodec qp {qp}": (None, 0.1) for qp in (-24, -30, -36, -42)},
    # No error above the bound times a range, which is below 8 for two thousand normal draws
    "FedSZ SZ3 rel 0.1": (None, (8 * 0.1) ** 2),
    "FedSZ SZ3 rel 0.03": (None, (8 * 0.03) ** 2),
    "FedSZ SZ3 rel 0.01": (None, (8 * 0.01) ** 2),
    **dict.fromkeys(LOSSLESS, (None, 0.0)),
}
"""Bytes where they can be worked out by hand, and a bound of the NMSE."""


@pytest.fixture
def update() -> FloatVector:
    return np.random.default_rng(0).standard_normal(LAYOUT.size).astype(np.float32)


@pytest.mark.filterwarnings("ignore")  # of the packages themselves
@pytest.mark.parametrize("package", peers.ADAPTERS)
def test_what_is_installed_brings_an_update_back(package: str, update: FloatVector) -> None:
    pytest.importorskip(package)
    tried = 0
    for codec in peers.ADAPTERS[package](LAYOUT):
        try:
            payload = codec.encode(update, np.random.default_rng(1))
        except AssertionError as missing:
            if "CUDA" not in str(missing):
                raise
            continue
        assert isinstance(payload, bytes)
        size, bound = EXPECTED[codec.name]
        assert size in (None, len(payload)), codec.name
        decoded = codec.decode(payload)
        assert decoded.shape == update.shape
        assert decoded.dtype == np.float32
        assert error(decoded, update) <= bound, codec.name
        assert codec.encode(update, np.random.default_rng(1)) == payload, codec.name
        tried += 1
    assert tried
