"""What must agree between machines does not depend on their processor or their threads.

python -m tests.compression.test_portable writes the payloads anew, where their format changes
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__
from threadpoolctl import threadpool_info

from fedbw_sweep.compression.base import Known
from fedbw_sweep.compression.layout import FloatVector, Layout
from fedbw_sweep.testing import layout_of

from .test_contract import NAMES, VARIANTS, load_compressor

FILE = Path(__file__).with_name("payloads.npz")
METHODS = [*NAMES, *VARIANTS, "lowrank_ecsq norm_correction=true", "ecsq target_bits=2"]
SMALL = layout_of((64, 96), (96,), (70, 33), (4, 8, 30), (), (48, 40))
LARGE = layout_of((128, 512), (300, 600), (700,), (20, 900))


def update(layout: Layout) -> FloatVector:
    """Return what is of rank three and noise, at another scale in each array."""
    rng = np.random.default_rng(5)
    values = 1e-3 * rng.standard_normal(layout.size)
    for number, (tensor, array) in enumerate(layout.split(values.astype(np.float32))):
        if len(tensor.shape) > 1:
            matrix = array.reshape(-1, tensor.shape[-1])
            left, right = (rng.standard_normal((n, 3)) for n in matrix.shape)
            matrix += 2e-3 * left @ right.T
        array *= 2.0 ** -(number % 3)
        values[sum(t.size for t in layout.floats[:number]) :][: tensor.size] = array.ravel()
    return values.astype(np.float32)


def known(layout: Layout) -> Known:
    """Return models that both ends hold."""
    initial = np.random.default_rng(6).standard_normal(layout.size).astype(np.float32)
    return Known(initial, initial + 3 * update(layout)[::-1])


def encode(layout: Layout, methods: list[str] = METHODS) -> dict[str, bytes]:
    values, held = update(layout), known(layout)
    return {
        name: load_compressor(name).encode(values, layout, np.random.default_rng(1), held)
        for name in methods
    }


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def decode(payloads: dict[str, bytes]) -> dict[str, str]:
    held = known(SMALL)
    return {
        name: digest(load_compressor(name).decode(payload, SMALL, held).astype("<f4").tobytes())
        for name, payload in payloads.items()
    }


def load(path: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    with np.load(path) as file:
        digests: dict[str, str] = json.loads(file["digests"].tobytes())
        return {name: file[name].tobytes() for name in digests}, digests


def save(path: Path, payloads: dict[str, bytes], digests: dict[str, str]) -> None:
    packed = {name: np.frombuffer(payload, np.uint8) for name, payload in payloads.items()}
    np.savez(path, digests=np.frombuffer(json.dumps(digests).encode(), np.uint8), **packed)


@pytest.fixture(scope="module")
def payloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the stored payloads, and here made ones of methods that have none stored."""
    stored, digests = load(FILE)
    new = encode(SMALL, [name for name in METHODS if name not in stored])
    path = tmp_path_factory.mktemp("portable") / "payloads.npz"
    save(path, stored | new, digests | decode(new))
    return path


def elsewhere(*task: str, **environment: str) -> tuple[dict[str, str], list[str]]:
    """Run a task in a process of its own; return digests by method, and the BLAS's processors."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.compression.test_portable", *task],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found, processors = json.loads(done.stdout)
    return found, processors


CORES = {"Sandybridge": "AVX", "Haswell": "AVX2", "SkylakeX": "AVX512F"}
SIMD = [feature for feature in __cpu_dispatch__ if __cpu_features__[feature]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        *({"OPENBLAS_CORETYPE": core} for core, has in CORES.items() if __cpu_features__.get(has)),
        {"NPY_DISABLE_CPU_FEATURES": " ".join(SIMD)},
        {"OPENBLAS_NUM_THREADS": "4"},
    ],
    ids=lambda environment: "=".join(*environment.items()),
)
def test_a_payload_decodes_to_the_same_bytes_everywhere(
    environment: dict[str, str], payloads: Path
) -> None:
    expected = load(payloads)[1]
    found, processors = elsewhere("decode", str(payloads), **environment)
    if (core := environment.get("OPENBLAS_CORETYPE")) and processors:
        assert {name.lower() for name in processors} == {core.lower()}
    assert [name for name in METHODS if found[name] != expected[name]] == []


@pytest.mark.slow
def test_a_payload_does_not_depend_on_the_number_of_threads() -> None:
    one, four = (elsewhere("encode", OPENBLAS_NUM_THREADS=n)[0] for n in ("1", "4"))
    assert [name for name in METHODS if one[name] != four[name]] == []


def main(task: str = "write", path: Path = FILE) -> None:
    """Print digests, or write the file."""
    if task == "write":
        made = encode(SMALL)
        save(path, made, decode(made))
        return
    if task == "decode":
        found = decode(load(path)[0])
    else:
        found = {name: digest(payload) for name, payload in encode(LARGE).items()}
    blas = [pool for pool in threadpool_info() if pool["internal_api"] == "openblas"]
    print(json.dumps([found, [pool["architecture"] for pool in blas]]))


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(Path, sys.argv[2:]))
