"""Where rounds go besides their record: into any class with three methods, and never in the way."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.config.section import CONF
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.sweeps.loggers.base import logged, logger_of
from tests.conftest import ROOT, SMALL, config_of

ROWS = [
    {"round": 0, "loss": 1.5, "train_loss": None, "cumulative_uplink_bytes": 0},
    {"round": 1, "loss": None, "train_loss": 1.25, "cumulative_uplink_bytes": 5_000},
]


class Lines:
    """A logger of a user's own; it fails where it is told to."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails

    def _say(self, what: str, text: str) -> None:
        if what == self.fails:
            raise OSError(28, "No space left on device")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{what} {text}\n")

    def open(self, config: RunConfig, folder: Path) -> None:
        self.path = folder / "lines.txt"
        self._say("open", config.run_id)

    def log(self, row: dict[str, Any]) -> None:
        self._say("log", str(row["round"]))

    def close(self) -> None:
        self._say("close", "")


def own(**parameters: Any) -> RunConfig:
    section = {"name": "lines", "_target_": f"{__name__}.Lines", **parameters}
    return RunConfig.from_dict({**config_of(*SMALL).model_dump(), "logger": section})


def test_a_logger_of_the_users_own_is_opened_fed_and_closed(tmp_path: Path) -> None:
    def interrupted() -> None:
        with logged(own(), tmp_path) as log:
            for row in ROWS:
                log(row)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    lines = (tmp_path / "lines.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["open", "log", "log", "close"]
    assert lines[0].split()[1] == config_of(*SMALL).run_id  # it changes nothing in a run


@pytest.mark.parametrize(
    ("fails", "written"), [("open", []), ("log", ["open", "close"]), ("close", ["open", "log"])]
)
def test_a_logger_that_fails_is_reported_once_and_the_run_goes_on(
    fails: str, written: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with logged(own(fails=fails), tmp_path) as log:
        for row in ROWS:
            log(row)
    said = capsys.readouterr().err
    assert said.count("logger=lines stopped, the run goes on: OSError: [Errno 28] No space") == 1
    lines = tmp_path / "lines.txt"
    found = [line.split()[0] for line in lines.read_text().splitlines()] if written else []
    assert list(dict.fromkeys(found)) == written


@pytest.mark.slow
def test_what_is_no_logger_or_refuses_its_parameters_is_an_error() -> None:
    values = config_of(*SMALL).model_dump()
    for section, words in (
        (
            {"name": "x", "_target_": "collections.Counter"},
            r"logger\._target_=collections\.Counter",
        ),
        ({"name": "x", "_target_": "no_such.Thing"}, r"logger\._target_=no_such\.Thing"),
        ({"name": "wandb", "mode": "cloud"}, r"logger\.mode=cloud: must be offline or online"),
    ):
        if section["name"] == "wandb":
            pytest.importorskip("wandb")
        with pytest.raises(ConfigError, match=words):
            logger_of(RunConfig.from_dict({**values, "logger": section}))


def test_the_plain_spelling_of_a_file_is_still_read() -> None:
    values = {**config_of(*SMALL).model_dump(), "logger": "tensorboard"}
    assert RunConfig.from_dict(values) == config_of(*SMALL, "logger=tensorboard")


def test_each_logger_is_one_short_file() -> None:
    files = {path.stem for path in (ROOT / "fedbw_sweep" / "sweeps" / "loggers").glob("*.py")}
    choices = {path.stem for path in (CONF / "logger").glob("*.yaml")}
    assert files - {"__init__", "base"} == choices - {"none"}
    for name in choices - {"none"}:
        text = (ROOT / "fedbw_sweep" / "sweeps" / "loggers" / f"{name}.py").read_text()
        assert len(text.splitlines()) < 60


def records(log: bytes) -> Iterator[bytes]:
    """Read what ``wandb sync`` would send: LevelDB's log format, behind 7 bytes of W&B's own."""
    assert log[:4] == b":W&B"
    record, at = b"", 7
    while at + 7 <= len(log):
        length, kind = struct.unpack_from("<HB", log, at + 4)  # after a checksum
        if kind == 0 or 2**15 - at % 2**15 < 7:  # a block ends with zeros
            at = (at // 2**15 + 1) * 2**15
            continue
        record += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last piece
            yield record
            record = b""


@pytest.mark.slow
def test_weights_and_biases_gets_every_round_without_a_network(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    config = config_of(*SMALL, "logger=wandb")
    code = f"""
import socket
from pathlib import Path
from fedbw_sweep.sweeps.loggers.base import logged
from tests.conftest import config_of

connect = socket.socket.connect
def local(self, address):
    assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "localhost"), address
    return connect(self, address)
socket.socket.connect = local
with logged(config_of(*{SMALL!r}, "logger=wandb"), Path({str(tmp_path)!r})) as log:
    for row in {ROWS!r}:
        log(row)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "stopped" not in done.stderr
    [file] = tmp_path.glob(f"wandb/offline-run-*-{config.run_id}/*.wandb")
    rows = []
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            rows.append(
                {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
            )
    assert [row["round"] for row in rows] == ["0", "1"]
    assert rows[0]["loss"] == "1.5"
    assert "loss" not in rows[1]
    assert rows[1]["train_loss"] == "1.25"
