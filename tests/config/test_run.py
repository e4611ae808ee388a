from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st

from fedbw_sweep.config.run import EXECUTION_KEYS, RunConfig
from fedbw_sweep.errors import ConfigError
from tests.conftest import CONF

Build = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def default_values() -> dict[str, object]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return RunConfig.from_hydra(compose("config")).model_dump(by_alias=True)


@pytest.mark.parametrize(
    ("fraction", "clients", "sampled"),
    [(0.29, 100, 29), (0.57, 100, 57), (0.1, 3, 1), (0.25, 16, 4), (1.0, 7, 7), (1e-9, 5, 1)],
)
def test_clients_per_round_is_exact(
    run_config: Build, fraction: float, clients: int, sampled: int
) -> None:
    config = run_config(f"fraction_fit={fraction}", f"num_clients={clients}")
    assert config.clients_per_round == sampled


@given(hundredths=st.integers(1, 100), clients=st.integers(1, 100_000))
def test_clients_per_round_equals_integer_arithmetic(
    default_values: dict[str, object], hundredths: int, clients: int
) -> None:
    values = {**default_values, "fraction_fit": hundredths / 100, "num_clients": clients}
    config = RunConfig.from_dict(values)
    assert config.clients_per_round == max(1, hundredths * clients // 100)
    assert Fraction(repr(hundredths / 100)) == Fraction(hundredths, 100)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("fraction_fit=0", ["fraction_fit=0", "(0, 1]"]),
        ("fraction_fit=1.5", ["fraction_fit=1.5", "(0, 1]"]),
        ("fraction_fit=nan", ["fraction_fit=nan", "(0, 1]"]),
        ("num_clients=0", ["num_clients=0", "at least 1"]),
        ("num_clients=2.5", ["num_clients=2.5", "integer"]),
        ("num_clients=true", ["num_clients=True", "integer"]),
        ("rounds=-1", ["rounds=-1", "at least 0"]),
        ("local_epochs=-1", ["local_epochs=-1", "at least 0"]),
        ("local_steps=-2", ["local_steps=-2", "at least 0"]),
        ("batch_size=0", ["batch_size=0", "at least 1"]),
        ("sequence_length=0", ["sequence_length=0", "at least 1"]),
        ("lr=0", ["lr=0", "above 0"]),
        ("lr=inf", ["lr=inf"]),
        ("lr=fast", ["lr=fast", "number"]),
        ("upload=gradient", ["upload=gradient", "'update' or 'weights'"]),
        ("proximal_mu=-1", ["proximal_mu=-1", "at least 0"]),
        ("+server.tau=0", ["server.tau=0", "above 0"]),
        ("+server.beta_1=1", ["server.beta_1=1", "[0, 1)"]),
        ("server.lr=-1", ["server.lr=-1", "at least 0"]),
        ("server.lr=nan", ["server.lr=nan", "at least 0"]),
        ("server.lr=fast", ["server.lr=fast", "number"]),
        ("seed=-1", ["seed=-1", "at least 0"]),
        ("model.weights=trained", ["model.weights=trained", "'random' or 'pretrained'"]),
        ("data.partition=random", ["data.partition=random", "'natural', 'iid' or 'dirichlet'"]),
        ("backend.workers=0", ["backend.workers=0", "at least 1"]),
        ("+backend.threads=2", ["backend.threads=2", "not permitted"]),
        ("compression=[]", ["compression"]),
    ],
)
def test_a_value_that_is_not_allowed_is_named(
    run_config: Build, override: str, words: list[str]
) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011  Hydra's own error for the last case
        run_config(override)
    if override != "compression=[]":
        assert isinstance(caught.value, ConfigError)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("density", ["0", "2", "-1", "nan", "true"])
def test_a_compressors_own_parameters_are_checked(run_config: Build, density: str) -> None:
    with pytest.raises(ConfigError, match=r"compression\.density="):
        run_config("compression=topk", f"compression.density={density}")


def test_weights_are_not_fed_back(run_config: Build) -> None:
    fed_back = ("upload=weights", "compression=int8", "compression.error_feedback=true")
    with pytest.raises(ConfigError, match=r"upload=weights: .*compression\.error_feedback out"):
        run_config(*fed_back)
    explicit = run_config("upload=weights", "compression=topk", "compression.error_feedback=false")
    assert run_config("upload=weights", "compression=topk").run_id == explicit.run_id


