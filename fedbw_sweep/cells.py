"""Overrides -> the cells of a sweep: Hydra's own grid, composed once for each set of choices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import lru_cache

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from fedbw_sweep.config import CONF, RunConfig

VALUES = {name for name in RunConfig.model_fields if not (CONF / name).is_dir()}
"""Keys that no config group fills."""


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

    Composing takes a tenth of a second, nearly all of it for the choices of config groups: it is
    done once for each set of them. Values are then applied to a copy, by Hydra's own function.

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
        whole, values = self._split(overrides)
        own = OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])
        config = deepcopy(own)  # the copy above shares what is below
        OmegaConf.set_struct(config, True)
        ConfigLoaderImpl._apply_overrides_to_config(values, config)
        return config

    def cells(self, overrides: Sequence[str]) -> Iterator[tuple[list[str], DictConfig]]:
        """Yield each cell's overrides and its config; what an experiment sweeps is expanded too."""
        grid = expand(overrides)
        whole, _ = self._split(grid[0])
        if params := whole.hydra.sweeper.get("params"):
            grid = expand(overrides, params)
        for lines in grid:
            yield lines, self.config(lines)

    def _split(self, overrides: Sequence[str]) -> tuple[DictConfig, list[Override]]:
        """Return the config that the choices make, and the values to set in it."""
        choices, values = [], []
        for override in OverridesParser.create().parse_overrides(list(overrides)):
            if _is_choice(override):
                choices.append(str(override.input_line))
            else:
                values.append(override)
        return self._chosen(tuple(choices)), values


def _is_choice(override: Override) -> bool:
    """Whether Hydra must compose with it: it chooses a config of a group, or is Hydra's own."""
    key = override.key_or_group
    is_value = key in VALUES or ("." in key and not key.startswith("hydra."))
    return override.package is not None or not is_value
