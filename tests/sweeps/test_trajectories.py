"""Runs that are killed go on, longer ones go on from shorter ones, equal ones are trained once."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from flwr.app import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedbw_sweep.config.inputs import with_contents
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.federation import keeper, shared
from fedbw_sweep.federation import runs as runs_module
from fedbw_sweep.records.checkpoint import STATE, Store, read_checkpoint
from fedbw_sweep.records.collect import collect
from fedbw_sweep.records.schema import CHECKPOINT
from fedbw_sweep.records.write import announce, is_done
from fedbw_sweep.status import check, sweep_status
from fedbw_sweep.sweeps import run as run_module
from fedbw_sweep.sweeps import sweep as sweep_module
from fedbw_sweep.sweeps.sweep import Sweep
from fedbw_sweep.sweeps.trajectories import together
from tests.conftest import SMALL, config_of
from tests.local import LocalBackend

pytestmark = pytest.mark.slow

COVERING = [
    ("compression=topk", "compression@downlink=topk", "server=diloco", "clients.dropout=0.3"),
    ("compression=lowrank", "compression@downlink=int8", "downlink.error_feedback=true",
     "server=fedyogi", "evaluate_every=3"),
    ("compression=lowrank_ecsq", "compression@downlink=lowrank", "server=fedadam",
     "initial_model=sent", "trainable=lora", "sampling=by_size"),
    ("compression=eden", "compression@downlink=lowrank_ecsq", "downlink.catch_up=merged",
     "server=fedadagrad", "clients.dropout=0.3", "initial_model=sent"),
    ("compression=int8", "compression.error_feedback=true", "server=fedavgm",
     "compression@downlink=eden", "downlink.error_feedback=false"),
]  # fmt: skip
"""Every kind of thing that is kept: residuals, a method's own state, clients' models, moments."""

LITTLE = (
    "model.architecture.hidden_size=32",
    "model.architecture.intermediate_size=64",
    "model.architecture.num_hidden_layers=2",
)

COMPARED = "results.csv", "rounds.csv"
"""Tables of a sweep that must be the same to the byte; the run's own files are compared too."""

OWN = "rounds.csv", "parts.csv", "messages.parquet", "config.yaml"


ORDERS = itertools.count()
"""Node ids and the order of replies are other ones in each process."""


class Killed(BaseException):
    """The process is gone."""


class Process(LocalBackend):
    """A backend of a process that is killed at a message: what it leaves is copied just before."""

    def __init__(self, at: int = -1, folder: Path | None = None, to: Path | None = None) -> None:
        super().__init__(order=next(ORDERS), tamper=self.count)
        self.at, self.folder, self.to, self.messages = at, folder, to, 0

    def runs_at_a_time(self, configs: Sequence[RunConfig]) -> int:
        return 1

    def count(self, message: Message) -> Message:
        self.messages += 1
        if self.messages == self.at:
            assert self.folder is not None
            assert self.to is not None
            _copy(self.folder, self.to)
            raise Killed
        return message


def _copy(folder: Path, to: Path) -> None:
    """Copy a sweep that is written to meanwhile: anew where a state was replaced."""
    claims = shutil.ignore_patterns("claim.*")  # they end with their process
    try:
        shutil.copytree(folder, to, ignore=claims)
    except shutil.Error:
        shutil.rmtree(to)
        _copy(folder, to)


Do = Callable[..., int]


@pytest.fixture
def do(monkeypatch: pytest.MonkeyPatch) -> Do:
    """Do a sweep's runs as one command would; return how many messages were answered.

    States are saved after each round, whatever that costs.
    """
    monkeypatch.setattr(keeper, "SHARE", 1.0)

    def do(
        folder: Path, runs: Sequence[RunConfig], *, killed_at: int = -1, left: Path | None = None
    ) -> int:
        backend = Process(killed_at, folder, left)
        monkeypatch.setattr(run_module, "backend_of", lambda config: backend)
        monkeypatch.setattr(sweep_module, "backend_of", lambda config: backend)
        folder.mkdir(exist_ok=True)
        announce(runs, folder)
        sweep = Sweep(runs, folder)
        sweep.run()
        sweep.tables()
        return backend.messages

    return do


