"""What one option alone needs is asked for before anything trains; nothing else needs it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.extras import MODULES, OPTIONS, require, why_not
from fedbw_sweep.sweeps.loggers.base import logger_of

from .conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

LOGGERS = "tensorboard", "wandb"
"""Loggers whose extra and module bear the same name."""

DISTRIBUTIONS = {"vl_convert": "vl-convert-python", "flwr_datasets": "flwr-datasets"}
"""What is installed under another name than it is imported by."""

BLOCKED = sorted({m for modules in [*MODULES.values(), LOGGERS] for m in modules})

BLOCK = f"""
import sys
sys.modules.update(dict.fromkeys({BLOCKED}))  # so that an import of it fails
"""


def without_extras(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process in which no extra can be imported."""
    command = [sys.executable, "-c", BLOCK + code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_each_extra_installs_what_is_looked_for() -> None:
    extras = PROJECT["optional-dependencies"]
    needed = {requirement.split(">=")[0] for requirement in PROJECT["dependencies"]}
    own = {name: (name,) for name in LOGGERS}
    assert extras.keys() == MODULES.keys() | own.keys() | {"dev", "launchers", "peers"}
    for extra, modules in (MODULES | own).items():
        brought = {requirement.split(">=")[0] for requirement in extras[extra]}
        assert brought == {DISTRIBUTIONS.get(module, module) for module in modules}
        assert not brought & needed
        assert extra in extras["dev"][0]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("data", "hub", "needs datasets: pip install 'fedbw_sweep[hub]'"),
        (
            "data.partition",
            "dirichlet",
            "needs flwr_datasets, datasets: pip install 'fedbw_sweep[dirichlet]'",
        ),
        ("trainable", "lora", "needs peft: pip install 'fedbw_sweep[lora]'"),
    ],
)
def test_the_error_names_key_value_and_command(
    monkeypatch: pytest.MonkeyPatch, key: str, value: str, words: str
) -> None:
    require(key, value)  # here it is installed
    for module in BLOCKED:
        monkeypatch.setitem(sys.modules, module, None)
    require(key, "all")
    with pytest.raises(ConfigError) as caught:
        require(key, value)
    assert str(caught.value) == f"{key}={value}: {words}"
    assert OPTIONS[key, value] in words


@pytest.mark.parametrize("name", LOGGERS)
def test_a_logger_asks_for_its_package(
    monkeypatch: pytest.MonkeyPatch, run_config: Callable[..., RunConfig], name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError) as caught:
        logger_of(run_config(f"logger={name}"))
    assert str(caught.value) == f"logger={name}: needs {name}: pip install 'fedbw_sweep[{name}]'"


def test_only_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not("report") is None
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    assert why_not("report") == "needs vl_convert: pip install 'fedbw_sweep[report]'"


def test_what_uses_an_extra_asks_for_it(
    monkeypatch: pytest.MonkeyPatch, run_config: Callable[..., RunConfig]
) -> None:
    """Whoever calls it: also where nothing was checked before."""
    from fedbw_sweep.data.federate import federate
    from fedbw_sweep.data.readers import read_hub
    from fedbw_sweep.model.trainable import build_trainable
    from tests.data.texts import config, to_bytes

    for module in BLOCKED:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"fedbw_sweep\[hub\]"):
        read_hub(config(name="hub", path="x"))
    with pytest.raises(ConfigError, match=r"fedbw_sweep\[dirichlet\]"):
        federate(config(partition="dirichlet"), 2, 16, 1, to_bytes)
    lora = run_config("model=tiny", "trainable=lora")
    with pytest.raises(ConfigError, match=r"fedbw_sweep\[lora\]"):
        build_trainable(lora.model, lora.trainable, 1)


@pytest.mark.slow
def test_a_run_its_plan_and_its_report_need_no_extra(tmp_path: Path) -> None:
    code = """
from pathlib import Path
from fedbw_sweep import plan, verify, status, codecs, __main__
from fedbw_sweep.backends import flower
from fedbw_sweep.backends.ray import backend, grid
from fedbw_sweep.report.__main__ import main
from fedbw_sweep.sweeps import run
from tests.conftest import SMALL, config_of
from tests.local import LocalBackend

folder = Path(sys.argv[1])
(folder / "sweep").mkdir()
run.backend_of = LocalBackend()
for method in ("none", "topk"):
    config = config_of(*SMALL, f"compression={method}")
    run.check([config])
    record = run.execute(config, folder / "sweep")
    assert record.error is None, record.error
assert plan.main(["model=tiny", "compression=none,int8"]) == 0
if __name__ == "__main__":
    assert main([str(folder / "sweep"), "--out", str(folder / "report")]) == 0
"""
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.html").write_text("an earlier report's")
    done = without_extras(code, str(tmp_path))
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "report.html" in line]
    assert said == [
        "note: report.html is left out: it needs altair, vl_convert, jinja2: "
        "pip install 'fedbw_sweep[report]'"
    ]
    assert not (tmp_path / "report" / "report.html").exists()
    assert (tmp_path / "report" / "tables" / "compression.csv").stat().st_size > 100
    assert (tmp_path / "report" / "figures" / "pareto_front.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_sweep_is_refused_before_any_of_it_trains(tmp_path: Path) -> None:
    code = "from fedbw_sweep.__main__ import main\nif __name__ == '__main__': main()"
    done = without_extras(
        code, "-m", "model=tiny", "trainable=all,lora", f"hydra.sweep.dir={tmp_path}/out"
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == (
        "error: trainable=lora: needs peft: pip install 'fedbw_sweep[lora]'"
    )
    assert not list(tmp_path.rglob("*.csv"))
