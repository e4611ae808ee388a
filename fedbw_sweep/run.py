"""One `RunConfig` -> one run: federate the text, train, measure, record."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import platform
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from torch import nn

from fedbw_sweep.compression.layout import FloatVector
from fedbw_sweep.config import EXECUTION_KEYS, DataConfig, ModelConfig, RunConfig
from fedbw_sweep.data import FederatedText, federate
from fedbw_sweep.errors import DivergenceError, FedbwError
from fedbw_sweep.federated.client import client_app, model_choice
from fedbw_sweep.federated.simulation import set_verbosity, simulate
from fedbw_sweep.federated.strategy import ClientReport, Metered, arrays_of, metered, vector_of
from fedbw_sweep.modeling import (
    build_model,
    frozen_parameters,
    heldout_loss,
    layout_of,
    load_tokenizer,
    pick_device,
    prepare_process,
    read_arrays,
    read_frozen,
    write_arrays,
)
from fedbw_sweep.prediction import Prediction, predict
from fedbw_sweep.results import RunRecord
from fedbw_sweep.trainable import build_trainable, freeze

Observer = Callable[[dict[str, Any]], None]
"""Called with each row of ``rounds.csv`` as it is measured."""

RECORDED_PACKAGES = ("flwr", "ray", "torch", "transformers", "numpy", "pandas", "hydra-core")


def execute(config: RunConfig, sweep_dir: Path, observe: Observer = lambda row: None) -> RunRecord:
    """Do one run and leave its folder in `sweep_dir`.

    A run that fails is recorded as failed with its reason; only an interruption leaves nothing.
    """
    set_verbosity(config.verbose)
    prepare_process()
    record = RunRecord(config, environment=_environment(config))
    try:
        with _model(config) as (model, initial, exact):
            _train(config, record, observe, model, initial, exact)
        record.status = "done"
    except FedbwError as error:
        record.error = str(error)
    except Exception:
        record.error = traceback.format_exc()
    if record.error is not None:
        record.summary = {}
    record.write(sweep_dir)
    return record


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
        nothing of what is to train, or an optimizer refuses its parameters.
    """
    config = alike[0]
    set_verbosity(config.verbose)
    pick_device(config.device)
    model = build_model(config.model, config.seed).to("meta")  # type: ignore[arg-type]  # shapes are enough
    for each in alike:
        own = copy.deepcopy(model)
        freeze(own, each.trainable, each.seed)
        metered(each, layout_of(own))
        each.optimizer.instantiate("optimizer", [nn.Parameter(torch.zeros(1))], lr=each.lr)
    federated_text(config)


_one_text_at_a_time = Lock()


def federated_text(config: RunConfig) -> FederatedText:
    """Spread the configured text over the configured clients; cells with equal text share it."""
    drawn = config.data.partition != "natural"
    seed = config.seed if drawn else 0
    needed = config.model_copy(update={"seed": seed}).model_dump_json(
        by_alias=True, include={"data", "model", "num_clients", "sequence_length", "seed"}
    )
    with _one_text_at_a_time:
        return _federated_text(needed)


@lru_cache(maxsize=4)
def _federated_text(needed: str) -> FederatedText:
    values = json.loads(needed)
    model = ModelConfig(**values["model"])
    return federate(
        DataConfig(**values["data"]),
        values["num_clients"],
        values["sequence_length"],
        values["seed"],
        load_tokenizer(model),
    )


Start = tuple[nn.Module, FloatVector, bytes]
"""A run's model, and its arrays at the start as `read_arrays` gives them."""
_spare: dict[str, list[Start]] = {}
"""Models of runs that have ended, for runs that start from the same, such as those with another
compression. To build a model may take longer than all else that a run adds to a sweep."""
_lending = Lock()


@contextmanager
def _model(config: RunConfig) -> Iterator[Start]:
    """Lend a run its model, in whatever state, and what it starts from."""
    choice = model_choice(config)
    with _lending:
        if choice not in _spare:
            _spare.clear()
        spare = _spare.setdefault(choice, [])
        start = spare.pop() if spare else None
    if start is None:
        model = build_trainable(config.model, config.trainable, config.seed)
        model.to(pick_device(config.device))  # type: ignore[arg-type]
        start = model, *read_arrays(model)
    yield start
    with _lending:
        spare.append(start)


def _train(
    config: RunConfig,
    record: RunRecord,
    observe: Observer,
    model: nn.Module,
    initial: FloatVector,
    exact: bytes,
) -> None:
    text = federated_text(config)
    frozen = read_frozen(model) if config.initial_model == "sent" else b""
    strategy = metered(config, layout_of(model), frozen)
    strategy.exact = exact
    prediction = predict(config, strategy.layout, len(frozen))
    evaluator = _Evaluator(model, text, strategy, prediction, record, observe)
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy.start(
            grid,
            initial_arrays=arrays_of(initial),
            num_rounds=config.rounds,
            timeout=config.backend.client_timeout_s,
            evaluate_fn=evaluator,
        )

    try:
        simulate(config, server, client_app(config.model_dump_json(by_alias=True), text.clients))
    finally:
        record.messages = list(strategy.ledger.rows())
        record.parts = [
            {"tensor": tensor, "part": part, "bytes": count}
            for (tensor, part), count in strategy.parts.items()
        ]
    record.summary = _summary(config, model, strategy, prediction, record.rounds)


