"""Bytes in, bytes out: every compression method. Knows NumPy; no Flower, no torch, no Hydra."""
