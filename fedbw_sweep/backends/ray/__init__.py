"""Clients on a pool of Ray workers that stays warm for the whole command."""
