"""The changes that people make most often, as edits of the repository.

Each is a list of files, of tests and documents apart: a new file is its text, an edit of one is
what is there and what takes its place.
"""

from __future__ import annotations

from pathlib import Path

Edits = dict[str, str | tuple[tuple[str, str], ...]]

CORPUS = '''"""Letters: a text that is made, a record per letter and line."""

import pandas as pd

from fedbw_sweep.config.groups import DataConfig


def read_letters(cfg: DataConfig) -> pd.DataFrame:
    """Make ten lines of each of eight letters, who are the clients."""
    rows = [((f"{letter} " * 40).strip(), letter, None) for letter in "abcdefgh" for _ in range(10)]
    return pd.DataFrame(rows, columns=["text", "client", "label"])
'''

LOGGER = '''"""Each round's loss as a line of text."""

from pathlib import Path
from typing import Any

from fedbw_sweep.config.run import RunConfig


class Lines:
    """Appends to a file of the sweep's folder."""

    def open(self, config: RunConfig, folder: Path) -> None:
        """See `Logger`."""
        self._file = (folder / "losses.txt").open("a", encoding="utf-8")

    def log(self, row: dict[str, Any]) -> None:
        """See `Logger`."""
        self._file.write(f"{row['round']} {row['loss']}\\n")

    def close(self) -> None:
        """See `Logger`."""
        self._file.close()
'''

BACKEND = '''"""Flower's simulation with one client at a time."""

from collections.abc import Sequence

from fedbw_sweep.backends.flower import FlowerBackend
from fedbw_sweep.federation.job import Job
from fedbw_sweep.federation.runs import Sink
from fedbw_sweep.records.checkpoint import Store


class OneByOneBackend(FlowerBackend):
    """For debugging: a single worker process."""

    def run(self, job: Job, sinks: Sequence[Sink], store: Store | None = None) -> None:
        """See `Backend`."""
        alone = {"backend": job.config.backend.model_copy(update={"workers": 1})}
        one_by_one = Job.of(*(config.model_copy(update=alone) for config in job.configs))
        super().run(one_by_one, sinks, store)
'''

RULE = '''

@dataclass(frozen=True)
class LastFirst(SamplingRule):
    """The clients of the highest numbers, in every round."""

    def choose(
        self,
        server_round: int,
        num_clients: int,
        count: int,
        rng: np.random.Generator,
        sizes: Numbers | None,
    ) -> Numbers:
        """See `SamplingRule`."""
        return np.arange(num_clients - count, num_clients)


@dataclass(frozen=True, eq=False)
class Sampler:'''

CHANGES: dict[str, Edits] = {
    "a data shape": {
        "fedbw_sweep/data/readers.py": (
            (
                '    ".parquet": pd.read_parquet,\n',
                '    ".parquet": pd.read_parquet,\n'
                '    ".tsv": lambda path: pd.read_csv(path, sep="\\t", dtype=str),\n',
            ),
        ),
    },
    "a corpus": {
        "fedbw_sweep/data/letters.py": CORPUS,
        "conf/data/letters.yaml": """# Ten lines of each of eight letters
name: letters
_target_: fedbw_sweep.data.letters.read_letters
partition: natural            # natural: a client is a letter
alpha: 0.5                    # dirichlet: concentration, above 0
min_characters: 10            # natural: characters that a letter must have to be a client
heldout_fraction: 0.1         # part of the text never trained on, in (0, 1)
heldout_tokens: 256           # tokens of the held-out set
content: null                 # filled in when a run starts
""",
    },
    "a metric column": {
        "fedbw_sweep/federation/rows.py": (
            (
                '        "initial_loss": rounds[0]["loss"],\n',
                '        "initial_loss": rounds[0]["loss"],\n'
                '        "loss_drop": rounds[0]["loss"] - last["loss"],\n',
            ),
        ),
        "fedbw_sweep/records/schema.py": (
            (
                '    "model_hash": Column(',
                '    "loss_drop": Column("Float64", "initial_loss - loss", required=False),\n'
                '    "model_hash": Column(',
            ),
            (
                '    "bits_per_byte": ("bits per byte", "", 3, 1),\n',
                '    "bits_per_byte": ("bits per byte", "", 3, 1),\n'
                '    "loss_drop": ("drop of the loss", "nats/token", 3, 1),\n',
            ),
        ),
        "fedbw_sweep/report/tables/compression.yaml": (
            (
                "  - {value: loss_difference,",
                '  - {value: loss_drop, header: drop, unit: nats/token, format: ".3f"}\n'
                "  - {value: loss_difference,",
            ),
        ),
    },
    "a causal LM": {
        "conf/model/little_gpt2.yaml": """# A GPT-2 of one block
name: little_gpt2
weights: random               # drawn from the seed
name_or_path: null            # exists nowhere as pretrained weights
architecture:                 # the transformers config
  model_type: gpt2            # transformers' name of the architecture
  vocab_size: 256             # tokens
  n_positions: 128            # tokens of context
  n_embd: 8                   # features of the residual stream
  n_layer: 1                  # transformer blocks
  n_head: 2                   # heads per block
content: null                 # filled in when a run starts
""",
    },
    "a network": {
        "conf/network/satellite.yaml": """# A geostationary satellite
name: satellite
uplink_mbit_s: 3              # Mbit/s from a client
downlink_mbit_s: 25           # Mbit/s to a client
latency_s: 0.3                # seconds, one way
spread: 0.3                   # standard deviation of the speeds' logarithm
""",
    },
    "a report table": {
        "fedbw_sweep/report/tables/clients.yaml": """# What more clients change.
title: Clients against loss
rows: [num_clients]
measures:
  - {value: loss, header: loss, unit: nats/token, aggregate: mean_sd, format: ".3f", best: min}
""",
    },
    "a sampling rule": {
        "fedbw_sweep/sampling.py": (
            ("\n\n@dataclass(frozen=True, eq=False)\nclass Sampler:", RULE),
        ),
        "conf/sampling/last_first.yaml": """# The clients of the highest numbers
name: last_first
_target_: fedbw_sweep.sampling.LastFirst
""",
    },
    "a logger": {
        "fedbw_sweep/sweeps/loggers/lines.py": LOGGER,
        "conf/logger/lines.yaml": """# Each round's loss in outputs/<sweep>/losses.txt
name: lines
_target_: fedbw_sweep.sweeps.loggers.lines.Lines
""",
    },
    "a backend": {
        "fedbw_sweep/backends/one_by_one.py": BACKEND,
        "conf/backend/one_by_one.yaml": """# One client at a time, for debugging
name: one_by_one
_target_: fedbw_sweep.backends.one_by_one.OneByOneBackend
workers: null                 # of no effect: one
client_timeout_s: 3600        # seconds to wait for a round's replies before the run fails
""",
    },
}


def apply(change: str, copy: Path) -> None:
    """Make a change in a copy of the repository."""
    for name, edit in CHANGES[change].items():
        path = copy / name
        if isinstance(edit, str):
            assert not path.exists(), name
            path.write_text(edit, encoding="utf-8")
            continue
        text = path.read_text(encoding="utf-8")
        for old, new in edit:
            assert text.count(old) == 1, (name, old)
            text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")
