"""Ray's workers, forked from a process that has already imported what they need.

To import torch, transformers and Flower takes seconds of a core, and Ray would have each worker do
so, also one that replaces a killed one. Instead a nursery is forked from the command once that has
imported them, and what Ray starts as a worker is ``python <this file> <Ray's worker> <arguments>``
(``py_executable`` of Ray's runtime environments), which has the nursery fork a process that goes on
as Ray's worker. It must start fast: it imports nothing but what Python ships.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import runpy
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

ADDRESS = "FEDBW_SWEEP_NURSERY"
"""Environment variable of what Ray starts: where the nursery listens."""


SCRIPT = __file__
"""What Ray is to start as a worker."""


OOM_SCORE = Path("/proc/self/oom_score_adj")
"""Ray sets it so that the kernel, where memory is short, ends workers first."""


STANDARD = (0, 1, 2)


ENDING = {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
"""Signals that end a command, beside Ctrl-C."""

PR_SET_PDEATHSIG = 1

ORPHANED = getattr(signal, "SIGUSR1", signal.SIGTERM)
"""What the nursery is sent when the command has ended."""


@contextmanager
def importing() -> Iterator[None]:
    """Keep the garbage collector off what imports leave for good: a sixth of their time is its.

    Nor does it write to it later, so that forked processes share its memory.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class Nursery:
    """Listens from the start, so that workers that are asked for early wait; forks once open.

    Attributes
    ----------
    address : str
        Where it listens: a name of Linux's, for which there is no file.
    """

    def __init__(self) -> None:
        self.address = f"fedbw_sweep-{os.getpid()}-{os.urandom(8).hex()}"
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(f"\0{self.address}")
        self.listener.listen()

    def open(self, *own: int, last: Callable[[], None] = lambda: None) -> None:
        """Fork the process that forks workers: this one, as it is now. It ends with this one.

        To be called from the main thread while there is no other, and no CUDA context: a fork has
        neither.

        Parameters
        ----------
        own : int
            Descriptors that no other process is to have, for when they close tells of this one's
            end.
        last : callable
            Called in the fork after this process has ended, however it has.
        """
        # Ctrl-C stays blocked, as in all that Ray starts; the others until the fork can take them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *ENDING})
        command = os.getpid()
        if os.fork() == 0:
            try:
                signal.signal(ORPHANED, lambda *_: _end(last))
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ORPHANED)
                for descriptor in own:
                    os.close(descriptor)
                if os.getppid() == command:  # else it has ended meanwhile
                    self._serve()
            finally:
                os._exit(1)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.listener.close()

    def close(self) -> None:
        """Fork nothing: who asks becomes a worker itself."""
        self.listener.close()

    def _serve(self) -> NoReturn:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for ending in ENDING:  # the command's handlers speak for the command alone
            signal.signal(ending, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries the workers
        while True:
            asking, _ = self.listener.accept()
            with asking, suppress(OSError, ValueError):  # who asked may have ended meanwhile
                self._answer(asking)

    def _answer(self, asking: socket.socket) -> None:
        credentials = asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        _, user, _ = struct.unpack("3i", credentials)
        if user != os.getuid():
            return
        _, streams, _, _ = socket.recv_fds(asking, 1, len(STANDARD))
        with asking.makefile("rb") as file:
            asked = json.load(file)
        if os.fork() == 0:
            self.listener.close()
            asking.close()
            _be_worker(asked, streams)
        for stream in streams:
            os.close(stream)
        asking.send(b".")


def _end(last: Callable[[], None]) -> NoReturn:
    try:
        last()
    finally:
        os._exit(1)


def _be_worker(asked: dict[str, Any], streams: list[int]) -> NoReturn:
    """In the fork: become the worker that Ray asked for."""
    code = 1
    try:
        for own in (signal.SIGCHLD, ORPHANED):  # the nursery's
            signal.signal(own, signal.SIG_DFL)
        for stream, standard in zip(streams, STANDARD, strict=True):
            os.dup2(stream, standard)
            os.close(stream)
        environment = asked["environment"]
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        # What stays the same stays in its place: Ray finds there where a process's title goes.
        os.environ.update(environment.items() - os.environ.items())
        os.nice(asked["nice"] - os.nice(0))
        OOM_SCORE.write_text(asked["oom_score"])
        sys.argv = [asked["worker"], *asked["arguments"]]
        runpy.run_path(asked["worker"], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:  # what the command has registered for its end is not for a worker
        os._exit(code)


def main() -> None:
    """Be what Ray starts: have the nursery fork the worker, or, if it cannot, become one."""
    asked = {
        "worker": sys.argv[1],
        "arguments": sys.argv[2:],
        "environment": dict(os.environ),
        "nice": os.nice(0),
        "oom_score": OOM_SCORE.read_text(),
    }
    forked = b""
    with suppress(OSError), socket.socket(socket.AF_UNIX) as nursery:
        nursery.connect(f"\0{os.environ[ADDRESS]}")
        socket.send_fds(nursery, [b"."], STANDARD)
        nursery.sendall(json.dumps(asked).encode())
        nursery.shutdown(socket.SHUT_WR)
        forked = nursery.recv(1)
    if not forked:
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])


if __name__ == "__main__":
    main()
