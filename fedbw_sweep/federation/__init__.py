"""The algorithm: server, clients, and what travels between them."""

from fedbw_sweep import environment as environment  # before flwr and ray are imported
