"""Sweeps of federated trainings that count every byte and say what it costs in loss."""
