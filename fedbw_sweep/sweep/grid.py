"""Overrides -> the cells of a sweep: Hydra's own grid, composed once for each set of choices."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import cache, lru_cache
from pathlib import Path

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf

from fedbw_sweep.config.defaults import refuse_other_names
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.config.section import CONF

VALUES = {name for name in RunConfig.model_fields if not (CONF / name).is_dir()}
"""Keys that no config group fills."""

GROUPS = set(RunConfig.model_fields) - VALUES

COMPOSED = re.compile(r"^(# @package|defaults:)", re.MULTILINE)
"""In a choice's file: it sets keys outside its section, or builds on other files."""


def expand(overrides: Sequence[str], params: DictConfig | None = None) -> list[list[str]]:
    """List the overrides of every cell, as Hydra's basic sweeper expands them.

    Parameters
    ----------
    overrides : sequence of str
        Those of the command line.
    params : DictConfig, optional
        ``hydra.sweeper.params``: what an experiment sweeps.
    """
    swept = OmegaConf.to_container(params) if params else {}
    assert isinstance(swept, dict)
    lines = [*(f"{key!s}={value!s}" for key, value in swept.items()), *overrides]
    arguments = OverridesParser.create().parse_overrides(lines)
    [grid] = BasicSweeper.split_arguments(arguments, max_batch_size=None)
    return grid


class Composer:
    """Composes cells as ``hydra.compose`` does, which must be initialized, but faster.

    Composing takes a fifth of a second, nearly all of it for the choices of config groups. It is
    done once for those that bear on others, such as an experiment; a choice that is only a file of
    our own is then put in its place in a copy, and values are applied by Hydra's own function.

    Parameters
    ----------
    config_name : str
        The primary config.
    """

    def __init__(self, config_name: str) -> None:
        self._chosen = lru_cache(
            lambda choices: hydra.compose(config_name, list(choices), return_hydra_config=True)
        )

    def config(self, overrides: Sequence[str]) -> DictConfig:
        """Compose one cell's config, without its ``hydra`` node."""
        whole, sections, values = self._split(overrides)
        own = OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])
        config = deepcopy(own)  # the copy above shares what is below
        for key, section in sections.items():
            config[key] = section
        OmegaConf.set_struct(config, True)
        ConfigLoaderImpl._apply_overrides_to_config(values, config)
        chosen = {key: section["name"] for key, section in sections.items()}
        refuse_other_names(config, {**whole.hydra.runtime.choices, **chosen})
        return config

    def cells(self, overrides: Sequence[str]) -> Iterator[tuple[list[str], DictConfig]]:
        """Yield each cell's overrides and its config; what an experiment sweeps is expanded too."""
        grid = expand(overrides)
        whole, _, _ = self._split(grid[0])
        if params := whole.hydra.sweeper.get("params"):
            grid = expand(overrides, params)
        for lines in grid:
            yield lines, self.config(lines)

    def _split(
        self, overrides: Sequence[str]
    ) -> tuple[DictConfig, dict[str, DictConfig], list[Override]]:
        """Return what Hydra must compose, the sections to put into it, and the values to set."""
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        values = [override for override in parsed if not _is_choice(override)]
        choices = [override for override in parsed if _is_choice(override)]
        files = {_key(choice): _own_file(choice) for choice in choices}
        if None not in files.values():  # else one may change what another has chosen
            whole = self._chosen(())
            if all(key in whole for key in files):
                return whole, {key: _section(path) for key, path in files.items() if path}, values
        return self._chosen(tuple(str(choice.input_line) for choice in choices)), {}, values


@cache
def _section(path: Path) -> DictConfig:
    section = OmegaConf.load(path)
    assert isinstance(section, DictConfig)
    return section


def _own_file(choice: Override) -> Path | None:
    """Return the file in `CONF` that is all there is to a choice; None if Hydra must compose it."""
    if choice.type is not OverrideType.CHANGE or not isinstance(choice.value(), str):
        return None
    path = CONF / choice.key_or_group / f"{choice.value()}.yaml"
    known = choice.key_or_group in GROUPS and path.is_file()
    return path if known and not COMPOSED.search(path.read_text(encoding="utf-8")) else None


def _key(choice: Override) -> str:
    return choice.package or choice.key_or_group


def _is_choice(override: Override) -> bool:
    """Whether Hydra must compose with it: it chooses a config of a group, or is Hydra's own."""
    key = override.key_or_group
    is_value = key in VALUES or ("." in key and not key.startswith("hydra."))
    return override.package is not None or not is_value
