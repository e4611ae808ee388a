"""The ClientApp: decode the model, train it on this client's text, encode the update."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from functools import partial

import numpy as np
from flwr.app import ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from fedbw_sweep.compression.base import NOTHING_KNOWN, Compressor, Known
from fedbw_sweep.compression.feedback import State, encode_with_feedback, encode_with_state
from fedbw_sweep.compression.layout import FloatVector, Layout
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.data.tokens import ClientTokens, windows
from fedbw_sweep.errors import FedbwError, PayloadError
from fedbw_sweep.federation.job import Job
from fedbw_sweep.federation.ledger import METRICS, ClientAppCallable, metering_mod
from fedbw_sweep.federation.packing import (
    ARRAYS,
    CLIENT,
    COMPRESSOR,
    CONFIG,
    FROZEN,
    MODEL,
    ROUND,
    pack,
    pack_state,
    split,
    unpack,
    unpack_state,
)
from fedbw_sweep.federation.rebuild import rebuild
from fedbw_sweep.federation.shared import federated_text, initial_vector, worker_model
from fedbw_sweep.model.vector import read_arrays, read_frozen, write_arrays
from fedbw_sweep.seeding import rng_for
from fedbw_sweep.training.local import train

CLIENT_FAILED = 1
"""Error code of a reply that carries a client's own reason."""


def client_app(job: Job, tokens: ClientTokens | None = None) -> ClientApp:
    """Build the ClientApp of one run.

    Parameters
    ----------
    job : Job
        The run.
    tokens : ClientTokens, optional
        Every client's training tokens, where the backend hands them out; else the process that
        the app runs in loads the configured text.
    """
    app = ClientApp(mods=[reporting_mod, metering_mod])

    @app.train()
    def fit(message: Message, context: Context) -> Message:
        config = job.config
        text = federated_text(config).clients if tokens is None else tokens
        model, layout = worker_model(config)
        compressor = config.compression.build()
        instruction = message.content.config_records[CONFIG]
        client, server_round = int(instruction[CLIENT]), int(instruction[ROUND])  # type: ignore[arg-type]
        sequences = windows(text[client], config.sequence_length)

        arrays = message.content.array_records[ARRAYS]
        if instruction.get(FROZEN):
            arrays = _without_frozen(arrays, model)
        received, exact = _receive(config, arrays, layout, context, server_round)
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
        known = NOTHING_KNOWN
        if compressor.uses:
            known = Known(initial_vector(config), received)
        del received
        encoding = time.perf_counter()
        rng = rng_for(config.seed, "encode", client, server_round)
        payload = _encode(config, compressor, upload, layout, rng, context, known)
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
    config: RunConfig, arrays: ArrayRecord, layout: Layout, context: Context, server_round: int
) -> tuple[FloatVector, bytes]:
    """Decode the model; where updates to it are sent, this client's state holds it in between."""
    compressor = config.downlink.build("downlink")
    if config.downlink.codes_weights:
        return unpack(arrays, compressor, layout)
    payload, exact = split(arrays, layout.exact_bytes)
    initial = initial_vector(config) if config.initial_model == "known" else None
    model = initial
    if (held := context.state.array_records.get(MODEL)) is not None:
        model = np.asarray(unpack_state(held)[MODEL], np.float32)
    rounds = min(server_round, config.rounds) - 1
    received = rebuild(payload, model, initial, compressor, layout, rounds)
    context.state[MODEL] = pack_state({MODEL: received})
    return received, bytes(exact)


def _encode(
    config: RunConfig,
    compressor: Compressor,
    upload: FloatVector,
    layout: Layout,
    rng: np.random.Generator,
    context: Context,
    known: Known,
) -> bytes:
    """Encode what goes up; what error feedback or the method keeps stays in this client's state."""
    encode: Callable[..., tuple[bytes, State]] = encode_with_state
    if config.compression.error_feedback:
        encode = partial(encode_with_feedback, decay=config.compression.feedback_decay)
    held = context.state.array_records.get(COMPRESSOR, ArrayRecord())
    payload, state = encode(compressor, upload, layout, rng, unpack_state(held), known)
    if state:
        context.state[COMPRESSOR] = pack_state(state)
    return payload


def _without_frozen(arrays: ArrayRecord, model: nn.Module) -> ArrayRecord:
    """Take off the frozen arrays; they must be, bit by bit, those that this process trains with."""
    own = read_frozen(model)
    rest, received = split(arrays, len(own))
    if received != own:
        raise PayloadError("the frozen arrays received are not those that this client trains with")
    return pack(bytes(rest))


def reporting_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Client mod: answer a failure with the client's own reason, not the simulator's."""
    try:
        return call_next(message, context)
    except FedbwError as error:
        reason = str(error)
    except Exception:
        reason = traceback.format_exc()
    return Message(Error(CLIENT_FAILED, reason), reply_to=message)
