"""Text in tokens: each client's own, and the windows that a model trains on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

Tokens = NDArray[np.int32]


Tokenize = Callable[[str], ArrayLike]


Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ClientTokens(Sequence[Tokens]):
    """Every client's training tokens in two flat arrays, so that they travel without a copy.

    Attributes
    ----------
    flat : ndarray of int32
        The clients' tokens, one client after the other.
    ends : ndarray of int64, shape (clients,)
        Where in `flat` each client's tokens end.
    """

    flat: Tokens
    ends: Rows

    @classmethod
    def of(cls, clients: Sequence[Tokens]) -> Self:
        """Join the clients' tokens."""
        flat = np.concatenate([np.empty(0, np.int32), *clients], dtype=np.int32)
        return cls(flat, np.cumsum([len(tokens) for tokens in clients], dtype=np.int64))

    def sequences(self, sequence_length: int) -> Rows:
        """Count each client's training sequences: shape (clients,), see `windows`."""
        return (np.diff(self.ends, prepend=0) - 1) // sequence_length

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, client: int) -> Tokens: ...

    @overload
    def __getitem__(self, client: slice) -> Sequence[Tokens]: ...

    def __getitem__(self, client: int | slice) -> Tokens | Sequence[Tokens]:
        if isinstance(client, slice):
            return [self[i] for i in range(*client.indices(len(self)))]
        client = range(len(self))[client]
        return self.flat[self.ends[client - 1] if client else 0 : self.ends[client]]


@dataclass(frozen=True)
class FederatedText:
    """A corpus as its clients and the evaluator see it, in tokens.

    Attributes
    ----------
    clients : ClientTokens
        Each client's training tokens, in corpus order; at least one window each.
    client_names : tuple of str
        Who they are: ``play/SPEAKER``, the client column's value, or the client's number.
    heldout : ndarray of int32, shape (windows, sequence_length + 1)
        The held-out set: inputs and, shifted by one, targets.
    heldout_tokens_per_byte : float
        Tokens of the whole held-out text over its UTF-8 bytes; 1 when tokens are bytes.
        Nats per token times this, over ln 2, are bits per byte.
    """

    clients: ClientTokens
    client_names: tuple[str, ...]
    heldout: Tokens
    heldout_tokens_per_byte: float


def windows(tokens: Tokens, sequence_length: int) -> Tokens:
    """Cut tokens into training sequences that overlap by one token.

    Parameters
    ----------
    tokens : ndarray, shape (n,)
    sequence_length : int
        Predictions per window.

    Returns
    -------
    ndarray, shape ((n - 1) // sequence_length, sequence_length + 1)
        A read-only view. Every token but the first is a target exactly once, except the fewer
        than `sequence_length` at the end that fill no window.
    """
    if len(tokens) <= sequence_length:
        return np.empty((0, sequence_length + 1), tokens.dtype)
    return np.lib.stride_tricks.sliding_window_view(tokens, sequence_length + 1)[::sequence_length]
