"""A recorded sweep's numbers, worked out from its messages, losses and seconds alone."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from tests.conftest import ROOT

TARGET, BUDGET = 5.14, 1e6

Key = tuple[str, int, int]


def books(sweep: Path) -> dict[Key, dict[str, float | None]]:
    """Each finished run's numbers, from its messages, losses and seconds, in plain Python."""
    network = yaml.safe_load((ROOT / "conf" / "network" / "campus.yaml").read_text())
    assert network["spread"] == 0  # no draws: a message's time is latency and bytes over the rate
    rate = {way: network[f"{way}_mbit_s"] * 1e6 / 8 for way in ("uplink", "downlink")}
    found: dict[Key, dict[str, float | None]] = {}
    for folder in sweep.iterdir():
        if not (folder / "status.json").exists():
            continue
        if json.loads((folder / "status.json").read_text())["status"] != "done":
            continue
        config = yaml.safe_load((folder / "config.yaml").read_text())
        with (folder / "rounds.csv").open() as file:
            losses = [float(row["loss"]) for row in csv.DictReader(file)]
        with (folder / "timing.csv").open() as file:
            timing = {int(row["round"]): row for row in csv.DictReader(file)}
        messages = pq.read_table(folder / "messages.parquet").to_pylist()
        numbers = range(len(losses))
        way = {
            name: [
                [m for m in messages if m["direction"] == name and m["round"] == n] for n in numbers
            ]
            for name in ("uplink", "downlink")
        }
        up, down = (
            [sum(sum(m["payload_bytes"] for m in of) for of in way[name][: n + 1]) for n in numbers]
            for name in ("uplink", "downlink")
        )
        both = [u + d for u, d in zip(up, down, strict=True)]
        uplinks = [m for of in way["uplink"] for m in of]
        dense = sum(m["dense_bytes"] for m in uplinks)
        slowest = [
            max(
                sum(
                    network["latency_s"] + m["payload_bytes"] / rate[m["direction"]]
                    for m in messages
                    if (m["round"], m["client"]) == (n, client)
                )
                for client in {m["client"] for m in messages}
            )
            for n in numbers[1:]
        ]
        coding = [
            float(timing[n]["encode_seconds"]) / len(way["uplink"][n])
            + float(timing[n]["decode_seconds"])
            for n in numbers[1:]
        ]
        first = next((n for n in numbers if losses[n] <= TARGET), None)
        found[config["compression"]["name"], config["num_clients"], config["seed"]] = {
            "uplink_bytes": up[-1],
            "downlink_bytes": down[-1],
            "total_bytes": both[-1],
            "uplink_ratio": dense / up[-1],
            "bits_per_coordinate": 8 * up[-1] / (dense / 4),  # fp32 takes 4 bytes
            "loss": losses[-1],
            "rounds_to_target": first,
            "uplink_bytes_to_target": None if first is None else up[first],
            "downlink_bytes_to_target": None if first is None else down[first],
            "bytes_to_target": None if first is None else both[first],
            "seconds_to_target": None if first is None else sum(slowest[:first]),
            "loss_at_uplink_budget": [losses[n] for n in numbers if up[n] <= BUDGET][-1],
            "loss_at_budget": [losses[n] for n in numbers if both[n] <= BUDGET][-1],
            "round_seconds": statistics.mean(slowest),
            "communication_seconds": sum(slowest),
            "codec_seconds": statistics.mean(coding),
            "link_bytes": sum(
                statistics.mean(m["payload_bytes"] for of in way[name] for m in of) for name in way
            ),
        }
    for (method, clients, seed), own in found.items():
        base = found["none", clients, seed]
        own["loss_difference"] = own["loss"] - base["loss"]
        saved = base["link_bytes"] - own["link_bytes"]
        longer = own["codec_seconds"] - base["codec_seconds"]
        speed = float("inf") if longer <= 0 else 8 * saved / 1e6 / longer
        own["break_even_mbit_s"] = None if method == "none" else speed if saved > 0 else 0.0
    return found


def near(text: str, value: float | None) -> bool:
    return (
        text == "" if value is None else float(text) == pytest.approx(value, rel=1e-12, abs=1e-15)
    )
