"""Where clients execute."""

from fedbw_sweep import environment as environment  # before flwr and ray are imported
