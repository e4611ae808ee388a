"""The plan of a sweep, and the runs it is made of."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hydra
import pytest
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.config.section import CONF
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.plan import duration, main, plan
from fedbw_sweep.records.collect import collect
from fedbw_sweep.records.write import RunRecord
from fedbw_sweep.sweeps.grid import Composer, expand, runs_of

from .conftest import ROOT

Build = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is recorded."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["compression=none,topk", "seed=1,2"],
        ["experiment=few_bytes", "compression=int8,topk", "hydra.sweep.dir=elsewhere"],
        ["compression=topk", "compression.density=0.01,0.1", "~data.alpha", "++data.split=x"],
        ["network=4g,home", "model.architecture={hidden_size: 8}", "local_steps=null,3"],
        ["hydra/launcher=basic", "fraction_fit=0.5"],
        ["compression@downlink=int8,bf16", "compression=topk", "downlink.error_feedback=true"],
        ["trainable=lora,head", "server=fedadam", "optimizer=sgd", "backend=flower"],
        ["model=pythia-12b,tiny", "data=text", "network=campus", "model.label=x"],
    ],
)
def test_runs_are_composed_as_hydra_does(overrides: list[str]) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composer = Composer("config")
        runs = composer.grid(overrides)
        swept = [word for word in overrides if "," in word and "{" not in word]
        params = ["compression", "seed"] if "experiment=few_bytes" in overrides else []
        assert len(runs) == 2 ** len(swept) * (3 if "seed" in params else 1)
        for lines in runs:
            config = composer.config(lines)
            assert config == hydra.compose("config", lines), lines
            assert OmegaConf.is_struct(config)


@pytest.mark.slow
def test_runs_of_equal_choices_are_composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compose, composed = hydra.compose, []
    monkeypatch.setattr(hydra, "compose", lambda *a, **b: composed.append(a) or compose(*a, **b))
    runs = list(runs_of(["experiment=small", "lr=1e-3,2e-3", "seed=range(1,9)"]))
    assert len(runs) == 16
    assert len(composed) == 1
    runs = list(runs_of(["compression=topk,int8", "server=fedavg,diloco", "seed=1,2"]))
    assert len({config.run_id for _, config in runs}) == 8
    assert len(composed) == 2


@pytest.fixture
def _in_hydra() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


@pytest.mark.usefixtures("_in_hydra")
def test_a_grid_is_every_combination() -> None:
    assert expand(["seed=range(1,4)", "rounds=2"]) == [
        ["seed=1", "rounds=2"],
        ["seed=2", "rounds=2"],
        ["seed=3", "rounds=2"],
    ]
    assert expand(["lr=1e-3,2e-3"], {"seed": "1,2", "lr": 1}) == [
        ["seed=1", "lr=0.001"],
        ["seed=1", "lr=0.002"],
        ["seed=2", "lr=0.001"],
        ["seed=2", "lr=0.002"],
    ]
    names = [line for [line] in expand(["compression=glob(int*)"])]
    assert names == ["compression=int2", "compression=int4", "compression=int8"]


@pytest.mark.usefixtures("_in_hydra")
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=range(3,3)", "seed=range(3,3): names no value"),
        ("compression=glob(zz*)", "names no value; there are bf16, "),
        ("data=glob([x*])", "names no value; there are hub, shakespeare, text"),
        ("lr=interval(0,1)", "lr=interval(0,1): a grid has no points of an interval"),
    ],
)
def test_a_grid_without_points_is_refused(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        expand([override])


@pytest.mark.slow
def test_the_formula_is_filled_in(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-m", "compression=none,int8"]) == 0
    text = capsys.readouterr().out
    assert "bandwidth = (model sent + update received) x clients x fraction x rounds" in text
    assert "the clients' training text itself: - (it is not loaded here" in text
    # int8: a byte each, two for each of 109,904 blocks of 128, four of frame
    for line in (
        "compression=none: (56,270,848 B + 56,270,848 B) x 32 x 0.125 x 5 = 2,250,833,920 B",
        "compression=int8: (56,270,848 B + 14,287,524 B) x 32 x 0.125 x 5 = 1,411,167,440 B",
    ):
        assert line in text
    assert text.count("exact") == 2
    assert "Network home: 20 Mbit/s up" in text


@pytest.mark.slow
def test_clients_that_are_no_product_and_those_that_drop_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["model=tiny", "num_clients=33", "compression=none", "rounds=2", "clients.dropout=0.5"])
    text = capsys.readouterr().out
    [run] = plan(
        ["model=tiny", "num_clients=33", "compression=none", "rounds=2", "clients.dropout=0.5"]
    )
    assert run.prediction is not None
    lost = 8 - sum(run.prediction.received)
    assert 0 < lost < 8
    assert "(5,283,840 B + 5,283,840 B) x 4 of 33 x 2" in text
    assert f"- {lost} x 5,283,840 B that drop out = {(16 - lost) * 5_283_840:,} B" in text


@pytest.mark.slow
def test_an_estimate_comes_from_recorded_runs_where_there_are(
    run_config: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path("outputs") / "main"
    folder.mkdir(parents=True)
    for uplink, *overrides in (
        (1_000, "seed=1"),
        (3_000, "seed=2"),
        (77, "compression.density=0.5"),
        (77, "trainable=body"),
        (77, "optimizer=sgd"),
        (77, "model=tiny"),
        (77, "upload=weights", "compression.error_feedback=false"),
    ):
        config = run_config("compression=topk", *overrides)
        record = RunRecord(config, "done")
        record.summary = {
            "uplink_bytes": uplink,
            "dense_uplink_bytes": 10 * 56_270_848,
            "dense_message_bytes": 56_270_848,
        }
        record.rounds = [{"round": 0}]
        record.write(folder)
    collect(folder)
    [run] = plan(["compression=topk"])
    assert run.prediction is not None
    assert run.prediction.update_bytes == 200
    assert run.prediction.basis == "estimate: 2 runs of this method recorded in outputs/main"
    main(["compression=topk"])
    assert "+ about 200 B) x 32" in capsys.readouterr().out
    [dense] = plan(["compression=none"])
    assert dense.prediction is not None
    assert dense.prediction.basis == "exact"


def test_further_choices(tmp_path: Path) -> None:
    (tmp_path / "compression").mkdir()
    own = (CONF / "compression" / "int8.yaml").read_text().replace("int8", "mine")
    (tmp_path / "compression" / "mine.yaml").write_text(own.replace("128", "64"))
    [run] = plan(["compression=mine", "model=tiny"], tmp_path)
    assert run.prediction is not None
    assert run.prediction.update_bytes == 1_320_960 + 2 * 1_320_960 // 64 + 4


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["compression=zip"], ["compression=zip", "zip"]),
        (["rounds=-1"], ["rounds=-1", "at least 0"]),
        (["epochs=3"], ["epochs=3"]),
        (["rounds=1,"], ["rounds"]),
    ],
)
def test_a_wrong_override_is_named(
    overrides: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(overrides)
    assert ended.value.code == 2
    text = capsys.readouterr().err
    for word in words:
        assert word in text


@pytest.mark.slow
def test_many_runs_show_the_first_formulas(capsys: pytest.CaptureFixture[str]) -> None:
    main(["seed=range(1,15)"])
    text = capsys.readouterr().out
    assert text.count("seed=") == 12
    assert "and 2 more" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (119, "119.0 s"), (180, "3.0 min"), (9000, "2.5 h"), (10**6, "11.6 d")],
)
def test_a_duration_in_the_unit_that_suits(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.slow
def test_it_needs_neither_torch_nor_pandas() -> None:
    """Which take seconds to import; the command itself is to answer within one."""
    code = (
        "import sys; from fedbw_sweep.plan import main; "
        "main(['compression=none,topk', 'model=pythia-12b', 'num_clients=1000000']); "
        "print({'torch', 'pandas', 'flwr', 'ray', 'transformers', 'matplotlib'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.endswith("set()\n")