def runs_of(*overrides: str, rounds: Sequence[int] = (4,)) -> list[RunConfig]:
    return [with_contents(config_of(*SMALL, *overrides, f"rounds={n}")) for n in rounds]


def alone(do: Do, folder: Path, runs: Sequence[RunConfig]) -> None:
    """Do each run by itself, undisturbed and without checkpoints."""
    for config in runs:
        without = config.checkpoint.model_copy(update={"enabled": False})
        do(folder, [config.model_copy(update={"checkpoint": without})])


def assert_same(folder: Path, other: Path) -> None:
    for name in COMPARED:
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    for path in other.glob("*/status.json"):
        for name in OWN:
            own = folder / path.parent.name / name
            assert own.read_bytes() == (path.parent / name).read_bytes(), own
    assert check(folder)[0] == []


@pytest.mark.parametrize("overrides", COVERING, ids=lambda o: o[0].partition("=")[2])
def test_killed_extended_or_trained_together_a_run_is_the_same(
    do: Do, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    runs = runs_of(*LITTLE, *overrides, rounds=(2, 3, 5))
    alone(do, tmp_path / "alone", runs)
    messages = do(tmp_path / "together", runs)
    assert_same(tmp_path / "together", tmp_path / "alone")
    for n, config in enumerate(runs):  # each goes on from the one before
        assert do(tmp_path / "extended", [config]) < messages or n == 0
    assert_same(tmp_path / "extended", tmp_path / "alone")
    at = random.Random(str(overrides)).randint(1, messages)
    with pytest.raises(Killed):
        do(tmp_path / "killed", runs, killed_at=at, left=tmp_path / "left")
    checkpoint = read_checkpoint(tmp_path / "left" / runs[-1].run_id)
    kept = checkpoint.round if checkpoint else 0
    entries = pd.read_parquet(tmp_path / "alone" / runs[-1].run_id / "messages.parquet")
    wanted = ((entries["direction"] == "uplink") & (entries["round"] > kept)).sum()
    assert do(tmp_path / "left", runs) == wanted, "no round that is kept is trained again"
    assert_same(tmp_path / "left", tmp_path / "alone")


@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    overrides=st.sampled_from(COVERING), share=st.floats(0, 1), again=st.floats(0, 1),
    stops=st.sampled_from([(), ("stop_at_loss=6.2",), ("stop_at_mb=1",)]),
)  # fmt: skip
def test_a_run_may_be_killed_at_any_message(
    do: Do, tmp_path_factory: pytest.TempPathFactory, overrides: tuple[str, ...],
    stops: tuple[str, ...], share: float, again: float,
) -> None:  # fmt: skip
    """Twice, and the second time what went on is killed."""
    place = tmp_path_factory.mktemp("killed")
    runs = runs_of(*LITTLE, *overrides, *stops, rounds=(2, 4))
    alone(do, place / "alone", runs)
    folder = place / "first"
    for number, part in enumerate((share, again)):
        left = place / f"left{number}"
        try:
            do(folder, runs, killed_at=1 + round(part * 7), left=left)
        except Killed:
            shutil.copytree(left, folder, dirs_exist_ok=True)
            shutil.rmtree(folder)
            shutil.copytree(left, folder)
    do(folder, runs)
    assert_same(folder, place / "alone")


