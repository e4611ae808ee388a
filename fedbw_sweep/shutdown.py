"""How a command ends that is told to from outside: one line, an exit code, no process left."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from threading import Thread
from types import FrameType

import psutil

SIGNALS = {
    name: word
    for name, word in (("SIGINT", "interrupted"), ("SIGTERM", "terminated"), ("SIGHUP", "hung up"))
    if hasattr(signal, name)  # Windows lacks the last
}
"""What ends a command from outside, and what it is called."""

SHOW_CURSOR = b"\x1b[?25h"
"""Progress bars hide it."""

PATIENCE_S = 30.0
"""For how long the states of runs may be written first; a second signal ends at once."""

_before: list[Callable[[], None]] = []
_ending = False


def before_end(save: Callable[[], None]) -> Callable[[], None]:
    """Have something done before the command ends; return what takes that back."""
    _before.append(save)
    return lambda: _before.remove(save)


def listen() -> None:
    """End the command in this way from now on."""
    for name in SIGNALS:
        signal.signal(signal.Signals[name], shut_down)


def shut_down(signum: int, frame: FrameType | None) -> None:
    """Have states saved, then end with every process started; a second signal ends at once.

    The exit code is 128 and the signal's number. An exception would not do: in a callback of the
    interpreter's it is ignored, runs in other threads hold the process up, waiting for replies that
    never come, and Ray's own processes notice only later that nobody is left.
    """
    global _ending
    if not _ending:
        _ending = True
        word = SIGNALS[signal.Signals(signum).name]
        _print(f"\n{word}: finished runs and rounds are kept; the same command goes on\n")
        # The main thread goes on meanwhile: it may hold a lock that saving needs.
        Thread(target=_save_and_end, args=(signum,), daemon=True).start()
        return
    own = psutil.Process()
    started = own.children(recursive=True)
    sessions = {session_of(process) for process in started} - {None, session_of(own)}
    ended: set[psutil.Process] = set()
    while started:
        kill(started)
        ended |= {*started}
        # What one of them has started meanwhile is nobody's child any more.
        others = [p for p in psutil.process_iter() if session_of(p) in sessions]
        started = [p for p in others if p not in ended]
    os._exit(128 + signum)


def kill(processes: Iterable[psutil.Process]) -> None:
    """Kill processes, of which some may have ended."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def session_of(process: psutil.Process) -> int | None:
    """Return the leader of the session that a process is in, if it is there; none on Windows."""
    with suppress(OSError, AttributeError):
        return os.getsid(process.pid)
    return None


def _save_and_end(signum: int) -> None:
    threads = [Thread(target=save, daemon=True) for save in [*_before]]
    for thread in threads:
        thread.start()
    until = time.monotonic() + PATIENCE_S
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    os.kill(os.getpid(), signum)


def await_end() -> None:
    """Do not return if the command is ending: what fails now may fail for that."""
    while _ending:
        time.sleep(1)


def _print(line: str) -> None:
    with suppress(OSError):  # what was hung up has no terminal any more
        os.write(2, (SHOW_CURSOR if os.isatty(2) else b"") + line.encode())
