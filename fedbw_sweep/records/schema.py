"""The files of a record: their names, columns, types and units.

Format 3 grows by addition, without a new version. A number that a run measures is a new column of
`RESULTS_COLUMNS`, one of a round of `ROUNDS_COLUMNS`, neither of them required. Hashes of files
(``sha256``) and what was noted of the environment are keys of ``status.json``, a new way to end is
a value of ``end``. Rows of another kind (``wire.csv``, ``clients.csv``) and states
(``checkpoint/``) are files or folders of their own in the run's folder. Readers ignore columns,
keys and files that they do not know, and give missing values for what is not there; a setting that
a record lacks counts as its default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa

from fedbw_sweep.config.identity import RECORD_FORMAT

RESULTS, ROUNDS = "results.csv", "rounds.csv"


CONFIG, MESSAGES, PARTS = "config.yaml", "messages.parquet", "parts.csv"


TIMING, STATUS = "timing.csv", "status.json"


CHECKPOINT = "checkpoint"
"""A folder in the run's."""


FORMAT_2 = 2
READ = FORMAT_2, RECORD_FORMAT
"""The record formats that are read."""

AXES = ("compression", "num_clients", "fraction_fit", "rounds", "local_epochs")
"""The five axes of a sweep: the first columns and the order of the rows of ``results.csv``."""


@dataclass(frozen=True)
class Column:
    """A column's pandas dtype, what it means, with its unit, and whether every record has it.

    A column that is added later is not required: records made before have missing values in it.
    """

    dtype: str
    meaning: str
    required: bool = True


RESULTS_COLUMNS: Mapping[str, Column] = {
    "run_id": Column("string", "hash of the run's settings, inputs and numerics"),
    "status": Column("string", "done or failed; missing if nothing was recorded"),
    "end": Column(
        "string", "how it ended: rounds, target, budget, diverged, pruned or failed", required=False
    ),
    "reason": Column("string", "why it ended so, or why nothing was recorded", required=False),
    "device": Column("string", "what trained: cpu or cuda", required=False),
    "processor": Column(
        "string", "its name, after a GPU's; and the cores there are", required=False
    ),
    "numerics": Column(
        "Int64", "number of the last change by design of such a run's results", required=False
    ),
    "clients_per_round": Column("Int64", "clients sampled each round: max(1, floor(f x n))"),
    "model_parameters": Column("Int64", "coordinates of the vector that travels"),
    "frozen_parameters": Column("Int64", "parameters that neither train nor travel in updates"),
    "dense_message_bytes": Column("Int64", "payload bytes of one message sent dense in fp32"),
    "uplink_bytes": Column("Int64", "payload bytes, clients to server, all rounds"),
    "downlink_bytes": Column("Int64", "payload bytes, server to clients, all rounds"),
    "total_bytes": Column("Int64", "payload bytes in both directions"),
    "frozen_bytes": Column(
        "Int64", "of downlink_bytes, frozen parameters in first messages (initial_model=sent)"
    ),
    "text_bytes": Column("Int64", "all clients' training text in UTF-8", required=False),
    "text_bytes_xz": Column(
        "Int64", "that text under xz, each client's by itself; empty above 64 MB", required=False
    ),
    "text_bytes_zstd": Column(
        "Int64",
        "that text under zstd -19, each client's by itself; empty above 64 MB",
        required=False,
    ),
    "uplink_message_bytes": Column("Int64", "bytes Flower counts, clients to server"),
    "downlink_message_bytes": Column("Int64", "bytes Flower counts, server to clients"),
    "dense_uplink_bytes": Column("Int64", "payload bytes had every update been sent dense in fp32"),
    "dense_downlink_bytes": Column("Int64", "payload bytes had the model been sent dense in fp32"),
    "uplink_ratio": Column("Float64", "compression ratio: dense_uplink_bytes / uplink_bytes"),
    "whole_model_ratio": Column(
        "Float64",
        "dense fp32 bytes of the whole model (frozen parameters with it, adapters not), once for "
        "every update, / uplink_bytes",
        required=False,
    ),
    "downlink_ratio": Column("Float64", "dense_downlink_bytes / downlink_bytes"),
    "total_ratio": Column("Float64", "dense bytes in both directions / total_bytes"),
    "bits_per_coordinate": Column(
        "Float64", "mean uplink payload bits per coordinate of an update"
    ),
    "predicted_bytes": Column(
        "Int64", "the bandwidth formula for total_bytes; empty if unknowable"
    ),
    "prediction": Column(
        "string",
        "exact (methods of fixed size), or estimate: and its basis",
    ),
    "initial_loss": Column("Float64", "held-out loss before training, nats per token"),
    "loss": Column("Float64", "held-out loss after the last round, nats per token"),
    "perplexity": Column("Float64", "exp(loss)"),
    "bits_per_byte": Column("Float64", "held-out loss in bits per UTF-8 byte of text"),
    "model_hash": Column("string", "SHA-256 of the final model's arrays"),
    "schema_version": Column("Int64", "version of the recorded files"),
}
"""Columns of ``results.csv`` beside the run's configuration, which `config_columns` names."""

