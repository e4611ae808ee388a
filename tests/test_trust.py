"""Re-running a stranger's record runs nothing of theirs; reading it never does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedbw_sweep import status, verify
from fedbw_sweep.config.foreign import refuse_foreign
from fedbw_sweep.config.groups import ModelConfig
from fedbw_sweep.config.identity import run_id_of
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.records.collect import collect
from fedbw_sweep.records.read import load
from fedbw_sweep.report.__main__ import main as report

from .conftest import refuses
from .records.seals import seal
from .records.test_write import finished

Build = Callable[..., RunConfig]

CODE = """
from pathlib import Path
Path(__file__).with_suffix(".imported").touch()

class Sprung:
    def __init__(self, *args, **keywords):
        Path(__file__).with_suffix(".called").touch()
"""


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A harmless module that notes that it was imported, and that its class was called."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "fedbw_trap.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "fedbw_trap", raising=False)
    return folder / "fedbw_trap.py"


def sprung(trap: Path) -> list[str]:
    return [end for end in (".imported", ".called") if trap.with_suffix(end).exists()]


def record_of(config: RunConfig, sweep: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A finished run whose config a stranger has changed, its id and hashes made to fit."""
    sweep.mkdir(exist_ok=True)
    finished(config).write(sweep)
    folder = sweep / config.run_id
    science = yaml.safe_load((folder / "config.yaml").read_text())
    change(science)
    (folder / "config.yaml").write_text(yaml.safe_dump(science))
    run_id = run_id_of(science, config.numerics)
    text = (folder / "status.json").read_text().replace(config.run_id, run_id)
    (folder / "status.json").write_text(text)
    seal(folder)
    return folder.rename(sweep / run_id)


FOREIGN = {
    key: lambda science, key=key: science[key].update(_target_="fedbw_trap.Sprung", shell=True)
    for key in ("compression", "downlink", "optimizer", "server", "sampling")
} | {
    key: lambda science, key=key: science[key].update(_target_="fedbw_trap.Sprung")
    for key in ("data", "model")
}


@pytest.mark.slow
@pytest.mark.parametrize("key", FOREIGN)
@pytest.mark.parametrize("named", ["as ours", "as theirs"])
def test_a_foreign_class_is_refused_before_it_is_imported(
    run_config: Build,
    tmp_path: Path,
    trap: Path,
    capsys: pytest.CaptureFixture[str],
    key: str,
    named: str,
) -> None:
    def change(science: dict[str, Any]) -> None:
        FOREIGN[key](science)
        if named == "as theirs":
            science[key]["name"] = "mine"

    sweep = tmp_path / "s"
    run = record_of(run_config("model=tiny"), sweep, change)
    refuses(verify.main, [str(run)])
    said = " ".join(capsys.readouterr().err.split())
    assert f"{key}._target_=fedbw_trap.Sprung" in said
    assert "--trust" in said
    assert "--config-dir" in said
    # Every other command that reads a record reads it and no more.
    assert load(sweep)["status"].tolist() == ["done"]
    collect(sweep)
    assert status.main([str(sweep)]) == 0
    assert status.main([str(sweep), "--check"]) == 0
    assert sprung(trap) == []
    if key in ("compression", "downlink", "sampling"):  # the others are built by the run itself
        with pytest.raises(ConfigError, match="must be a"):
            verify.recorded_config(run, trust=True)
        assert sprung(trap) == [".imported", ".called"], "trusted, it is run: the trap works"
    else:
        assert getattr(verify.recorded_config(run, trust=True), key).target == "fedbw_trap.Sprung"


@pytest.mark.slow
def test_the_report_runs_nothing(run_config: Build, tmp_path: Path, trap: Path) -> None:
    for key, change in FOREIGN.items():
        record_of(run_config("model=tiny", f"seed={len(key)}"), tmp_path / "s", change)
    assert report([str(tmp_path / "s"), "--out", str(tmp_path / "out")]) == 0
    assert sprung(trap) == []


@pytest.mark.slow
def test_a_users_own_choice_may_be_run(run_config: Build, tmp_path: Path, trap: Path) -> None:
    def change(science: dict[str, Any]) -> None:
        science["compression"] = {"name": "mine", "error_feedback": False} | {
            "_target_": "fedbw_trap.Sprung"
        }

    run = record_of(run_config("model=tiny"), tmp_path / "s", change)
    own = tmp_path / "conf" / "compression" / "mine.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("name: mine\n_target_: another.Class\n")
    with pytest.raises(ConfigError, match="which fedbw_sweep does not offer"):
        verify.recorded_config(run, config_dir=tmp_path / "conf")
    assert sprung(trap) == []
    own.write_text("name: mine\n_target_: fedbw_trap.Sprung\n")
    with pytest.raises(ConfigError, match="must be a Compressor class"):
        verify.recorded_config(run, config_dir=tmp_path / "conf")
    assert sprung(trap) == [".imported", ".called"]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"name_or_path": "pkg://fedbw_trap/x.gguf", "weights": "pretrained"}, "name_or_path"),
        ({"architecture": {"model_type": "gpt2", "auto_map": {"AutoConfig": "a.B"}}}, "auto_map"),
        ({"architecture": {"_attn_implementation": "a"}}, "_attn_implementation"),
        ({"architecture": {"attn_implementation": "a"}}, "attn_implementation"),
        ({"architecture": {"rope": {"hidden_act": "who/kernel"}}}, "rope.hidden_act"),
    ],
)
def test_a_model_that_brings_code_is_refused(
    run_config: Build, tmp_path: Path, trap: Path, change: dict[str, Any], key: str
) -> None:
    run = record_of(run_config("model=tiny"), tmp_path, lambda s: s["model"].update(change))
    with pytest.raises(ConfigError) as refused:
        verify.recorded_config(run)
    assert refused.value.key.endswith(key)
    assert sprung(trap) == []


def test_what_the_package_offers_passes(run_config: Build, tmp_path: Path) -> None:
    for overrides in (
        ["compression=lowrank_ecsq", "compression@downlink=int8", "server=fedadam"],
        ["model=smollm2", "trainable=lora", "optimizer=sgd", "sampling=by_size"],
        ["model=tiny", "model.architecture.hidden_size=64"],
    ):
        refuse_foreign(tmp_path, run_config(*overrides).science)


def test_a_repository_with_code_of_its_own_is_refused_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedbw_sweep.model.build import build_model

    def asked(*arguments: object) -> str:
        raise AssertionError("the user was asked")

    monkeypatch.setattr("builtins.input", asked)
    (tmp_path / "config.json").write_text(
        '{"model_type": "theirs", "auto_map": {"AutoConfig": "trap.Config", '
        '"AutoModelForCausalLM": "trap.Model"}}'
    )
    (tmp_path / "trap.py").write_text(CODE)
    config = ModelConfig.from_dict(
        {"name": "hub", "weights": "pretrained", "name_or_path": str(tmp_path)}
        | {"architecture": None}
    )
    with pytest.raises(ConfigError, match="cannot be loaded"):
        build_model(config, 1)
    assert not (tmp_path / "trap.imported").exists()


def test_to_look_for_a_package_imports_none(tmp_path: Path, trap: Path) -> None:
    from fedbw_sweep.model.build import locate

    config = ModelConfig.from_dict(
        {"name": "hub", "weights": "pretrained", "name_or_path": "pkg://fedbw_trap.inner/x.gguf"}
        | {"architecture": None}
    )
    with pytest.raises(ConfigError, match="names no installed package"):
        locate(config)
    assert sprung(trap) == []
