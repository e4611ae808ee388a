"""Hypothesis for the codecs: the same examples each time, however slow the machine."""

from hypothesis import settings

settings.register_profile("codecs", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("codecs")
