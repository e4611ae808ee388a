from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from fedbw_sweep.config.identity import config_columns, run_id_of
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.report.command import changes, command, overrides, sections_from_columns

Build = Callable[..., RunConfig]

OVERRIDES = [
    (),
    ("compression=topk", "compression.density=0.01", "seed=3", "num_clients=8"),
    ("compression=lowrank_ecsq", "compression.step=4", "rounds=0"),  # 4, not the default's 4.0
    ("compression=none", "compression.error_feedback=true", "lr=1e-22"),
    ("model=tiny", "model.architecture.vocab_size=300", "+model.architecture.use_cache=false"),
    ("model=tiny", "~model.architecture.rotary_pct"),
    ("model=hub", "model.name_or_path='007'"),
    ("model=hub", "model.name_or_path='o\\'brien, {a}=\"c\" \\\\'", "local_steps=7"),
    ("data=text", "data.path='null'", "data.client_column=who", "data.partition=natural"),
    ("data=hub", "data.path=stanfordnlp/imdb", "data.split='train[:10%]'", "data.subset='1'"),
    ("+data.split='a:b'", "data.alpha=1.0"),
    ("compression@downlink=topk", "downlink.density=0.3", "initial_model=sent"),
    ("compression@downlink=int8", "downlink.error_feedback=true", "compression=int8"),
    ("optimizer=sgd", "optimizer.momentum=0.9", "proximal_mu=0.1", "server=fedadam"),
    ("optimizer.betas=[0.9,0.95]", "server=diloco", "server.lr=0.5", "+server.momentum_=0.1"),
    ("trainable=lora", "trainable.rank=2", "trainable.targets=[dense]"),
    ("experiment=lesson", "clients.dropout=0.25"),
]


def written(science: dict[str, Any]) -> str:
    return command(overrides(changes(science)), science["seed"])


@pytest.mark.slow
@pytest.mark.parametrize("given", OVERRIDES, ids=" ".join)
def test_the_command_makes_the_same_run(run_config: Build, given: tuple[str, ...]) -> None:
    config = run_config(*given)
    python, flag, package, *arguments = shlex.split(written(config.science))
    assert [python, flag, package] == ["python", "-m", "fedbw_sweep"]
    assert arguments[-1] == "sweep=again"
    assert run_config(*arguments).science == config.science
    assert run_config(*arguments).run_id == config.run_id


@pytest.mark.parametrize(
    "given",
    [
        (),
        ("clients.dropout=0.25", "compression=topk", "seed=3"),
        ("compression@downlink=topk", "optimizer=sgd", "server=diloco"),
    ],
)
def test_a_row_of_results_tells_the_config(run_config: Build, given: tuple[str, ...]) -> None:
    configs = [run_config(*given, f"seed={seed}") for seed in (1, 2, 1)]
    rows = pd.DataFrame([config_columns(config.science) for config in configs])
    sections = sections_from_columns(rows)
    for at, config in enumerate(configs):
        told = {key: values[of_row[at]] for key, (of_row, values) in sections.items()}
        assert told == config.science
        assert run_id_of(told, config.numerics) == config.run_id  # the types, too
    assert {key: len(values) for key, (_, values) in sections.items() if len(values) > 1} == {
        "seed": 2
    }


def test_a_key_that_was_not_there_yet_is_not_told(run_config: Build) -> None:
    config = run_config()
    rows = pd.DataFrame([config_columns(config.science)] * 2).drop(columns="upload")
    sections = sections_from_columns(rows)
    assert sections["upload"] == ([0, 0], [None])
    assert sections["rounds"] == ([0, 0], [5])


def test_only_what_differs_is_named(run_config: Build) -> None:
    assert changes(run_config().science) == {}
    config = run_config("compression=topk", "compression.density=0.01", "num_clients=8", "seed=2")
    assert changes(config.science) == {
        "num_clients": (32, 8),
        "compression": ("none", "topk"),
        "compression.density": (0.1, 0.01),
    }
    assert written(config.science) == (
        "python -m fedbw_sweep num_clients=8 compression=topk compression.density=0.01 "
        "seed=2 sweep=again"
    )


def test_a_choice_from_elsewhere_is_spelt_out(run_config: Build) -> None:
    science = run_config("compression=topk").science
    science["compression"]["name"] = "mine"
    assert "compression=mine" in written(science)
    assert "++compression.density=0.1" in written(science)
