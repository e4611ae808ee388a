"""What the figures show of small sweeps, by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.axes import Axes

from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.records.read import load_records
from fedbw_sweep.records.write import RunRecord
from fedbw_sweep.report import figure
from fedbw_sweep.report.measure import mean_curves
from tests.report.sweeps import epochs_sweep, small_sweep

pytestmark = pytest.mark.slow


def test_the_pareto_front() -> None:
    final = pd.DataFrame({"sent": [1.0, 2.0, 2.0, 3.0, 4.0], "loss": [5.0, 5.0, 3.0, 4.0, 1.0]})
    assert figure.pareto(final, "sent").tolist() == [True, False, True, False, True]


def test_what_failed_to_learn_does_not_flatten_the_front(tmp_path: Path) -> None:
    losses = {"best": 2.5, "cheap": 2.6, "near": 2.62, "lost": 5.0}
    rows = [(label, 1, loss, 0.0, 9 - loss, 9 - loss) for label, loss in losses.items()]
    rows[2] = ("near", 1, 2.62, 0.0, 50.0, 50.0)
    rows[3] = ("lost", 1, 5.0, 0.0, 60.0, 60.0)
    columns = ["configuration", "round", "loss", "sd", "sent_up", "sent"]
    curves = pd.DataFrame(rows, columns=columns).assign(task="", text=float("nan"))
    figure.pareto_front(curves, tmp_path / "front.svg")
    drawn = (tmp_path / "front.svg").read_text()
    assert ">1 dominated beyond the axis</text>" in drawn
    assert ">5.0</text>" not in drawn
    labels = ["a, lr=1, x=2", "b, lr=2, x=2", "c, lr=1, x=2", "d, lr=1, x=2"]
    both = curves.assign(configuration=labels)
    figure.pareto_front(both, tmp_path / "common.svg")
    drawn = (tmp_path / "common.svg").read_text()
    assert all(f">{words}</text>" in drawn for words in ("a, lr=1", "b, lr=2", "x=2"))
    figure.pareto_front(curves[:3], tmp_path / "all.svg")
    assert ">1 dominated" not in (tmp_path / "all.svg").read_text()


@pytest.mark.parametrize("draw", [figure.pareto_front, figure.loss_against_bytes])
def test_the_texts_own_weight_is_marked_where_it_is_one(tmp_path: Path, draw: Any) -> None:
    rows = [("all", 1, 2.0, 0.0, 9.0, 18.0), ("few", 1, 3.0, 0.0, 1.0, 2.0)]
    columns = ["configuration", "round", "loss", "sd", "sent_up", "sent"]
    curves = pd.DataFrame(rows, columns=columns).assign(task="")
    words = ">the training text under xz</text>"
    for number, (text, marked) in enumerate([(0.5, True), ([0.5, 0.7], False), (None, False)]):
        path = tmp_path / f"{number}.svg"
        draw(curves.assign(text=text), path)
        assert (words in path.read_text()) == marked


def test_a_front_for_each_model_and_text(
    tmp_path: Path, run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {("tiny", "none"): 2.0, ("tiny", "topk"): 3.0, ("pythia-14m", "none"): 2.5}
    for (model, method), loss in losses.items():
        config = run_config(f"model={model}", f"compression={method}", "rounds=1")
        up = {"none": 4_000_000, "topk": 1_000_000}[method] * (10 if model != "tiny" else 1)
        sent = {"uplink_bytes": up, "downlink_bytes": up}
        sums = {"cumulative_uplink_bytes": up, "cumulative_bytes": 2 * up}
        record = RunRecord(config, "done", summary={"loss": loss})
        record.rounds = [{"round": 1, "loss": loss, **sent, **sums}]
        record.write(tmp_path)
    records = load_records(tmp_path, messages=False)
    curves = mean_curves(records.results, records.rounds)
    front, drawn = figure._front, {}

    def draw(panels: Any, final: pd.DataFrame, styles: Any) -> None:
        beaten = ~figure.pareto(final, "sent_up")
        drawn[final["task"].iloc[0]] = dict(zip(final["loss"], beaten, strict=True))
        front(panels, final, styles)

    monkeypatch.setattr(figure, "_front", draw)
    figure.pareto_front(curves, tmp_path / "front.svg")
    [tiny, pythia] = sorted(drawn, key=lambda task: "tiny" not in task)
    assert (drawn[tiny], drawn[pythia]) == ({2.0: False, 3.0: False}, {2.5: False})
    words = (tmp_path / "front.svg").read_text()
    assert words.count(">held-out loss (nats per token)</text>") == 2
    assert "pythia-14m" in words
    figure.loss_against_bytes(curves, tmp_path / "loss.svg")
    assert (tmp_path / "loss.svg").read_text().count(">held-out loss (nats per token)</text>") == 2


def test_local_epochs_are_compared_at_equal_bytes(
    tmp_path: Path, run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs_sweep(tmp_path, run_config)
    records = load_records(tmp_path, messages=False)
    lines, drawn = figure.draw_lines, []

    def draw(axes: Axes, points: pd.DataFrame, *rest: Any) -> None:
        drawn.append(points)
        lines(axes, points, *rest)

    monkeypatch.setattr(figure, "draw_lines", draw)
    curves = mean_curves(records.results, records.rounds)
    figure.local_epochs(records.results, curves, tmp_path / "epochs.svg")
    assert len(drawn) == 2  # a panel for each way to deal the text
    points = pd.concat(drawn)
    found = {
        (label, epochs): loss
        for label, epochs, loss in points[["configuration", "epochs", "loss"]].to_numpy()
    }
    # 2 MB up are two rounds of one epoch, and one round of four
    assert found == {
        ("none, data.partition=iid", 1): 2.8,
        ("none, data.partition=iid", 4): 3.9,
        ("none, data.partition=natural", 1): 3.0,
        ("none, data.partition=natural", 4): 2.9,
    }
    text = (tmp_path / "epochs.svg").read_text()
    for words in ("local epochs, at 2.00 MB of uplink", "data.partition=natural"):
        assert words in text


def test_bytes_by_part(tmp_path: Path, run_config: Callable[..., RunConfig]) -> None:
    small_sweep(tmp_path, run_config)
    results = load_records(tmp_path, messages=False).results
    parts = pd.DataFrame(
        [
            (run_id, f"layer.{n}.weight", part, 1000 * (n + 1))
            for run_id in results["run_id"]
            for n in range(30)
            for part in ("values", "indices")
        ],
        columns=["run_id", "tensor", "part", "bytes"],
    )
    figure.bytes_by_part(results, parts, tmp_path / "parts.svg")
    drawn = (tmp_path / "parts.svg").read_text()
    assert ">10 other tensors</text>" in drawn
    assert ">layer.29.weight</text>" in drawn