def test_a_signal_has_what_is_not_saved_written(
    do: Do, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States are so costly that none would be saved; leaving the run by an error saves one."""
    [config] = runs_of("compression=topk", "server=diloco")
    alone(do, tmp_path / "alone", [config])
    monkeypatch.setattr(keeper, "SHARE", 1e-9)
    folder = tmp_path / "own"
    with pytest.raises(Killed):
        do(folder, [config], killed_at=7, left=tmp_path / "left")
    for place, rounds in ((tmp_path / "left", 1), (folder, 3)):
        checkpoint = read_checkpoint(place / config.run_id)
        assert checkpoint is not None
        assert checkpoint.round == rounds, "the first state is always saved"
    do(folder, [config])
    assert_same(folder, tmp_path / "alone")


@pytest.mark.parametrize(
    "overrides",
    [("server=diloco", "compression@downlink=topk"), ("upload=weights", "trainable=lora")],
    ids=["updates", "weights"],
)
def test_lossless_methods_are_trained_once(
    do: Do, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    """What the other would have sent is counted to the byte, message by message."""
    none, lossless = runs_of(*overrides, rounds=(2,)), runs_of("compression=lossless", *overrides)
    assert len(together(none + lossless)) == 1
    alone(do, tmp_path / "alone", none + lossless)
    messages = do(tmp_path / "together", none + lossless)
    assert messages == 8
    assert_same(tmp_path / "together", tmp_path / "alone")
    longer = runs_of(*overrides, rounds=(5,))
    alone(do, tmp_path / "longer", longer)
    assert do(tmp_path / "together", longer) == 2, "the rows of both are kept"
    rows = (tmp_path / "together" / longer[0].run_id / "rounds.csv").read_bytes()
    assert rows == (tmp_path / "longer" / longer[0].run_id / "rounds.csv").read_bytes()


def test_runs_that_differ_in_more_share_nothing() -> None:
    """The rule is that nothing else differs, not that rounds are not looked at."""
    same = runs_of(rounds=(1, 2)) + runs_of("stop_at_loss=2.5") + runs_of("stop_at_mb=3")
    assert [len(group) for group in together(same)] == [4]
    assert [config.rounds for config in together(same)[0]] == [4, 4, 2, 1]
    scheduled = runs_of("+server.horizon=${rounds}", rounds=(1, 2))
    assert [config.server.parameters["horizon"] for config in scheduled] == [1, 2]
    others = [*runs_of("seed=2"), *runs_of("lr=1e-2"), *runs_of("evaluate_every=2"), *scheduled]
    assert [len(group) for group in together(others)] == [1] * 5
    elsewhere = runs_of(rounds=(1,)) + runs_of("device=cpu", rounds=(2,))
    assert [len(group) for group in together(elsewhere)] == [1, 1], "executed otherwise"


def test_stops_end_a_run_where_they_say(do: Do, tmp_path: Path) -> None:
    whole, loss, mb = *runs_of(), *runs_of("stop_at_loss=5.5"), *runs_of("stop_at_mb=64")
    assert len({config.run_id for config in (whole, loss, mb)}) == 3
    do(tmp_path, [whole, loss, mb])
    results, rounds = (table.set_index("run_id") for table in collect(tmp_path))
    losses = list(rounds.loc[whole.run_id, "loss"])
    first = next(number for number, value in enumerate(losses) if value <= 5.5)
    assert first < 4
    assert list(rounds.loc[loss.run_id, "round"]) == list(range(first + 1))
    sent = rounds.loc[whole.run_id, "cumulative_bytes"]
    reached = next(number for number, value in enumerate(sent) if value >= 64e6)
    assert reached == 4
    assert list(rounds.loc[mb.run_id, "round"]) == list(range(reached + 1))
    ends = {run: results.loc[run, "end"] for run in results.index}
    assert ends == {whole.run_id: "rounds", loss.run_id: "target", mb.run_id: "budget"}
    assert results.loc[loss.run_id, "reason"] == f"round {first}: the loss is at most stop_at_loss"
    at = results.loc[loss.run_id]
    assert at["total_bytes"] == at["predicted_bytes"] == sent.iloc[first]


def test_a_budget_is_kept_where_rounds_are_not_evaluated(do: Do, tmp_path: Path) -> None:
    """The last model is evaluated, wherever the run ends."""
    [config] = runs_of("stop_at_mb=40", "evaluate_every=3")
    do(tmp_path, [config])
    results, rounds = collect(tmp_path)
    assert list(rounds["round"]) == [0, 1, 2]
    assert list(rounds["loss"].notna()) == [True, False, True]
    assert results["end"].item() == "budget"


def test_no_model_is_evaluated_twice(
    do: Do, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The initial model is all runs' own; a round of which nobody replies changes none."""
    evaluated: list[float] = []
    mine = runs_module.heldout_loss

    def heldout_loss(model: Any, windows: Any) -> float:
        evaluated.append(mine(model, windows))
        return evaluated[-1]

    monkeypatch.setattr(runs_module, "heldout_loss", heldout_loss)
    shared._initial_losses.clear()
    do(tmp_path, [*runs_of(rounds=(1, 2)), *runs_of("compression=topk", rounds=(2,))])
    assert len(evaluated) == 1 + 2 + 2
    do(tmp_path, runs_of("num_clients=1", "fraction_fit=1.0", "clients.dropout=0.99"))
    assert len(evaluated) == 6, "other clients, another text, and four rounds without a reply"
    results, _ = collect(tmp_path)
    assert (results["initial_loss"] == evaluated[0]).sum() == 4


def test_a_loss_that_is_low_enough_at_the_start_ends_a_run(do: Do, tmp_path: Path) -> None:
    [config] = runs_of("stop_at_loss=7")
    assert do(tmp_path, [config]) == 0
    results, rounds = collect(tmp_path)
    assert (results["end"].item(), len(rounds)) == ("target", 1)


def test_a_sweep_that_is_ended_early_leaves_the_shorter_runs(do: Do, tmp_path: Path) -> None:
    runs = runs_of(rounds=(1, 2, 5))
    with pytest.raises(Killed):
        do(tmp_path / "s", runs, killed_at=7, left=tmp_path / "left")
    assert [is_done(config, tmp_path / "left") for config in runs] == [True, True, False]
    status, _ = sweep_status(tmp_path / "left")
    [detail] = status.loc[status["status"] == "missing", "detail"]
    assert re.search(r"; round [123] is kept", detail)


def test_a_longer_run_goes_on_from_another_sweep(do: Do, tmp_path: Path) -> None:
    short, long = runs_of("compression=topk", rounds=(2, 4))
    do(tmp_path / "one", [short])
    further = long.checkpoint.model_copy(update={"source": str(tmp_path / "one")})
    assert do(tmp_path / "two", [long.model_copy(update={"checkpoint": further})]) == 4
    assert do(tmp_path / "three", [long]) == 8
    assert_same(tmp_path / "two", tmp_path / "three")
    longest = long.model_copy(update={"rounds": 5})
    own = further.model_copy(update={"source": str(tmp_path / "two" / long.run_id)})
    assert do(tmp_path / "four", [longest.model_copy(update={"checkpoint": own})]) == 2


def test_a_heavy_state_is_not_kept(do: Do, tmp_path: Path) -> None:
    [config] = runs_of("checkpoint.keep_mb=5")
    do(tmp_path, [config])
    assert not (tmp_path / config.run_id / CHECKPOINT).exists()
    assert check(tmp_path) == ([], 1, 0)


def cut(folder: Path) -> None:
    [path] = folder.glob("server.*")
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder: Path) -> None:
    path = next(folder.glob("client-*"))
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


