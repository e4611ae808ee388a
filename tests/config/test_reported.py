"""Names that lie: a choice is called by its file."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedbw_sweep.config.identity import config_columns
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.plan import main as plan
from tests.conftest import ROOT, refuses

Build = Callable[..., RunConfig]


@pytest.mark.parametrize(
    ("chosen", "renamed", "file"),
    [
        ("model=tiny", "model.name=pythia-410m", "tiny"),
        ("compression=topk", "compression.name=int8", "topk"),
        ("compression@downlink=int8", "downlink.name=none", "int8"),
        ("optimizer=sgd", "optimizer.name=adamw", "sgd"),
        ("server=fedadam", "server.name=fedavg", "fedadam"),
        ("network=4g", "network.name=5g", "4g"),
        ("data=text", "data.name=hub", "text"),
        ("sampling=by_size", "sampling.name=uniform", "by_size"),
    ],
)
def test_point_5_a_name_that_is_set_is_refused(
    run_config: Build, chosen: str, renamed: str, file: str
) -> None:
    key, _, value = renamed.partition("=")
    with pytest.raises(ConfigError, match=rf"^{key}={value}: must be {file}, the name of the file"):
        run_config(chosen, renamed)


def test_point_5_the_plan_refuses_it_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    refuses(plan, ["model=tiny,pythia-14m", "model.name=pythia-410m"])
    assert "model.name=pythia-410m: must be tiny" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("multirun", [(), ("-m",)])
def test_point_5_the_command_ends_with_2(tmp_path: Path, multirun: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "fedbw_sweep", *multirun, "model=tiny", "model.name=big"]
    folder = f"hydra.{'sweep' if multirun else 'run'}.dir={tmp_path}/out"
    done = subprocess.run(
        [*command, folder], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "model.name=big: must be tiny" in " ".join(done.stderr.split())


HUB = ("model=hub", "model.weights=random")


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        ((*HUB, "model.name_or_path=/models/gpt2-small/"), "gpt2-small"),
        ((*HUB, "model.name_or_path=facebook/opt-125m"), "opt-125m"),
        ((*HUB, "model.name_or_path=null", "model.architecture={model_type:opt}"), "opt"),
        ((*HUB, "model.name_or_path=a/b", "model.label=ours"), "ours"),
        (("model=tiny", "model.label=small one"), "small one"),
        (("model=tiny",), None),
    ],
)
def test_point_5_a_label_stands_beside_the_name(
    run_config: Build, overrides: tuple[str, ...], label: str | None
) -> None:
    config = run_config(*overrides)
    columns = config_columns(config.science)
    assert (columns["model"], columns["model.label"]) == (config.model.name, label)
    unlabelled = config.model.model_copy(update={"label": None})
    assert config.run_id == config.model_copy(update={"model": unlabelled}).run_id
