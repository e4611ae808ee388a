"""The exceptions a user can meet. Each message says what was wrong and what to do next."""

from __future__ import annotations


class FedbwError(Exception):
    """Base of every error this package raises on purpose; shown without a traceback."""


class ConfigError(FedbwError):
    """A configuration value that is not allowed.

    Parameters
    ----------
    key : str
        Dotted name of the key as the user writes it, e.g. ``compression.density``.
    value : object
        The value that was given.
    allowed : str
        What is allowed instead, and the remedy where there is one.
    """

    def __init__(self, key: str, value: object, allowed: str) -> None:
        super().__init__(f"{key}={value}: {allowed}")
        self.key, self.value, self.allowed = key, value, allowed

    def under(self, group: str) -> ConfigError:
        """Return the same error with its key inside config group `group`."""
        return ConfigError(f"{group}.{self.key}", self.value, self.allowed)


class PayloadError(FedbwError):
    """A received payload that `decode` refuses: damaged, hostile or made for another layout."""


class DivergenceError(FedbwError):
    """An update, the global model or the held-out loss is NaN or infinite; none is sent on."""


class MeteringError(FedbwError):
    """The client's and the server's byte counts of one message differ."""


class ClientError(FedbwError):
    """A client failed or did not answer; the message carries the client's own reason."""


class ResultsError(FedbwError):
    """Files of a sweep that cannot be read or written."""


class DamagedError(ResultsError):
    """A record that is not what was written: it counts as missing, and is done again."""
