"""Several commands on one sweep: ``python -m tools.crowds LOG [CASES]``.

In each case two or four commands are started on one sweep at once, and one or two of them are
killed on their way. The others must end well, with the tables of a sweep that one command did
alone, byte for byte; each run is trained to its end once. LOG gets a line per case; started again
with the same LOG, the storm goes on where it stopped.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import mkdtemp

from tools.kills import Said, alone, go_through, short_folder, start, tables

ENDS_S = 600
"""Seconds in which every command must have ended."""


def case(number: int, wanted: dict[str, bytes], place: Path) -> Said:
    """Start commands, kill some; return what was done and what is wrong, if anything."""
    rng = random.Random(number)
    count = 2 if number % 2 == 0 else 4
    folder, temporaries = place / f"sweep{number}", [short_folder() for _ in range(count)]
    commands = [start(folder, temporary) for temporary in temporaries]
    killed = rng.sample(range(count), count // 2 if number % 5 else 0)
    for index in killed:
        time.sleep(rng.uniform(2, 25))
        commands[index].send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM]))
    faults, codes = [], []
    for index, command in enumerate(commands):
        try:
            codes.append(command.wait(ENDS_S))
        except subprocess.TimeoutExpired:
            faults.append(f"command {index} hangs")
            command.kill()
        if index not in killed and command.returncode != 0:
            faults.append(f"command {index} ends with {command.returncode}")
    if tables(folder) != wanted:
        faults.append("other tables")
    said = "".join((t / "output").read_text(encoding="utf-8") for t in temporaries)
    done = sum(" loss " in line and " -> " in line for line in said.splitlines())
    runs = len(list(folder.glob("*/status.json")))
    if done > runs + len(killed):
        faults.append(f"{done} ends of {runs} runs")
    faults += [f"left: {path}" for path in [*folder.glob(".*"), *folder.glob("*/claim.*")]]
    if not faults:
        for path in (folder, *temporaries):
            shutil.rmtree(path)
    return {
        "case": number, "commands": count, "killed": len(killed), "codes": codes, "ends": done,
        "runs": runs, "outputs": list(map(str, temporaries)), "faults": faults,
    }  # fmt: skip


def main() -> int:
    """Go through the cases that the log lacks; return 1 if any of all found a fault."""
    log, cases = Path(sys.argv[1]), int((sys.argv[2:] or ["10"])[0])
    place = Path(mkdtemp(prefix="crowds-"))
    wanted = alone(place)
    before = go_through(log, cases, lambda number: case(number, wanted, place))
    wrong = [said for said in before if said["faults"]]
    print(f"{len(before)} cases, {len(wrong)} with faults; kept in {place}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
