"""What Python can import, and runs and sweeps from it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

import fedbw_sweep
from fedbw_sweep.compression.sparse import TopK
from fedbw_sweep.errors import ConfigError

from .conftest import SMALL


def python(code: str, folder: Path) -> str:
    """Run a program in a folder; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_loads_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys, fedbw_sweep\n"
        "assert fedbw_sweep.__version__ and 'sweep' in dir(fedbw_sweep)\n"
        "print({'torch', 'ray', 'flwr', 'hydra', 'pandas', 'numpy'} & set(sys.modules))"
    )
    assert python(code, tmp_path).strip() == "set()"


@pytest.mark.parametrize("name", fedbw_sweep.__all__)
def test_what_is_public_is_there(name: str) -> None:
    assert getattr(fedbw_sweep, name)
    assert name in dir(fedbw_sweep)


def test_what_is_not_public_is_not_there() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        fedbw_sweep.nothing  # noqa: B018


def test_a_compressor_by_its_name() -> None:
    assert fedbw_sweep.compressor("topk density=0.5") == TopK(density=0.5)
    with pytest.raises(ConfigError, match="no such method"):
        fedbw_sweep.compressor("zip")
    with pytest.raises(ConfigError, match="names several"):
        fedbw_sweep.compressor("topk density=0.5,0.1")


@pytest.mark.slow
def test_overrides_are_checked_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lr=-1"):
        fedbw_sweep.run(["lr=-1"], folder=tmp_path)
    with pytest.raises(ConfigError, match="name 2 runs; use sweep"):
        fedbw_sweep.run(["seed=1,2"], folder=tmp_path)
    with pytest.raises(ConfigError, match="nokey"):
        fedbw_sweep.sweep(["nokey=1"], folder=tmp_path)
    assert not list(tmp_path.iterdir())


CODE = f"""
import sys, threading
import fedbw_sweep

SMALL = {[*SMALL, "backend.workers=1"]!r}
one = fedbw_sweep.run([*SMALL, "compression=topk"])
assert str(one.folder) == "outputs/main"
[run] = one.results.to_dict("records")
assert run["status"] == "done" and run["compression"] == "topk", run
assert one.rounds["round"].tolist() == [0, 1, 2]
again = fedbw_sweep.run([*SMALL, "compression=topk"])
assert again.results.equals(one.results)
try:
    fedbw_sweep.run([*SMALL, "lr=1e30", "local_steps=3", "optimizer=sgd"])
except fedbw_sweep.RunError as error:
    assert "loss is nan" in str(error)
else:
    raise AssertionError

def several():
    global swept
    swept = fedbw_sweep.sweep([*SMALL, "compression=none,sign"], folder="elsewhere")

thread = threading.Thread(target=several)
thread.start()
thread.join()
assert swept.results["compression"].tolist() == ["none", "sign"], swept
assert fedbw_sweep.load_results("elsewhere")["loss"].notna().all()
import psutil
print(*(process.pid for process in psutil.Process().children(recursive=True)))
"""


@pytest.mark.ray
def test_runs_as_often_as_wanted_in_one_process(tmp_path: Path) -> None:
    """Twice, after an error, and in a thread; no process is left after the end."""
    own = [int(pid) for pid in python(CODE, tmp_path).split()]
    assert len(own) > 3
    deadline = time.monotonic() + 20
    while any(map(psutil.pid_exists, own)):
        assert time.monotonic() < deadline, "a process is left"
        time.sleep(0.1)


def test_a_public_compressor_keeps_what_it_did_not_send() -> None:
    layout = fedbw_sweep.Layout((fedbw_sweep.TensorSpec("a", (4, 5)),))
    update = np.arange(20, dtype=np.float32)
    compressor = fedbw_sweep.compressor("topk density=0.1")
    payload, state = fedbw_sweep.encode_with_feedback(
        compressor, update, layout, np.random.default_rng(0), {}
    )
    decoded = compressor.decode(payload, layout)
    assert np.flatnonzero(decoded).tolist() == [18, 19]
    np.testing.assert_array_equal(decoded + state["residual"], update)
