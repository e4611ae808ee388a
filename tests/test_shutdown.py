"""What is registered is done before a command ends, whatever the signal interrupts.

A second signal does not wait for it.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

COMMAND = """
import sys, time
from threading import Lock
from pathlib import Path
from fedbw_sweep.shutdown import await_end, before_end, listen

lock = Lock()

def save():
    with lock:
        pass
    Path(sys.argv[1]).write_text("began")
    time.sleep(float(sys.argv[2]))
    Path(sys.argv[1]).write_text("ended")

taken_back = before_end(lambda: Path(sys.argv[1]).write_text("taken back"))
taken_back()
before_end(save)
listen()
with lock:
    print("listens", flush=True)
    time.sleep(1)
await_end()  # as what fails does
print("fails")
"""


@pytest.mark.parametrize(("seconds", "signals", "left"), [("0.2", 1, "ended"), ("60", 2, "began")])
def test_states_are_saved_unless_there_is_no_patience(
    tmp_path: Path, seconds: str, signals: int, left: str
) -> None:
    place = tmp_path / "state"
    command = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(place), seconds], stdout=subprocess.PIPE, text=True
    )
    assert command.stdout is not None
    assert command.stdout.readline() == "listens\n"
    for _ in range(signals):
        command.send_signal(signal.SIGTERM)
        while not place.exists():
            assert command.poll() is None
            time.sleep(0.01)
    printed, _ = command.communicate(timeout=20)
    assert printed == ""
    assert command.returncode == 128 + signal.SIGTERM
    assert place.read_text() == left


STARTS = """
import subprocess, sys, time
from fedbw_sweep.shutdown import listen

listen()
orphan = "sleep 300 & echo $!"  # its parent ends at once
subprocess.Popen(["sh", "-c", f"sh -c '{orphan}'; sleep 300"], start_new_session=True)
time.sleep(300)
"""


def test_what_has_lost_its_parent_ends_too() -> None:
    command = subprocess.Popen([sys.executable, "-c", STARTS], stdout=subprocess.PIPE, text=True)
    assert command.stdout is not None
    orphan = psutil.Process(int(command.stdout.readline()))
    while orphan in psutil.Process(command.pid).children(recursive=True):
        time.sleep(0.01)
    command.send_signal(signal.SIGTERM)
    command.communicate(timeout=20)
    _, alive = psutil.wait_procs([orphan], timeout=10)
    for process in alive:
        process.kill()
    assert not alive
