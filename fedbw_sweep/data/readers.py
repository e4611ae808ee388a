"""Files and hub data sets -> a table of records."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from fedbw_sweep.config.groups import DataConfig
from fedbw_sweep.config.inputs import HUB_TIMEOUT_S, revision_of
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.extras import require


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


def read_text_file(cfg: DataConfig) -> pd.DataFrame:
    """Read the file at ``data.path``: a record per row, paragraph or line."""
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


def read_hub(cfg: DataConfig) -> pd.DataFrame:
    """Read a data set of the Hugging Face hub, or a local folder of data files."""
    require("data", "hub")
    import datasets  # 1.5 s, and only here and to partition
    from huggingface_hub import HfApi, is_offline_mode

    if not cfg.path:
        raise ConfigError("data.path", cfg.path, "give a data set's name on the hub, or a folder")
    try:
        # load_dataset retries an unreachable hub for 23 s; asking first fails at once.
        if not Path(cfg.path).exists() and not is_offline_mode():
            HfApi().dataset_info(cfg.path, timeout=HUB_TIMEOUT_S)
        revision = revision_of(cfg.content)
        dataset = datasets.load_dataset(cfg.path, cfg.subset, split=cfg.split, revision=revision)
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
