"""What the bytes should be: the seed's formula."""

from __future__ import annotations


def seed_formula(model_bytes: int, update_bytes: int, clients_per_round: int, rounds: int) -> int:
    """Predict a run's total payload bytes.

    *bandwidth = (model sent to the client + update received) x clients x fraction sampled per round
    x rounds*, with the clients and the fraction already combined into a whole number.

    Parameters
    ----------
    model_bytes, update_bytes : int
        Payload bytes of one downlink and of one uplink message.
    clients_per_round : int
        ``max(1, floor(fraction_fit * num_clients))``.
    rounds : int
        Communication rounds.

    Returns
    -------
    int
        Payload bytes of all messages in both directions.
    """
    return (model_bytes + update_bytes) * clients_per_round * rounds
