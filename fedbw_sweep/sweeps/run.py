"""One `RunConfig` -> one run: trained, measured, recorded."""

from __future__ import annotations

import copy
import os
import platform
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from torch import nn

from fedbw_sweep.backends.base import backend_of, set_verbosity
from fedbw_sweep.compression.layout import Layout
from fedbw_sweep.config.run import EXECUTION_KEYS, RunConfig
from fedbw_sweep.console import message_console
from fedbw_sweep.cost.prediction import oversized
from fedbw_sweep.errors import FedbwError
from fedbw_sweep.federation.job import Job
from fedbw_sweep.federation.optimizers import ServerStep
from fedbw_sweep.federation.shared import federated_text
from fedbw_sweep.model.build import build_model
from fedbw_sweep.model.trainable import freeze
from fedbw_sweep.model.vector import frozen_parameters, layout_of
from fedbw_sweep.records.checkpoint import Made, Store
from fedbw_sweep.records.schema import End
from fedbw_sweep.records.write import RunRecord
from fedbw_sweep.shutdown import await_end
from fedbw_sweep.training.check import check_model, check_step
from fedbw_sweep.training.process import pick_device, prepare_process

Observer = Callable[[dict[str, Any]], None]
"""Called with each row of ``rounds.csv`` as it is measured."""

COMPUTING = "torch", "transformers", "numpy"
"""Packages of another version of which no run is gone on with: last digits might differ."""

RECORDED_PACKAGES = ("flwr", "ray", "torch", "transformers", "numpy", "pandas", "hydra-core")


class _Recorder:
    """The sink of a run in this process: fills its record, shows its rounds, and says when it ends.

    Parameters
    ----------
    record : RunRecord
    observe : callable
        See `Observer`.
    ended : callable
        Called with the record, once.
    """

    def __init__(
        self, record: RunRecord, observe: Observer, ended: Callable[[RunRecord], None]
    ) -> None:
        self.record, self.observe, self.ended = record, observe, ended
        self.fault: Exception | None = None  # of `ended`: no reason of the run's

    def row(self, table: str, row: dict[str, Any]) -> End | None:
        """See `Sink`."""
        getattr(self.record, table).append(row)
        if table == "rounds":
            row["run_id"] = self.record.config.run_id
            self.observe(row)
        return None

    def done(self, end: End, summary: dict[str, Any]) -> None:
        """See `Sink`."""
        self.record.summary, self.record.status = summary, "done"
        self.record.end, self.record.error = end.how, end.reason
        try:
            self.ended(self.record)
        except Exception as error:
            self.fault = error
            raise


def execute(config: RunConfig, sweep_dir: Path, observe: Observer = lambda row: None) -> RunRecord:
    """Do one run from its start and leave its folder in `sweep_dir`; see `train`."""
    [record] = train([config], {config.run_id: observe})
    record.write(sweep_dir)
    return record


def train(
    configs: Sequence[RunConfig],
    observe: Mapping[str, Observer],
    ended: Callable[[RunRecord], None] = lambda record: None,
    store: Store | None = None,
) -> list[RunRecord]:
    """Do runs of one trajectory.

    Parameters
    ----------
    configs : sequence of RunConfig
    observe : mapping of str to callable
        An `Observer` for each run, by its id.
    ended : callable
        Called with the record of each run as it ends. That of a run that fails says so, with its
        reason.
    store : Store, optional
        Where checkpoints are kept, and gone on from.

    Returns
    -------
    list of RunRecord
        The records, those of more rounds first.
    """
    set_verbosity(configs[0].verbose)
    job = Job.of(*configs)
    records = [RunRecord(config, environment=_environment(config)) for config in job.configs]

    def end_run(record: RunRecord) -> None:
        if store is not None:
            record.environment["processor"] = "; then ".join(store.processors)
        ended(record)

    sinks = [_Recorder(record, observe[record.config.run_id], end_run) for record in records]
    end, error = "failed", f"backend={configs[0].backend.name} ended without a result"
    try:
        backend_of(configs[0].backend).run(job, sinks, store)
    except FedbwError as raised:
        # Out of a worker a client's divergence comes as the client's reason.
        end, error = "diverged" if "lower lr" in str(raised) else "failed", str(raised)
    except Exception:
        error = traceback.format_exc()
    for sink in sinks:
        if sink.fault is not None:
            raise sink.fault
    for record in records:
        if record.status == "failed":
            await_end()
            record.end, record.error = end, error
            end_run(record)
    return records


def made_by(config: RunConfig) -> Made:
    """Say by what a run's checkpoints are made."""
    versions = {name: version for name, version in _versions().items() if name in COMPUTING}
    return Made(config.trajectory, versions, _device(config.device))


def check(alike: Sequence[RunConfig]) -> None:
    """Load everything that runs need and train nothing.

    Parameters
    ----------
    alike : sequence of RunConfig
        Runs of one model and one text.

    Raises
    ------
    ConfigError
        If the model or the text cannot be loaded, the text has too few clients, the model has
        nothing of what is to train, does not fit the text or sees ahead in it, an optimizer refuses
        its parameters, or a sampling rule chooses what are no clients.
    """
    config = alike[0]
    set_verbosity(config.verbose)
    pick_device(config.device)
    prepare_process()  # more threads would wait for each other longer than the passes take
    model = build_model(config.model, config.seed)
    for each in alike:
        ServerStep(each.server)
        each.optimizer.instantiate("optimizer", [nn.Parameter(torch.zeros(1))], lr=each.lr)
    text = federated_text(config)
    check_model(model, config.model, text)
    shapes, warned = dict[str, tuple[Layout, int]](), set[str]()
    for each in alike:
        each.sampler(text.clients.sequences(each.sequence_length)).cohort(1)
        trainable = str(each.trainable)
        if trainable not in shapes:
            own = copy.deepcopy(model)
            freeze(own, each.trainable, each.seed)
            check_step(own, config.model, text)
            shapes[trainable] = layout_of(own), 4 * frozen_parameters(own)
        warned |= {*oversized(each, *shapes[trainable])}
    for warning in sorted(warned):
        message_console().print(f"[yellow]warning[/yellow]: {escape(warning)}", soft_wrap=True)


def _environment(config: RunConfig) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "device": _device(config.device),
        **_versions(),
        "execution": config.model_dump(include=set(EXECUTION_KEYS)),
    }


@lru_cache
def processor() -> str:
    """Name the processor and how many cores of it there are: sums may round differently."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):  # Linux says more here
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((x.partition(": ")[2] for x in lines if x.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def _device(name: str) -> str:
    """Name the device that trains."""
    on_gpu = name != "cpu" and torch.cuda.is_available()
    return torch.cuda.get_device_name() if on_gpu else "cpu"


@lru_cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in RECORDED_PACKAGES}