def drop(folder: Path) -> None:
    (folder / "updates").unlink()


def edit(folder: Path) -> None:
    state = folder / STATE
    state.write_text(state.read_text().replace('"round": ', '"round": 1'))


def another_version(folder: Path) -> None:
    state = folder / STATE
    state.write_text(state.read_text().replace('"format": 1', '"format": 0'))


def nothing(folder: Path) -> None:
    (folder / STATE).write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, "is cut"),
        (flip, "by its hash"),
        (drop, "cannot be read"),
        (edit, "by its own hash"),
        (another_version, "is another version's: format 0"),
        (nothing, "is damaged"),
    ],
)
def test_what_is_damaged_is_named_and_ignored(
    do: Do,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    said: str,
) -> None:
    [config] = runs_of("compression=topk", "compression@downlink=topk", "sampling=round_robin")
    alone(do, tmp_path / "alone", [config])
    left = tmp_path / "left"
    with pytest.raises(Killed):
        do(tmp_path / "s", [config], killed_at=8, left=left)
    damage(left / config.run_id / CHECKPOINT)
    capsys.readouterr()
    assert do(left, [config]) == 8, "it starts over"
    assert said in "".join(capsys.readouterr().err.split("\n")).replace("  ", " ")
    assert_same(left, tmp_path / "alone")


