"""Where Hydra looks for plugins, and will have them defined."""

from fedbw_sweep.sweeps import plugin


class GridSweeper(plugin.GridSweeper):
    """See `fedbw_sweep.sweeps.plugin.GridSweeper`."""
