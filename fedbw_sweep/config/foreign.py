"""What of a recorded config is not the package's own, and may be run only if its user says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedbw_sweep.config.defaults import choice, groups, is_own, read_yaml
from fedbw_sweep.config.inputs import IN_PACKAGE
from fedbw_sweep.config.renames import rename_settings
from fedbw_sweep.console import printable
from fedbw_sweep.errors import ConfigError

BUILT = "compression", "downlink", "optimizer", "server", "sampling", "data"
"""Keys whose choice names a class or a function, which is imported and called."""


def refuse_foreign(place: Path, science: Mapping[str, Any], config_dir: Path | None = None) -> None:
    """Refuse a config that names anything to run but what the package offers.

    Nothing is imported. The package's choices go by their names; beside them a config may name
    classes, packages that hold a model, and settings that make transformers load code.

    Parameters
    ----------
    place : pathlib.Path
        Where the config is, for the message.
    science : mapping
        A recorded run's settings.
    config_dir : pathlib.Path, optional
        A folder of the user's own choices; what one of its files names may be run.

    Raises
    ------
    ConfigError
        Naming the first such key, its value and the ways to allow it.
    """
    for key, value in _foreign(rename_settings(science), config_dir):
        raise ConfigError(
            key,
            printable(str(value)),
            f"{place} asks to run this, which fedbw_sweep does not offer; if you know what it "
            "does, --trust runs it, or --config-dir names the folder with your own choice of it",
        )


def _foreign(science: Mapping[str, Any], config_dir: Path | None) -> Iterator[tuple[str, Any]]:
    for key in BUILT:
        section = science.get(key)
        if section is None:
            continue
        if not isinstance(section, Mapping):
            yield key, section
        elif not is_own(key, section) and not _is_users(key, section, config_dir):
            yield f"{key}._target_", section.get("_target_", section.get("name"))
    model = science.get("model")
    if not isinstance(model, Mapping):
        yield "model", model
        return
    target = model.get("_target_")  # few models have one
    if (
        target is not None
        and not is_own("model", model)
        and not _is_users("model", model, config_dir)
    ):
        yield "model._target_", target
    offered = choice("model", str(model.get("name"))) or {}
    place = model.get("name_or_path")
    if isinstance(place, str) and IN_PACKAGE in place and place != offered.get("name_or_path"):
        yield "model.name_or_path", place
    if model.get("architecture") != offered.get("architecture"):
        yield from _loads_code("model.architecture", model.get("architecture"))


def _is_users(key: str, section: Mapping[str, Any], config_dir: Path | None) -> bool:
    name = section.get("name")
    if config_dir is None or not isinstance(name, str) or Path(name).name != name:
        return False
    path = config_dir / groups()[key][0] / f"{name}.yaml"
    return path.is_file() and read_yaml(path).get("_target_") == section.get("_target_")


def _loads_code(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Find what makes transformers load code: ``auto_map``, kernels, private settings."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            own = f"{name}.{key}"
            if str(key).startswith("_") or "map" in str(key) or "implementation" in str(key):
                yield own, inner
            yield from _loads_code(own, inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _loads_code(name, inner)
    elif isinstance(value, str) and ("/" in value or ":" in value):
        yield name, value