def test_what_would_diverge_is_not_fed_back(run_config: Build) -> None:
    for too_coarse in (["qsgd", "levels=8"], ["eden", "bits=0.75"], ["randk", "density=0.4"]):
        name, parameter = too_coarse
        choice = f"compression={name}", f"compression.{parameter}"
        with pytest.raises(ConfigError, match=r"compression\.error_feedback=True: .*would grow"):
            run_config(*choice, "compression.error_feedback=true")
        run_config(*choice)
    for fine in (["qsgd", "levels=16"], ["eden", "bits=1"], ["randk", "density=0.5"]):
        name, parameter = fine
        fed_back = "compression.error_feedback=true"
        run_config(f"compression={name}", f"compression.{parameter}", fed_back)
    with pytest.raises(ConfigError, match=r"compression\.error_feedback=True"):
        run_config("compression=randk", "compression.error_feedback=true")
    run_config("compression=randk", "compression.error_feedback=true", "compression.unbiased=false")


def test_an_unknown_compressor_parameter_is_refused(run_config: Build) -> None:
    with pytest.raises(ConfigError, match="bits"):
        run_config("compression=topk", "+compression.bits=3")


def test_an_experiment_overrides_the_defaults_and_the_command_line_the_experiment(
    run_config: Build,
) -> None:
    config = run_config("experiment=lesson")
    assert (config.num_clients, config.clients_per_round, config.rounds) == (2, 2, 1)
    assert (config.local_epochs, config.sweep) == (0, "lesson")
    assert run_config("experiment=lesson", "rounds=3").rounds == 3


def test_all_problems_are_listed_at_once(run_config: Build) -> None:
    with pytest.raises(ConfigError) as caught:
        run_config("rounds=-1", "lr=0", "data.alpha=-2")
    assert [line.split("=")[0] for line in str(caught.value).splitlines()] == [
        "rounds",
        "lr",
        "data.alpha",
    ]


def test_run_id_depends_on_science_alone(run_config: Build) -> None:
    base = run_config().run_id
    assert re.fullmatch("[0-9a-f]{12}", base)
    assert run_config("backend.workers=7", "sweep=other", "verbose=true").run_id == base
    for override in (
        "seed=2",
        "lr=0.01",
        "optimizer.eps=1e-7",
        "server=diloco",
        "compression=topk",
        "model=tiny",
        "data.alpha=0.7",
        "trainable=head",
        "initial_model=sent",
    ):
        assert run_config(override).run_id != base


def test_a_run_config_survives_json_and_is_frozen(run_config: Build) -> None:
    config = run_config("compression=topk", "compression.density=0.05")
    again = RunConfig.model_validate_json(config.model_dump_json(by_alias=True))
    assert again == config
    assert again.run_id == config.run_id
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


def test_execution_keys_are_not_science(run_config: Build) -> None:
    config = run_config()
    assert set(RunConfig.model_fields) >= EXECUTION_KEYS
    assert set(config.science) == set(RunConfig.model_fields) - EXECUTION_KEYS


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in sorted(CONF.rglob("*.yaml"))
        if path.parent.name not in {"experiment", "hydra", "preset"}
    ],
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_every_key_has_its_meaning_beside_it(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").split("\nhydra:")[0].splitlines()
    for line in lines:
        key = re.match(r"\s*([A-Za-z_]\w*):", line)
        if key is None or key[1] in {"defaults", "name", "_target_"}:
            continue
        assert "#" in line, f"{path.name}: {line.strip()} has no comment"


@pytest.mark.parametrize(
    "group", ["compression", "optimizer", "server", "model", "trainable", "data", "backend"]
)
def test_a_choice_is_named_after_its_file(group: str) -> None:
    choices = sorted((CONF / group).glob("*.yaml"))
    assert choices
    for choice in choices:
        assert yaml.safe_load(choice.read_text(encoding="utf-8"))["name"] == choice.stem


def test_the_slurm_example_is_submitits_launcher_with_our_settings() -> None:
    own = yaml.safe_load((CONF / "hydra" / "launcher" / "slurm.yaml").read_text(encoding="utf-8"))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = ["hydra/launcher=slurm", "hydra.launcher.partition=long"]
        launcher = compose("config", overrides, return_hydra_config=True).hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher")
    for key, value in own.items():
        if key not in ("defaults", "partition"):
            assert launcher[key] == value
    assert launcher.partition == "long"
