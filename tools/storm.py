"""Damage records at random and read them: ``python tools/storm.py LOG [CASES]``.

Each case changes one file of a small sweep, whose hashes then find it, and makes the hashes right
again, as somebody can who means to. Every command that reads must end in time, by itself or with an
error of the package's own, and may show no other number than the recorded ones as checked. LOG gets
a line per case; started again with the same LOG, the storm goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir

from fedbw_sweep import status
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.config.section import CONF
from fedbw_sweep.errors import FedbwError
from fedbw_sweep.records.check import sealed
from fedbw_sweep.records.collect import collect
from fedbw_sweep.records.read import Records, load_records
from fedbw_sweep.records.schema import METRICS, STATUS, TIMING_COLUMNS
from fedbw_sweep.records.write import RunRecord, is_done
from fedbw_sweep.report.__main__ import main as report
from fedbw_sweep.verify import recorded_config

TIME_S = 60
"""Seconds that one command may take."""

REPORTED = 40
"""Every so many cases the whole report is written too, which takes seconds."""

TEXTS = (
    b"", b"nan", b"inf", b"-1", b"1e300", b"0.5", b"99999999999999999999", b"null", b"true", b"[",
    b"{", b"]", b'"', b"$x_{", b"[a, b]", b"\x1b[2J", b"\\u001b[2J", b"\x00", b"\xff\xfe", b"&a *a",
    b"../../x", b"\n", b",", b"'; rm -rf x; '", b"!!timestamp x", b"<script>", b"x" * 100_000,
)  # fmt: skip
"""What a value, or a piece of a file, is replaced by."""


@cache
def configs(number: int) -> list[RunConfig]:
    """Return as many configs, of unlike methods."""
    methods = ["none", "topk", "int8"][:number]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        lines = [["model=tiny", "rounds=3", f"compression={name}"] for name in methods]
        return [RunConfig.from_hydra(compose("config", line)) for line in lines]


def record_of(config: RunConfig) -> RunRecord:
    """Return a finished run with round numbers."""
    sent = [0, 1000, 1000, 1000]
    rows: list[dict[str, Any]] = [
        {
            "round": number, "loss": 4.5 - number, "perplexity": 2.0, "bits_per_byte": 1.0,
            "clients": 1, "uplink_bytes": count, "downlink_bytes": count,
            "uplink_message_bytes": count, "downlink_message_bytes": count,
            "dense_uplink_bytes": count, "predicted_bytes": 2 * count,
            "cumulative_uplink_bytes": 1000 * number, "cumulative_bytes": 2000 * number,
        }
        for number, count in enumerate(sent)
    ]  # fmt: skip
    messages: list[dict[str, Any]] = [
        {
            "round": number, "client": 0, "direction": direction, "payload_bytes": 1000,
            "message_bytes": 1100, "dense_bytes": 1000, "frozen_bytes": 0,
        }
        for number in (1, 2, 3)
        for direction in ("downlink", "uplink")
    ]  # fmt: skip
    parts = [{"tensor": "w", "part": part, "bytes": 500} for part in ("values", "tables")]
    timing = [dict.fromkeys(TIMING_COLUMNS, 0.5) | {"round": number} for number in range(4)]
    summary = {"loss": 1.5, "uplink_bytes": 3000, "total_bytes": 6000, "model_hash": "ab" * 32}
    environment = {"python": "3.11.2", "processor": "EPYC, 2 cores"}
    return RunRecord(
        config, "done", "rounds", None, summary, rows, messages, parts, timing, environment
    )


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Return the content of a file with one change."""
    at, end = sorted(rng.integers(0, len(data) + 1, 2).tolist())
    kind = rng.integers(8)
    if kind == 0 and data:
        flipped = bytearray(data)
        flipped[min(at, len(data) - 1)] ^= 1 << int(rng.integers(8))
        return bytes(flipped)
    if kind == 1:
        return data[:at] + data[end:]
    if kind == 2:
        return data[:at]
    if kind == 3:
        return data[:end] + data[at:end] * int(rng.integers(1, 4)) + data[end:]
    text = TEXTS[rng.integers(len(TEXTS))]
    if kind == 4:
        return data[:at] + text + data[at:]
    words = [
        piece
        for piece in data.replace(b":", b",").replace(b"\n", b",").split(b",")
        if piece.strip()
    ]
    if not words:
        return text
    return data.replace(words[rng.integers(len(words))].strip(), text, int(rng.integers(1, 3)))


def damage(folder: Path, other: Path, rng: np.random.Generator) -> str:
    """Change one file of a run's folder; say which and how."""
    path = folder / str(rng.choice(sorted(path.name for path in folder.iterdir())))
    kind = rng.integers(20)
    if kind == 0:
        path.unlink()
    elif kind == 1:
        shutil.copy(other / path.name, path)
    elif kind == 2:
        path.unlink()
        path.symlink_to(other / path.name)
    elif kind == 3:
        path.unlink()
        os.mkfifo(path)
    elif kind == 4:
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(mutated(path.read_bytes(), rng))
        return f"{path.name}: content"
    return f"{path.name}: {['removed', 'swapped', 'linked', 'pipe', 'folder'][kind]}"


