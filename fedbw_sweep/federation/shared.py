"""What the runs of one process share: texts spread over clients, and models that are built."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import lru_cache
from threading import Lock

from torch import nn

from fedbw_sweep.compression.layout import FloatVector, Layout
from fedbw_sweep.config.groups import DataConfig, ModelConfig, TrainableConfig
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.config.section import Section
from fedbw_sweep.data.federate import client_texts, federate
from fedbw_sweep.data.tokens import FederatedText, Tokenize
from fedbw_sweep.data.weight import TextWeight, weigh
from fedbw_sweep.model.tokenizer import load_tokenizer
from fedbw_sweep.model.trainable import build_trainable
from fedbw_sweep.model.vector import layout_of, read_arrays
from fedbw_sweep.training.process import pick_device, prepare_process

_one_text_at_a_time = Lock()


def federated_text(config: RunConfig) -> FederatedText:
    """Spread the configured text over the configured clients; runs with equal text share it."""
    with _one_text_at_a_time:
        return _federated_text(_text_choice(config))


def _text_choice(config: RunConfig) -> str:
    """Return what of a run's config its text depends on, as JSON."""
    drawn = config.data.partition != "natural"
    seed = config.seed if drawn else 0
    return config.model_copy(update={"seed": seed}).model_dump_json(
        by_alias=True, include={"data", "model", "num_clients", "sequence_length", "seed"}
    )


@lru_cache(maxsize=4)
def _federated_text(needed: str) -> FederatedText:
    return federate(*_division(needed))


def text_weight(config: RunConfig) -> TextWeight:
    """Weigh the configured clients' training text; once for all runs with equal text."""
    with _one_text_at_a_time:
        return _text_weight(_text_choice(config))


@lru_cache(maxsize=4)
def _text_weight(needed: str) -> TextWeight:
    return weigh(client_texts(*_division(needed)))


def _division(needed: str) -> tuple[DataConfig, int, int, int, Tokenize]:
    """Return the arguments of `federate`."""
    values = json.loads(needed)
    return (
        DataConfig(**values["data"]),
        values["num_clients"],
        values["sequence_length"],
        values["seed"],
        load_tokenizer(ModelConfig(**values["model"])),
    )


class ModelChoice(Section):
    """What of a run's config its model, as built, depends on."""

    model: ModelConfig
    trainable: TrainableConfig
    seed: int
    device: str

    @classmethod
    def of(cls, config: RunConfig) -> str:
        """Return a run's choice as JSON: the same for runs whose models are the same."""
        return config.model_dump_json(by_alias=True, include=set(cls.model_fields))


def _build(choice: str) -> nn.Module:
    config = ModelChoice.model_validate_json(choice)
    model = build_trainable(config.model, config.trainable, config.seed)
    return model.to(pick_device(config.device))  # type: ignore[arg-type, no-any-return]


Start = tuple[nn.Module, FloatVector, bytes]
"""A run's model, and its arrays at the start as `read_arrays` gives them."""
_spare: dict[str, list[Start]] = {}
_lending = Lock()


@contextmanager
def lent_model(config: RunConfig) -> Iterator[Start]:
    """Lend a run's server its model, in whatever state, and what the run starts from.

    A run that starts from the same as one that has ended, such as one with another compression, is
    lent that one's model. To build a model may take longer than all else that a run adds to a
    sweep.
    """
    choice = ModelChoice.of(config)
    with _lending:
        if choice not in _spare:
            _spare.clear()
        spare = _spare.setdefault(choice, [])
        start = spare.pop() if spare else None
    if start is None:
        model = _build(choice)
        start = model, *read_arrays(model)
    yield start
    with _lending:
        spare.append(start)


_initial_losses: dict[tuple[str, str], Future[float]] = {}


def initial_loss(config: RunConfig, measure: Callable[[], float]) -> float:
    """Return the held-out loss of a run's initial model, measured once for all runs that have it.

    Parameters
    ----------
    config : RunConfig
        The run.
    measure : callable
        Measures it. Others that ask meanwhile wait.
    """
    key = ModelChoice.of(config), _text_choice(config)
    with _lending:
        found, mine = _initial_losses.get(key), Future[float]()
        if found is None:
            _initial_losses[key] = mine
    if found is not None:
        return found.result()
    try:
        mine.set_result(measure())
    except BaseException as error:
        with _lending:
            del _initial_losses[key]  # who asks next measures it
        mine.set_exception(error)
        raise
    return mine.result()


def worker_model(config: RunConfig) -> tuple[nn.Module, Layout]:
    """Return the model that a worker process trains in, built once, and its layout.

    Every client overwrites what trains. What is frozen is the run's own, drawn from its seed; where
    nothing is, runs of all seeds share one.
    """
    seed = 0 if config.trainable.name == "all" else config.seed
    return _worker_model(ModelChoice.of(config.model_copy(update={"seed": seed})))


@lru_cache(maxsize=2)
def _worker_model(choice: str) -> tuple[nn.Module, Layout]:
    prepare_process()
    model = _build(choice)
    return model, layout_of(model)


def initial_vector(config: RunConfig) -> FloatVector:
    """Return what travels of the model that every client has before its first message."""
    return _initial_vector(ModelChoice.of(config))


@lru_cache(maxsize=2)
def _initial_vector(choice: str) -> FloatVector:
    config = ModelChoice.model_validate_json(choice)
    return read_arrays(build_trainable(config.model, config.trainable, config.seed))[0]
