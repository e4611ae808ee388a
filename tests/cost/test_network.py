"""Communication time against sums worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbw_sweep.config.groups import NetworkConfig
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.cost.network import (
    break_even_mbit_s,
    expected_round_seconds,
    link_bytes,
    round_seconds,
    slowdowns,
)
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.records.write import RunRecord
from fedbw_sweep.report.__main__ import main
from tests.conftest import refuses

ALIKE = NetworkConfig(name="alike", uplink_mbit_s=8, downlink_mbit_s=80, latency_s=0.25, spread=0)
SPREAD = ALIKE.model_copy(update={"spread": 0.5})


def messages(*rows: tuple[str, int, int, str, int]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["run_id", "round", "client", "direction", "payload_bytes"])


def test_a_round_takes_as_long_as_its_slowest_client() -> None:
    book = messages(
        ("a", 1, 0, "downlink", 10**7),  # 1 s
        ("a", 1, 0, "uplink", 10**6),  # 1 s
        ("a", 1, 3, "downlink", 10**7),
        ("a", 1, 3, "uplink", 3 * 10**6),  # 3 s: the slowest
        ("a", 2, 1, "downlink", 10**7),  # never replies
        ("b", 1, 0, "downlink", 0),
        ("b", 1, 0, "uplink", 0),
    )
    seconds = round_seconds(ALIKE, book)
    assert seconds.to_dict() == {
        ("a", 1): pytest.approx(0.25 + 1 + 0.25 + 3),
        ("a", 2): pytest.approx(0.25 + 1),
        ("b", 1): pytest.approx(0.5),
    }
    assert link_bytes(book).to_dict() == {"a": 10**7 + 2 * 10**6, "b": 0}


def test_a_slow_client_is_slow_in_every_run() -> None:
    factors = slowdowns(SPREAD, 4)
    assert slowdowns(SPREAD, 9)[:4].tolist() == factors.tolist()
    book = messages(*((run, 1, 3, "uplink", size * 10**6) for run, size in (("a", 1), ("b", 2))))
    seconds = round_seconds(SPREAD, book) - 0.25
    assert seconds.tolist() == pytest.approx([factors[3], 2 * factors[3]])


def test_the_spread_is_log_normal_with_median_one() -> None:
    logarithms = np.log(slowdowns(SPREAD, 20_000))
    assert np.median(logarithms) == pytest.approx(0, abs=0.02)
    assert logarithms.std() == pytest.approx(0.5, rel=0.02)


@pytest.mark.slow
@given(
    down=st.integers(0, 10**9),
    up=st.integers(0, 10**9),
    clients=st.integers(1, 5),
)
def test_the_prediction_is_the_measurement_where_all_are_alike(
    down: int, up: int, clients: int
) -> None:
    rows = [
        ("a", 1, c, d, s) for c in range(clients) for d, s in (("downlink", down), ("uplink", up))
    ]
    [measured] = round_seconds(ALIKE, messages(*rows))
    assert expected_round_seconds(ALIKE, down, up, clients) == pytest.approx(measured)


@pytest.mark.parametrize("clients", [1, 2, 10, 300])
def test_the_predicted_slowest_is_the_median_of_many_rounds(clients: int) -> None:
    """With 1 MB up alone a client takes 1 s times its own factor."""
    many = slowdowns(SPREAD, 2_001 * clients).reshape(2_001, clients).max(axis=1)
    predicted = expected_round_seconds(SPREAD, 0, 10**6, clients) - 0.5
    assert predicted == pytest.approx(float(np.median(many)), rel=0.05)


def test_a_million_clients_need_no_draw() -> None:
    # the median of the largest of a million normals is 4.83 (tables of extreme values)
    seconds = expected_round_seconds(SPREAD, 0, 10**6, 10**6) - 0.5
    assert math.log(seconds) / 0.5 == pytest.approx(4.827, abs=0.002)


@pytest.mark.parametrize(
    ("saved", "extra", "speed"),
    [
        (10**6, 0.5, 16.0),  # 8 Mbit in half a second
        (10**6, 0.0, math.inf),
        (10**6, -1.0, math.inf),
        (0, 1.0, 0.0),
        (-5, 1.0, 0.0),
        (math.nan, 1.0, math.nan),
        (5, math.nan, math.nan),
    ],
)
def test_break_even_by_hand(saved: float, extra: float, speed: float) -> None:
    assert break_even_mbit_s([saved], [extra]).tolist() == [pytest.approx(speed, nan_ok=True)]


def test_at_break_even_both_take_equally_long() -> None:
    [speed] = break_even_mbit_s([9_000_000], [0.7])
    network = ALIKE.model_copy(update={"uplink_mbit_s": speed, "downlink_mbit_s": speed})
    dense = expected_round_seconds(network, 5_000_000, 10_000_000, 1) + 0.1
    method = expected_round_seconds(network, 5_000_000, 1_000_000, 1) + 0.1 + 0.7
    assert dense == pytest.approx(method)


@pytest.fixture
def sweep(run_config: Callable[..., RunConfig], tmp_path: Path) -> Path:
    """Dense and int8, two clients a round: 10 MB down, 10 or 2 MB up, int8 coded in 0.4 s."""
    for method, up, encode, decode in (("none", 10**7, 0.0, 0.0), ("int8", 2 * 10**6, 0.2, 0.3)):
        config = run_config(f"compression={method}", "rounds=2", "network=campus")
        record = RunRecord(config, "done")
        record.summary = {"loss": 2.0}
        record.rounds = [
            {"round": n, "loss": 4.0 - n, "clients": 2 if n else 0,
             "cumulative_uplink_bytes": 2 * n * up, "cumulative_bytes": 2 * n * (10**7 + up)}
            for n in range(3)
        ]  # fmt: skip
        record.messages = [
            {"round": n, "client": c, "direction": d, "payload_bytes": size,
             "message_bytes": size, "dense_bytes": 10**7, "frozen_bytes": 0}
            for n in (1, 2) for c in (0, 1) for d, size in (("downlink", 10**7), ("uplink", up))
        ]  # fmt: skip
        record.timing = [
            {"round": n, "encode_seconds": n and encode, "decode_seconds": n and decode}
            for n in range(3)
        ]
        record.write(tmp_path)
    return tmp_path


def read(folder: Path, name: str) -> pd.DataFrame:
    table = pd.read_csv(folder / "tables" / f"{name}.csv", keep_default_na=False, na_values=[""])
    keys = [key for key in ("network", "compression") if key in table]
    return table.set_index(keys)


@pytest.mark.slow
def test_the_reports_times_by_hand(sweep: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    assert main([str(sweep), "--out", str(out), "--network", "campus", "--target-loss", "3"]) == 0
    table = read(out, "communication_time")
    # 1,000 Mbit/s both ways: 10 MB in 80 ms, 2 MB in 16 ms, 5 ms each way
    assert table.loc["none", "round_seconds"] == pytest.approx(0.080 + 0.080 + 0.01)
    assert table.loc["int8", "round_seconds"] == pytest.approx(0.080 + 0.016 + 0.01)
    assert table.loc["int8", "communication_seconds"] == pytest.approx(2 * 0.106)
    assert table.loc["int8", "codec_seconds"] == pytest.approx(0.2 / 2 + 0.3)
    # 8 MB saved are 64 Mbit, in 0.4 s
    assert table.loc["int8", "break_even_mbit_s"] == pytest.approx(160)
    assert pd.isna(table.loc["none", "break_even_mbit_s"])
    assert table.loc["int8", "round_seconds_speedup"] == pytest.approx(0.170 / 0.106)
    target = read(out, "time_to_target")
    assert target.loc["none", "seconds_to_target"] == pytest.approx(0.170)
    text = (out / "tables" / "communication_time.md").read_text()
    assert "Network campus: 1000 Mbit/s up, 1000 down, latency 0.005 s, spread 0." in text


@pytest.mark.slow
def test_all_networks_are_rows_of_one_table(sweep: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    assert main([str(sweep), "--out", str(out), "--network", "all"]) == 0
    table = read(out, "communication_time")
    networks = [network.name for network in NetworkConfig.choices("all")]
    assert {network for network, _ in table.index} == set(networks)
    assert len(table) == 2 * len(networks)
    slow, fast = (table.loc[(name, "none"), "round_seconds"] for name in ("4g", "datacenter"))
    assert slow > 100 * fast


def test_an_unknown_network_is_named(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refuses(main, [str(sweep), "--network", "5g"])
    assert "4g, campus, datacenter, home" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--network=dial-up"):
        NetworkConfig.choices("dial-up")
