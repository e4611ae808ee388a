"""Extras: packages that one option alone needs, looked for before anything trains."""

from __future__ import annotations

from importlib.util import find_spec

from fedbw_sweep.errors import ConfigError

MODULES = {
    "dirichlet": ("flwr_datasets", "datasets"),
    "hub": ("datasets",),
    "lora": ("peft",),
    "report": ("altair", "vl_convert", "jinja2"),
    "smollm2": ("gguf",),
}
"""What is imported of each extra of ``pyproject.toml`` that bears another name than its module."""

OPTIONS = {
    ("data", "hub"): "hub",
    ("data.partition", "dirichlet"): "dirichlet",
    ("trainable", "lora"): "lora",
}
"""The extra that a key's value needs."""


def why_not(extra: str) -> str | None:
    """Say what of an extra is not installed and how to install it, or None if nothing is missing.

    Nothing is imported. The command is the same for a checkout and for an installed package: pip
    keeps the ``fedbw_sweep`` that is there and adds what its extra lacks.
    """
    missing = [module for module in MODULES.get(extra, (extra,)) if find_spec(module) is None]
    if not missing:
        return None
    return f"needs {', '.join(missing)}: pip install 'fedbw_sweep[{extra}]'"


def require(key: str, value: str) -> None:
    """Refuse a value of a key whose extra is not installed.

    Raises
    ------
    ConfigError
        Naming the key, its value, what is missing and the command that installs it.
    """
    extra = OPTIONS.get((key, value))
    if extra is not None and (why := why_not(extra)) is not None:
        raise ConfigError(key, value, why)


def need(extra: str) -> None:
    """Refuse to go on without an extra: for the classes that choices of `conf/` name.

    Raises
    ------
    ModuleNotFoundError
        Saying what is missing and the command that installs it.
    """
    if (why := why_not(extra)) is not None:
        raise ModuleNotFoundError(why)
