"""Set a process up to train."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from threadpoolctl import threadpool_limits

from fedbw_sweep.errors import ConfigError

MALLOC_OPTIONS = {-4: 0, -1: 2**31 - 1, -8: 1}
"""glibc's M_MMAP_MAX: map no buffer of its own; M_TRIM_THRESHOLD: keep what is freed; M_ARENA_MAX:
one heap for all threads, so that they reuse each other's."""


def pick_device(name: str) -> torch.device:
    """Return the device to compute on; ``auto`` is a CUDA device where this process sees one.

    Raises
    ------
    ConfigError
        If the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", name, "no CUDA device is visible; use cpu or auto")
    return torch.device(name)


def prepare_process() -> None:
    """Set this process up to train: reproducibly, and without giving memory back in between.

    One thread of linear algebra sums in an order that does not depend on the machine's cores. And
    glibc keeps freed memory: the logits of one step are 100 MB, and having the kernel map and zero
    such buffers anew takes as long as computing them (benchmarks/README.md).
    """
    torch.set_num_threads(1)  # of the thread at hand; the rest holds for all
    _prepare_all_threads()


@cache
def _prepare_all_threads() -> None:
    threadpool_limits(1, user_api="blas")
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        for parameter, value in MALLOC_OPTIONS.items():
            libc.mallopt(parameter, value)