def seal(folder: Path) -> bool:
    """Make a folder's hashes right again, if it still says what is hashed."""
    path = folder / STATUS
    try:
        said = json.loads(path.read_bytes()) if path.is_file() else None
        files = {
            each.name: each.read_bytes()
            for each in folder.iterdir()
            if each.is_file() and each.name != STATUS
        }
        if not isinstance(said, dict):
            return False
        path.write_text(json.dumps(sealed(said, files)))
    except (ValueError, RecursionError):
        return False
    return True


@contextmanager
def in_time() -> Iterator[None]:
    """Raise `TimeoutError` in a command that takes too long."""

    def late(*_: object) -> None:
        raise TimeoutError(f"longer than {TIME_S} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(TIME_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def ends_well(what: str, command: Callable[[], Any], wrong: list[str]) -> Any:
    """Run a command; add to `wrong` what it should not have raised or shown."""
    said = StringIO()
    result = None
    try:
        with in_time(), redirect_stdout(said), redirect_stderr(said):
            result = command()
    except FedbwError as error:
        said.write(str(error) if what == "report" else "")
    except SystemExit as ended:
        if ended.code not in (0, 2):
            wrong.append(f"{what}: exit {ended.code}")
    except Exception as error:
        wrong.append(f"{what}: {type(error).__name__}: {str(error)[:200]}")
    if "\x1b[2J" in said.getvalue():
        wrong.append(f"{what}: a control sequence reached the terminal")
    return result


def shown(records: Records) -> dict[str, tuple[Any, ...]]:
    """Return the numbers that are shown of each finished run."""
    done = records.results[records.results["status"] == "done"]
    numbers = done.set_index("run_id")[METRICS].astype(object).where(lambda t: t.notna(), None)
    tables = (records.rounds, records.messages, records.timing, records.parts)
    return {
        str(run): (
            tuple(numbers.loc[run]),
            *(str(t[t["run_id"] == run].to_dict("records")) for t in tables),
        )
        for run in numbers.index
    }


def case(number: int, whole: Path, truth: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Do one case; return what was changed and what went wrong."""
    rng = np.random.default_rng(number)
    wrong: list[str] = []
    with TemporaryDirectory() as temporary:
        sweep = Path(shutil.copytree(whole, Path(temporary, "sweep")))
        runs = sorted(path for path in sweep.iterdir() if path.is_dir())
        how = damage(runs[0], runs[1], rng)
        if rng.integers(2):
            (sweep / "results.csv").unlink()
        for again in (False, True):
            if again and not seal(runs[0]):
                break
            records = ends_well("load", lambda: load_records(sweep), wrong)
            if records is not None and not again:
                unchecked = any("unchecked" in note for note in records.notes)
                wrong += [
                    f"load: {run} is shown with other numbers"
                    for run, numbers in shown(records).items()
                    if numbers != truth.get(run) and not (unchecked and run == runs[0].name)
                ]
            for what, command in (
                ("status", lambda: status.main([str(sweep)])),
                ("check", lambda: status.main([str(sweep), "--check"])),
                ("verify", lambda: recorded_config(runs[0])),
                ("resume", lambda: [is_done(c, sweep) for c in configs(2)]),
            ):
                ends_well(what, command, wrong)
            if number % REPORTED == 0:
                out = Path(temporary, "report")
                ends_well("report", lambda out=out: report([str(sweep), "--out", str(out)]), wrong)
            ends_well("collect", lambda: collect(sweep), wrong)
    return {"case": number, "how": how, "wrong": wrong}


def storm(log: Path, cases: int) -> list[dict[str, Any]]:
    """Do the cases that `log` does not have yet; return all of them.

    A case that was begun and has no outcome ended the process: it is one that went wrong.
    """
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    found: dict[int, dict[str, Any]] = {}
    for line in lines:
        outcome = json.loads(line)
        found[outcome["case"]] = outcome
    with TemporaryDirectory() as temporary, log.open("a", encoding="utf-8") as file:
        whole = Path(temporary)
        for config in configs(3):
            record_of(config).write(whole)
        collect(whole)
        truth = shown(load_records(whole))
        for number in [number for number in range(cases) if number not in found]:
            begun = {"case": number, "how": "unknown", "wrong": ["it ended the process"]}
            print(json.dumps(begun), file=file, flush=True)
            found[number] = case(number, whole, truth)
            print(json.dumps(found[number]), file=file, flush=True)
    return [found[number] for number in range(cases)]


def main(arguments: list[str]) -> int:
    """Run the storm; return 1 if a case went wrong."""
    if not arguments:
        print(__doc__)
        return 2
    outcomes = storm(Path(arguments[0]), int(arguments[1]) if len(arguments) > 1 else 2000)
    files = Counter(outcome["how"].partition(":")[0] for outcome in outcomes)
    bad = [outcome for outcome in outcomes if outcome["wrong"]]
    for outcome in bad[:50]:
        print(f"case {outcome['case']} ({outcome['how']}): {'; '.join(outcome['wrong'])}")
    told = ", ".join(f"{count} of {name}" for name, count in sorted(files.items()))
    print(f"{len(outcomes)} cases ({told}): {len(bad)} went wrong")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
