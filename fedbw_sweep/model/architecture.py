"""What an architecture of transformers has: its keys, of which no others are taken, and tokens."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, modeling_rope_utils

from fedbw_sweep.errors import ConfigError


def token_embedding(model: PreTrainedModel) -> nn.Module | None:
    """Return the table of tokens; None where a model of a user's own does not say which it is."""
    with suppress(NotImplementedError):
        return model.get_input_embeddings()
    return None


def refuse_unknown_keys(config: PreTrainedConfig, given: Mapping[str, Any], prefix: str) -> None:
    """Refuse keys that a config's class does not define; transformers takes any.

    Parameters
    ----------
    config : PreTrainedConfig
        What transformers made of `given`.
    given : mapping
        Keys and values as the user wrote them; those of configs inside are looked at as well.
    prefix : str
        Dotted name of the key that holds them.

    Raises
    ------
    ConfigError
        Naming the key, and the one that it resembles.
    """
    kind = type(config)
    defined = _defined(kind)
    for key, value in given.items():
        if key in defined or _mentions(kind, key):
            inside = getattr(config, key, None)
            if isinstance(value, Mapping) and isinstance(inside, PreTrainedConfig):
                refuse_unknown_keys(inside, value, f"{prefix}.{key}")
            continue
        alike = difflib.get_close_matches(key, defined, 3)
        hint = f"; did you mean {' or '.join(alike)}?" if alike else ""
        raise ConfigError(f"{prefix}.{key}", value, f"{kind.__name__} has no such key{hint}")


def _defined(kind: type[PreTrainedConfig]) -> frozenset[str]:
    """Name what a config's class states, takes and gives."""
    names = {*inspect.signature(kind.__init__).parameters, *kind.attribute_map}
    for base in kind.__mro__:
        names |= {*vars(base).get("__annotations__", {})}
    with suppress(Exception):  # a class whose defaults it refuses itself
        names |= vars(kind()).keys()
    names |= {name for name in dir(kind) if not callable(getattr(kind, name, None))}
    return frozenset(name for name in names if not name.startswith("__"))


def _mentions(kind: type[PreTrainedConfig], key: str) -> bool:
    """Whether the class reads a key by its name alone, as it does former names of keys."""
    classes = [base for base in kind.__mro__ if issubclass(base, PreTrainedConfig)]
    quoted = re.compile(rf"""["']{re.escape(key)}["']""")
    sources = [*map(inspect.getsource, classes), inspect.getsource(modeling_rope_utils)]
    return any(map(quoted.search, sources))
