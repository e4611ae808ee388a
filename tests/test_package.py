"""The built wheel works from any folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from .conftest import CONF, ROOT


@pytest.mark.slow
def test_the_wheel_carries_the_configs_and_runs_anywhere(tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    for path in CONF.rglob("*.yaml"):
        assert f"fedbw_sweep/conf/{path.relative_to(CONF)}" in names
    assert not any(name.startswith(("tests/", "outputs/")) for name in names)

    away = tmp_path / "away"
    away.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "fedbw_sweep", "--cfg", "job", "compression=topk", "model=tiny"],
        cwd=away,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "density: 0.1" in done.stdout
    assert "vocab_size: 512" in done.stdout
