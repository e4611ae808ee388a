"""A page of a small sweep in a real browser, without a network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import yaml
from playwright.sync_api import Locator, Page

from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.records.write import RunRecord
from tests.conftest import config_of

EVIL = "<img src=x onerror=\"document.title='owned'\"></script>"

ROUNDS = 4

MODEL_BYTES = 1_000_000

LOSSES = {
    "none": (2.0, 2.1, 2.3),
    "int8": (2.2, 2.4, 2.3),
    "topk": (2.9, 3.0, None),  # seed 3 fails
    "sign": (3.4, 3.5, None),  # seed 3 was killed; more bytes than topk: dominated
}

UPDATE_BYTES = {"none": 1_000_000, "int8": 254_321, "topk": 12_345, "sign": 31_300}

Open = Callable[..., Page]

Write = Callable[..., Path]


def finished(config: RunConfig, loss: float) -> RunRecord:
    """A run of one client a round whose loss falls to `loss` in equal steps."""
    update = UPDATE_BYTES[config.compression.name]
    rows = []
    for number in range(config.rounds + 1):
        sent = min(number, 1)
        rows.append(
            {
                "round": number,
                "loss": loss + (config.rounds - number),
                "clients": sent,
                "uplink_bytes": update * sent,
                "downlink_bytes": MODEL_BYTES * sent,
                "cumulative_uplink_bytes": update * number,
                "cumulative_bytes": (update + MODEL_BYTES) * number,
            }
        )
    up, down = update * config.rounds, MODEL_BYTES * config.rounds
    record = RunRecord(config, "done", rounds=rows)
    record.summary = {
        "uplink_bytes": up,
        "downlink_bytes": down,
        "total_bytes": up + down,
        "loss": loss,
        "bits_per_byte": loss / 2,
        "uplink_ratio": MODEL_BYTES / update,
        "bits_per_coordinate": 8 * update / 250_000,
    }
    record.environment = {"torch": "2.13.0", "execution": {"sweep": "main"}}
    return record


def write_sweep(folder: Path) -> None:
    for method, losses in LOSSES.items():
        for seed, loss in enumerate(losses, start=1):
            config = config_of(f"compression={method}", f"seed={seed}", f"rounds={ROUNDS}")
            if loss is not None:
                finished(config, loss).write(folder)
            elif method == "topk":
                RunRecord(config, "failed", error=f"client 2: {EVIL}").write(folder)
            else:
                (folder / config.run_id).mkdir()
                text = yaml.safe_dump(config.science)
                (folder / config.run_id / "config.yaml").write_text(text)


def rows(page: Page) -> Locator:
    return page.locator("#main tr.row")


def first_column(page: Page) -> list[str]:
    return [text.strip() for text in page.locator("#main tr.row td:first-child").all_inner_texts()]


def marks(page: Page, chart: str) -> list[dict[str, str]]:
    """What a screen reader is told of a chart's points."""
    labels = page.locator(f"#{chart} .mark-symbol.role-mark path").evaluate_all(
        "paths => paths.map(path => path.getAttribute('aria-label'))"
    )
    return [dict(part.split(": ", 1) for part in label.split("; ")) for label in labels]
