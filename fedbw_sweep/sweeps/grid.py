"""Overrides -> the runs of a sweep: parsed by Hydra, composed once for each set of choices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedbw_sweep.config.defaults import choice, groups, refuse_other_names
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.config.section import CONF
from fedbw_sweep.errors import ConfigError

VALUES = set(RunConfig.model_fields) - set(groups())
"""Keys that no config group fills."""

_one_hydra_at_a_time = Lock()


@contextmanager
def overrides_are_named(overrides: Sequence[str]) -> Iterator[None]:
    """Make an error that a user can act on of what Hydra says of overrides.

    Raises
    ------
    ConfigError
        With the overrides and Hydra's reason.
    """
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError("overrides", " ".join(overrides), str(error).strip()) from None


def runs_of(
    overrides: Sequence[str], config_dir: Path | None = None
) -> Iterator[tuple[list[str], RunConfig]]:
    """Yield each run that a command line names: its own overrides and its config.

    Parameters
    ----------
    overrides : sequence of str
        As of ``python -m fedbw_sweep -m``.
    config_dir : pathlib.Path, optional
        A folder with further choices.

    Raises
    ------
    ConfigError
        If an override is not allowed.
    """
    further = [f"hydra.searchpath=[{config_dir.resolve()}]"] if config_dir else []
    with (
        _one_hydra_at_a_time,
        overrides_are_named(overrides),
        hydra.initialize_config_dir(str(CONF), version_base="1.3"),
    ):
        composer = Composer("config")
        for lines in composer.grid([*overrides, *further]):
            yield lines, RunConfig.from_hydra(composer.config(lines))


def expand(overrides: Sequence[str], params: Mapping[str, Any] | None = None) -> list[list[str]]:
    """List the overrides of every run: the product of the values given, the last varying fastest.

    Parameters
    ----------
    overrides : sequence of str
        Those of the command line.
    params : mapping, optional
        ``hydra.sweeper.params``: what an experiment sweeps. The command line goes before it.

    Raises
    ------
    ConfigError
        If a key is given no value, or an interval, of which a grid has no points.
    """
    values: dict[str, list[str]] = {}
    for override in _parse(
        [*(f"{key}={value}" for key, value in (params or {}).items()), *overrides]
    ):
        key = override.get_key_element()
        if not override.is_sweep_override():
            values[key] = [override.get_value_element_as_str()]
            continue
        given = str(override.input_line).partition("=")[2]
        if not override.is_discrete_sweep():
            raise ConfigError(key, given, "a grid has no points of an interval; list the values")
        values[key] = list(override.sweep_string_iterator())
        if not values[key]:
            raise ConfigError(key, given, f"names no value{_offer(override)}")
    return [
        [f"{key}={value}" for key, value in zip(values, point, strict=True)]
        for point in product(*values.values())
    ]


def _offer(override: Override) -> str:
    loader = GlobalHydra.instance().config_loader()
    known = loader.get_group_options(override.key_or_group)
    return f"; there are {', '.join(known)}" if known else ""


def _parse(lines: Sequence[str]) -> list[Override]:
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    return parser.parse_overrides(list(lines))


class Composer:
    """Composes runs as ``hydra.compose`` does, which must be initialized, but faster.

    Composing takes a fifth of a second, nearly all of it for the choices of config groups. It is
    done once for those that bear on others, such as an experiment; a choice that the package offers
    is then put in its place in a copy, and so are values.

    Parameters
    ----------
    config_name : str
        The primary config.
    """

    def __init__(self, config_name: str) -> None:
        self._composed = lru_cache(
            lambda lines: hydra.compose(config_name, list(lines), return_hydra_config=True)
        )
        self._parsed = lru_cache(maxsize=None)(lambda line: _parse([line])[0])

    def config(self, overrides: Sequence[str]) -> DictConfig:
        """Compose one run's config, without its ``hydra`` node."""
        composed, own, values = self._split(overrides)
        keys = [str(key) for key in composed if key != "hydra"]
        config = deepcopy(OmegaConf.masked_copy(composed, keys))  # the copy shares what is below
        for key, section in own.items():
            config[key] = OmegaConf.create(section)
        OmegaConf.set_struct(config, True)
        for override in values:
            try:
                OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
            except OmegaConfBaseException:  # Hydra says best what is wrong
                self._composed(tuple(overrides))
                raise
        chosen = {key: section["name"] for key, section in own.items()}
        refuse_other_names(config, {**composed.hydra.runtime.choices, **chosen})
        return config

    def grid(self, overrides: Sequence[str]) -> list[list[str]]:
        """List the overrides of every run; what an experiment sweeps is expanded too."""
        grid = expand(overrides)
        composed, _, _ = self._split(grid[0])
        params = composed.hydra.sweeper.get("params")
        return expand(overrides, params) if params else grid

    def _split(
        self, overrides: Sequence[str]
    ) -> tuple[DictConfig, dict[str, dict[str, Any]], list[Override]]:
        """Return what Hydra must compose, the sections to put into it, and the values to set."""
        parsed = [self._parsed(line) for line in overrides]
        values = [each for each in parsed if _is_value(each)]
        others = [each for each in parsed if not _is_value(each)]
        own = {_key(each): _offered(each) for each in others}
        if None not in own.values():  # else one may change what another has chosen
            return self._composed(()), {k: dict(v) for k, v in own.items() if v}, values
        return self._composed(tuple(str(each.input_line) for each in others)), {}, values


def _key(override: Override) -> str:
    return override.package or override.key_or_group


def _offered(override: Override) -> dict[str, Any] | None:
    """Return all that a choice of the package's own says; None if Hydra must compose it."""
    key, name = _key(override), override.value()
    if override.type is not OverrideType.CHANGE or key not in groups():
        return None
    if groups()[key][0] != override.key_or_group or not isinstance(name, str):
        return None
    return choice(key, name)


def _is_value(override: Override) -> bool:
    """Whether an override changes one value that is there, of a run."""
    key = override.key_or_group
    plain = override.type is OverrideType.CHANGE and override.package is None
    return plain and (key in VALUES or ("." in key and not key.startswith("hydra.")))
