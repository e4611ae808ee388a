"""Sweeps of federated trainings whose bytes are counted.

``run`` and ``sweep`` do what ``python -m fedbw_sweep`` does; `load_results` reads what runs left.
``compressor("topk density=0.1")`` makes any of ``conf/compression``, and
`encode_with_feedback` lets it make up for what it did not send.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedbw_sweep.api import Outcome, RunError, run, sweep
    from fedbw_sweep.compression.base import Compressor
    from fedbw_sweep.compression.feedback import encode_with_feedback
    from fedbw_sweep.compression.layout import Layout, TensorSpec
    from fedbw_sweep.config.groups import compressor
    from fedbw_sweep.errors import (
        ConfigError,
        FedbwError,
        PayloadError,
    )
    from fedbw_sweep.records.read import load as load_results

PUBLIC = {
    "run": "api:run",
    "sweep": "api:sweep",
    "Outcome": "api:Outcome",
    "RunError": "api:RunError",
    "load_results": "records.read:load",
    "Compressor": "compression.base:Compressor",
    "compressor": "config.groups:compressor",
    "Layout": "compression.layout:Layout",
    "TensorSpec": "compression.layout:TensorSpec",
    "encode_with_feedback": "compression.feedback:encode_with_feedback",
    "ConfigError": "errors:ConfigError",
    "FedbwError": "errors:FedbwError",
    "PayloadError": "errors:PayloadError",
}
"""Public names, each with the module that it is loaded from when it is first asked for."""

__all__ = ["__version__", *PUBLIC]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version(__name__)
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, inside = PUBLIC[name].partition(":")
    return getattr(import_module(f"{__name__}.{module}"), inside)


def __dir__() -> list[str]:
    return sorted(__all__)
