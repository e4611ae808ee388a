"""Records that cannot be written at once: they wait in memory while other runs go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Condition, Thread

from fedbw_sweep.errors import ResultsError
from fedbw_sweep.records.write import put_run

PAUSE_S = 5.0
"""Seconds from one attempt to the next."""


class Writer:
    """Writes run folders; what a full disk refuses is tried again.

    Parameters
    ----------
    sweep_dir : pathlib.Path
    say : callable
        Called with each line for the user.
    retry_s : float
        Seconds for which a record that cannot be written waits.
    """

    def __init__(
        self,
        sweep_dir: Path,
        say: Callable[[str], None],
        retry_s: float,
    ) -> None:
        self.sweep_dir, self.say, self.retry_s = sweep_dir, say, retry_s
        self._waiting: dict[str, tuple[Mapping[str, bytes], bool, float]] = {}
        self._lost: list[str] = []
        self._changed = Condition()
        self._thread: Thread | None = None

    def write(
        self, run_id: str, files: Mapping[str, bytes], *, with_checkpoint: bool = False
    ) -> bool:
        """Write a run's folder, or keep its files and try again; return whether it is written.

        Arguments are those of `put_run`.
        """
        why = self._attempt(run_id, files, with_checkpoint)
        if why is None:
            return True
        self.say(
            f"run {run_id} cannot be written: {why}; its record waits in memory for "
            f"{self.retry_s:g} s: make room in {self.sweep_dir}, or let it be written to"
        )
        with self._changed:
            self._waiting[run_id] = files, with_checkpoint, time.monotonic() + self.retry_s
            if self._thread is None:
                self._thread = Thread(target=self._retry, daemon=True)
                self._thread.start()
        return False

    def finish(self, *, wait: bool = True) -> list[str]:
        """Wait until nothing waits any more; return a line for each run whose record is lost.

        Parameters
        ----------
        wait : bool
            False to give up what waits.
        """
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: not self._waiting)
            given_up = [f"run {run_id} is lost: it still waited" for run_id in self._waiting]
            return [*self._lost, *given_up]

    def _attempt(
        self, run_id: str, files: Mapping[str, bytes], with_checkpoint: bool
    ) -> str | None:
        try:
            self.sweep_dir.mkdir(parents=True, exist_ok=True)  # somebody may have deleted it
            put_run(run_id, files, self.sweep_dir, with_checkpoint=with_checkpoint)
        except OSError as error:
            return error.strerror or str(error)
        except ResultsError as error:
            return str(error)
        return None

    def _retry(self) -> None:
        while True:
            time.sleep(PAUSE_S)
            with self._changed:
                waiting = dict(self._waiting)
            for run_id, (files, with_checkpoint, until) in waiting.items():
                why = self._attempt(run_id, files, with_checkpoint)
                if why is not None and time.monotonic() < until:
                    continue
                with self._changed:
                    del self._waiting[run_id]
                    if why is not None:
                        self._lost.append(f"run {run_id} is lost: {why}")
                    self.say(self._lost[-1] if why else f"run {run_id} is written after all")
                    self._changed.notify_all()