class _Evaluator:
    """Flower's ``evaluate_fn``: measures the global model after each round, writes the row."""

    def __init__(
        self,
        model: nn.Module,
        text: FederatedText,
        strategy: Metered,
        prediction: Prediction | None,
        record: RunRecord,
        observe: Observer,
    ) -> None:
        self.model, self.text, self.strategy = model, text, strategy
        self.prediction, self.record, self.observe = prediction, record, observe
        self.started = time.perf_counter()

    def __call__(self, server_round: int, arrays: ArrayRecord) -> MetricRecord:
        before = time.perf_counter()
        write_arrays(self.model, vector_of(arrays), self.strategy.exact)
        loss = heldout_loss(self.model, self.text.heldout)
        if not math.isfinite(loss):
            raise DivergenceError(f"round {server_round}: held-out loss is {loss}; lower lr")
        now = time.perf_counter()
        reports = self.strategy.reports.get(server_round, [])
        row = {
            "run_id": self.record.config.run_id,
            "round": server_round,
            "loss": loss,
            "perplexity": math.exp(loss),
            "bits_per_byte": loss / math.log(2) * self.text.heldout_tokens_per_byte,
            "train_loss": _mean_train_loss(reports),
            "clients": len(reports),
            **self._bytes(server_round),
        }
        self.record.rounds.append(row)
        self.record.timing.append(
            {
                "round": server_round,
                "round_seconds": now - self.started,
                "evaluate_seconds": now - before,
                "train_seconds": sum(report.train_seconds for report in reports),
                "encode_seconds": sum(report.encode_seconds for report in reports),
                "decode_seconds": self.strategy.decode_seconds[server_round],
            }
        )
        self.started = now
        self.observe(row)
        return MetricRecord({"loss": loss})

    def _bytes(self, server_round: int) -> dict[str, int | float | None]:
        entries = [e for e in self.strategy.ledger.entries if e.round == server_round]
        up = [entry for entry in entries if entry.direction == "uplink"]
        down = [entry for entry in entries if entry.direction == "downlink"]
        uplink, downlink = (sum(entry.payload_bytes for entry in part) for part in (up, down))
        dense, dense_down = (sum(entry.dense_bytes for entry in part) for part in (up, down))
        earlier = self.record.rounds[-1] if self.record.rounds else {}
        predicted = None
        if self.prediction is not None:
            predicted = self.prediction.round_bytes(server_round, len(up))
        return {
            "uplink_bytes": uplink,
            "downlink_bytes": downlink,
            "uplink_message_bytes": sum(entry.message_bytes for entry in up),
            "downlink_message_bytes": sum(entry.message_bytes for entry in down),
            "dense_uplink_bytes": dense,
            "dense_downlink_bytes": dense_down,
            "uplink_ratio": dense / uplink if uplink else None,
            "downlink_ratio": dense_down / downlink if downlink else None,
            "predicted_bytes": predicted,
            "cumulative_uplink_bytes": uplink + earlier.get("cumulative_uplink_bytes", 0),
            "cumulative_bytes": uplink + downlink + earlier.get("cumulative_bytes", 0),
        }


def _mean_train_loss(reports: list[ClientReport]) -> float | None:
    trained = [report for report in reports if report.steps]
    examples = sum(report.examples for report in trained)
    return sum(r.examples * r.train_loss for r in trained) / examples if trained else None


def _summary(
    config: RunConfig,
    model: nn.Module,
    strategy: Metered,
    prediction: Prediction | None,
    rounds: list[dict[str, Any]],
) -> dict[str, Any]:
    layout = strategy.layout
    totals = {
        name: sum(row[name] for row in rounds)
        for name in (
            "uplink_bytes",
            "downlink_bytes",
            "uplink_message_bytes",
            "downlink_message_bytes",
            "dense_uplink_bytes",
            "dense_downlink_bytes",
        )
    }
    uplink, total = totals["uplink_bytes"], totals["uplink_bytes"] + totals["downlink_bytes"]
    dense, dense_down = totals["dense_uplink_bytes"], totals["dense_downlink_bytes"]
    updates = sum(row["clients"] for row in rounds)
    vector, exact = read_arrays(model)
    digest = hashlib.sha256(vector.data)
    digest.update(exact + read_frozen(model))
    frozen = sum(entry.frozen_bytes for entry in strategy.ledger.entries)
    summary = {
        "clients_per_round": config.clients_per_round,
        "model_parameters": layout.size,
        "frozen_parameters": frozen_parameters(model),
        "dense_message_bytes": layout.dense_bytes,
        **totals,
        "total_bytes": total,
        "frozen_bytes": frozen,
        "initial_loss": rounds[0]["loss"],
        **{name: rounds[-1][name] for name in ("loss", "perplexity", "bits_per_byte")},
        "model_hash": digest.hexdigest(),
    }
    if total:
        summary["downlink_ratio"] = dense_down / totals["downlink_bytes"]
        summary["total_ratio"] = (dense + dense_down) / total
    if updates:
        summary["uplink_ratio"] = dense / uplink
        summary["bits_per_coordinate"] = 8 * uplink / (updates * layout.size)
    if prediction is not None:
        summary["predicted_bytes"] = prediction.total_bytes
        summary["prediction"] = prediction.basis
    return summary


def _environment(config: RunConfig) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "device": _device(config.device),
        **_versions(),
        "execution": config.model_dump(include=set(EXECUTION_KEYS)),
    }


@lru_cache
def _processor() -> str:
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