ON_PAGE: Mapping[str, tuple[str, str, int, float]] = {
    "loss": ("loss", "nats/token", 3, 1),
    "bits_per_byte": ("bits per byte", "", 3, 1),
    "uplink_bytes": ("uplink", "MB", 2, 1e6),
    "downlink_bytes": ("downlink", "MB", 2, 1e6),
    "total_bytes": ("both", "MB", 2, 1e6),
    "uplink_ratio": ("uplink ratio", "\N{MULTIPLICATION SIGN}", 1, 1),
    "whole_model_ratio": ("of the whole model", "\N{MULTIPLICATION SIGN}", 1, 1),
    "bits_per_coordinate": ("bits per coordinate", "uplink", 3, 1),
}
"""Columns that the main table of the report's page shows: heading, unit, decimals, divisor."""


ROUNDS_COLUMNS: Mapping[str, Column] = {
    "run_id": Column("string", "the run, as in results.csv"),
    "round": Column("Int64", "communication round; 0 is the initial model"),
    "loss": Column("Float64", "held-out loss after the round, nats per token"),
    "perplexity": Column("Float64", "exp(loss)"),
    "bits_per_byte": Column("Float64", "held-out loss in bits per UTF-8 byte of text"),
    "train_loss": Column("Float64", "clients' mean training loss in the round, nats per token"),
    "clients": Column("Int64", "clients that trained"),
    "uplink_bytes": Column("Int64", "payload bytes, clients to server"),
    "downlink_bytes": Column("Int64", "payload bytes, server to clients"),
    "uplink_message_bytes": Column("Int64", "bytes Flower counts, clients to server"),
    "downlink_message_bytes": Column("Int64", "bytes Flower counts, server to clients"),
    "dense_uplink_bytes": Column("Int64", "payload bytes had every update been sent dense in fp32"),
    "dense_downlink_bytes": Column("Int64", "payload bytes had the model been sent dense in fp32"),
    "uplink_ratio": Column("Float64", "dense_uplink_bytes / uplink_bytes"),
    "downlink_ratio": Column("Float64", "dense_downlink_bytes / downlink_bytes"),
    "predicted_bytes": Column("Int64", "the bandwidth formula for both directions' payload bytes"),
    "cumulative_uplink_bytes": Column("Int64", "uplink_bytes of this and all earlier rounds"),
    "cumulative_bytes": Column("Int64", "payload bytes of both directions up to this round"),
}


MESSAGES_COLUMNS: Mapping[str, Column] = {
    "round": Column("int64", "communication round, from 1"),
    "client": Column("int64", "the client's number, from 0"),
    "direction": Column("string", "downlink (server to client) or uplink"),
    "payload_bytes": Column("int64", "the encoded model or update"),
    "message_bytes": Column("int64", "all that Flower counts in the message"),
    "dense_bytes": Column("int64", "the same arrays sent dense in fp32"),
    "frozen_bytes": Column("int64", "of payload_bytes, frozen parameters"),
}


PARTS_COLUMNS: Mapping[str, Column] = {
    "tensor": Column("string", "the model's name of it; (all) if no tensor's in particular"),
    "part": Column(
        "string",
        "values, indices (positions), tables (scales, probabilities), factors (of low rank), frame "
        "(and seeds), or exact (not floating point)",
    ),
    "bytes": Column("Int64", "payload bytes, clients to server, of the last round's updates"),
}


TIMING_COLUMNS: Mapping[str, Column] = {
    "round": Column("int64", "communication round; 0 is the initial evaluation"),
    "round_seconds": Column("float64", "wall-clock seconds since the previous row"),
    "evaluate_seconds": Column("float64", "of which the held-out loss"),
    "train_seconds": Column("float64", "clients' training, summed over clients"),
    "encode_seconds": Column("float64", "clients' encoding, summed over clients"),
    "decode_seconds": Column("float64", "the server's decoding of the round's updates"),
}


NEVER_RECORDED = "was announced but never recorded: run the sweep again"


STATES = "done", "failed", "missing"


ARROW = {
    "Int64": pa.int64(),
    "Float64": pa.float64(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "string": pa.string(),
}

RESULTS_AND_SOURCE = [*RESULTS_COLUMNS, "source"]
"""The columns of a record read from anywhere, beside its settings."""


SETS_APART = "device", "numerics"
"""Columns in which runs that stand in one table must not differ unnoticed: where they do, they tell
runs apart as settings do."""

MACHINE = "device", "processor"
"""Columns that say where a run was trained: between unlike machines last digits may differ."""

ENDS = "rounds", "target", "budget", "diverged", "pruned", "failed"
"""How a run may end: all its rounds done; at a loss, or at a number of bytes, that it was to stop
at; not finite any more; given up by a search; failed."""


STOPPED = "target", "budget", "pruned"
"""Those of them that leave rounds undone by design: such a run's loss is none of all its rounds."""


@dataclass(frozen=True)
class End:
    """How a run ended.

    Attributes
    ----------
    how : str
        One of `ENDS`.
    reason : str or None
        Why, where there is more to say.
    """

    how: str
    reason: str | None = None


OF_STATUS = (
    "run_id", "status", "end", "reason", "device", "processor", "numerics", "schema_version",
)  # fmt: skip
"""Columns of ``results.csv`` that ``status.json`` states beside its summary."""

METRICS = [name for name in RESULTS_COLUMNS if name not in OF_STATUS]
"""Columns of ``results.csv`` that a run measures: the summary of its ``status.json``."""