def test_what_cannot_be_is_named_and_ignored(
    do: Do, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All hashes are right: whoever wrote it meant it."""
    [config] = runs_of("compression=topk")
    alone(do, tmp_path / "alone", [config])
    left = tmp_path / "left"
    with pytest.raises(Killed):
        do(tmp_path / "s", [config], killed_at=8, left=left)
    found = read_checkpoint(left / config.run_id)
    assert found is not None
    state = found.tree("server")
    store = Store(left / config.run_id, found.made, "", math.inf, found, print)
    store.save(found.round, True, [("server", {**state, "vector": state["vector"][:-1]})])
    assert do(left, [config]) == 8
    assert "a model of (1320959,) float32; the run starts over" in " ".join(
        capsys.readouterr().err.split()
    )
    assert_same(left, tmp_path / "alone")


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"device": "GPU"}, "it was made on GPU"),
        ({"versions": {"torch": "1.0"}}, "it was made with torch 1.0"),
        ({"trajectory": "0" * 12}, "it is of another run"),
    ],
)
def test_what_was_made_otherwise_is_named_and_ignored(
    do: Do,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    made: dict[str, Any],
    said: str,
) -> None:
    [config] = runs_of()
    folder = tmp_path / "left"
    mine = run_module.made_by

    def other(config: RunConfig) -> Any:
        own = mine(config)
        values = {**vars(own), **made}
        values["versions"] = {**own.versions, **made.get("versions", {})}
        return type(own)(**values)

    monkeypatch.setattr(run_module, "made_by", other)
    with pytest.raises(Killed):
        do(tmp_path / "s", [config], killed_at=6, left=folder)
    monkeypatch.setattr(run_module, "made_by", mine)
    assert do(folder, [config]) == 8
    assert said in " ".join(capsys.readouterr().err.split())


def test_another_processor_is_recorded(
    do: Do, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [config] = runs_of()
    with pytest.raises(Killed):
        do(tmp_path / "s", [config], killed_at=6, left=tmp_path / "left")
    mine = run_module.processor()
    monkeypatch.setattr(run_module, "processor", lambda: "another one")
    assert do(tmp_path / "left", [config]) < 8
    results, _ = collect(tmp_path / "left")
    assert results["processor"].item() == f"{mine}; then another one"


def test_what_hides_what_clients_keep_has_no_checkpoints(
    do: Do, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Flower's own engine: runs whose clients keep nothing have theirs all the same."""
    monkeypatch.setattr(keeper, "StatefulGrid", type("Nothing", (), {}))
    stateless, stateful = *runs_of(), *runs_of("compression=topk")
    do(tmp_path, [stateless, stateful])
    assert (tmp_path / stateless.run_id / CHECKPOINT / STATE).exists()
    assert not (tmp_path / stateful.run_id / CHECKPOINT).exists()
    assert "no checkpoints: backend=ray hides what clients keep" in capsys.readouterr().err


def test_a_state_is_written_once_and_only_where_it_changes(do: Do, tmp_path: Path) -> None:
    [config] = runs_of("compression=topk", "sampling=round_robin")
    with pytest.raises(Killed):  # in round 3, whose clients are those of round 1
        do(tmp_path / "s", [config], killed_at=6, left=tmp_path / "left")
    folder = tmp_path / "left" / config.run_id / CHECKPOINT
    names = sorted(path.name for path in folder.iterdir() if path.name != STATE)
    residuals = [name for name in names if name.startswith("client-")]
    assert sorted(name.partition(".")[2] for name in residuals) in (
        ["1", "1", "2", "2"],
        ["1", "1"],
    )
    assert len([name for name in names if name.startswith("server")]) == 1
    state = json.loads((folder / STATE).read_text())
    assert state["logs"]["updates"][1] == 0
