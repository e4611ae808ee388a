"""The codec bench: every method measured on real updates."""
