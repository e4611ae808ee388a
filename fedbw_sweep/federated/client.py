"""The ClientApp: decode the model, train it on this client's text, encode the update."""

from __future__ import annotations

import time
import traceback
from functools import lru_cache, partial

import numpy as np
from flwr.app import ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from fedbw_sweep.compression.base import Compressor
from fedbw_sweep.compression.feedback import encode_with_feedback, encode_with_state
from fedbw_sweep.compression.layout import FloatVector, Layout
from fedbw_sweep.config import ModelConfig, RunConfig, Section, TrainableConfig
from fedbw_sweep.data import ClientTokens, windows
from fedbw_sweep.errors import FedbwError, PayloadError
from fedbw_sweep.federated.downlink import rebuild
from fedbw_sweep.federated.wire import (
    ARRAYS,
    CLIENT,
    CONFIG,
    FROZEN,
    ROUND,
    pack,
    pack_state,
    split,
    unpack,
    unpack_state,
)
from fedbw_sweep.metering import METRICS, ClientAppCallable, metering_mod
from fedbw_sweep.modeling import (
    layout_of,
    pick_device,
    prepare_process,
    read_arrays,
    read_frozen,
    train,
    write_arrays,
)
from fedbw_sweep.seeding import rng_for
from fedbw_sweep.trainable import build_trainable

CLIENT_FAILED = 1
"""Error code of a reply that carries a client's own reason."""


def client_app(run_config: str, text: ClientTokens) -> ClientApp:
    """Build the ClientApp of one run.

    Parameters
    ----------
    run_config : str
        The `RunConfig` as JSON: what crosses process boundaries stays small and plain.
    text : ClientTokens
        Every client's training tokens.
    """
    app = ClientApp(mods=[reporting_mod, metering_mod])

    @app.train()
    def fit(message: Message, context: Context) -> Message:
        config = RunConfig.model_validate_json(run_config)
        model, layout = workplace(config)
        compressor = config.compression.build()
        instruction = message.content.config_records[CONFIG]
        client, server_round = int(instruction[CLIENT]), int(instruction[ROUND])  # type: ignore[arg-type]
        sequences = windows(text[client], config.sequence_length)

        arrays = message.content.array_records[ARRAYS]
        if instruction.get(FROZEN):
            arrays = _without_frozen(arrays, model)
        received, exact = _receive(config, arrays, layout, context)
        write_arrays(model, received, exact)
        started = time.perf_counter()
        training = train(
            model,
            sequences,
            epochs=config.local_epochs,
            steps=config.local_steps,
            batch_size=config.batch_size,
            lr=config.lr,
            optimizer=partial(config.optimizer.instantiate, "optimizer"),
            proximal_mu=config.proximal_mu,
            rng=rng_for(config.seed, "train", client, server_round),
        )
        upload, exact = read_arrays(model)
        if config.upload == "update":
            upload -= received
        del received
        encoding = time.perf_counter()
        rng = rng_for(config.seed, "encode", client, server_round)
        payload = _encode(config, compressor, upload, layout, rng, context)
        metrics: dict[str, int | float | list[int] | list[float]] = {
            "num-examples": len(sequences),
            "steps": training.steps,
            "train-loss": training.loss,
            "train-seconds": encoding - started,
            "encode-seconds": time.perf_counter() - encoding,
        }
        return Message(
            RecordDict({ARRAYS: pack(payload + exact), METRICS: MetricRecord(metrics)}),
            reply_to=message,
        )

    return app


def _receive(
    config: RunConfig, arrays: ArrayRecord, layout: Layout, context: Context
) -> tuple[FloatVector, bytes]:
    """Decode the model; where updates to it are sent, this client's state holds it in between."""
    compressor = config.downlink.build("downlink")
    if config.downlink.codes_weights:
        return unpack(arrays, compressor, layout)
    payload, exact = split(arrays, layout.exact_bytes)
    model = None
    if (held := context.state.array_records.get("model")) is not None:
        model = np.asarray(unpack_state(held)["model"], np.float32)
    elif config.initial_model == "known":
        model = _initial(model_choice(config))
    received = rebuild(payload, model, compressor, layout)
    context.state["model"] = pack_state({"model": received})
    return received, bytes(exact)


@lru_cache(maxsize=2)
def _initial(choice: str) -> FloatVector:
    """Return what travels of the model that every client has before its first message."""
    config = ModelChoice.model_validate_json(choice)
    return read_arrays(build_trainable(config.model, config.trainable, config.seed))[0]


def _encode(
    config: RunConfig,
    compressor: Compressor,
    upload: FloatVector,
    layout: Layout,
    rng: np.random.Generator,
    context: Context,
) -> bytes:
    """Encode what goes up; what error feedback or the method keeps stays in this client's state."""
    encode = encode_with_feedback if config.compression.error_feedback else encode_with_state
    held = context.state.array_records.get("compressor", ArrayRecord())
    payload, state = encode(compressor, upload, layout, rng, unpack_state(held))
    if state:
        context.state["compressor"] = pack_state(state)
    return payload


class ModelChoice(Section):
    """What of a run's config its model, as built, depends on."""

    model: ModelConfig
    trainable: TrainableConfig
    seed: int
    device: str


def _without_frozen(arrays: ArrayRecord, model: nn.Module) -> ArrayRecord:
    """Take off the frozen arrays; they must be the ones in the workplace, bit by bit."""
    own = read_frozen(model)
    rest, received = split(arrays, len(own))
    if received != own:
        raise PayloadError("the frozen arrays received are not those that this client trains with")
    return pack(bytes(rest))


def workplace(config: RunConfig) -> tuple[nn.Module, Layout]:
    """Return the model that a worker process trains in, built once.

    Every client overwrites what trains. What is frozen is the run's own, drawn from its seed; where
    nothing is, runs of all seeds share one.
    """
    seed = 0 if config.trainable.name == "all" else config.seed
    return _workplace(model_choice(config.model_copy(update={"seed": seed})))


def model_choice(config: RunConfig) -> str:
    """Return the run's `ModelChoice` as JSON: the same for runs whose models are the same."""
    return config.model_dump_json(by_alias=True, include=set(ModelChoice.model_fields))


@lru_cache(maxsize=2)
def _workplace(choice: str) -> tuple[nn.Module, Layout]:
    prepare_process()
    config = ModelChoice.model_validate_json(choice)
    model = build_trainable(config.model, config.trainable, config.seed)
    return model.to(pick_device(config.device)), layout_of(model)  # type: ignore[arg-type]


def reporting_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Client mod: answer a failure with the client's own reason, not the simulator's."""
    try:
        return call_next(message, context)
    except FedbwError as error:
        reason = str(error)
    except Exception:
        reason = traceback.format_exc()
    return Message(Error(CLIENT_FAILED, reason), reply_to=message)
