"""What must be set before Flower and Ray are imported, or Ray is started."""

import os

# No telemetry, no notices.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of a task only its reply is looked at
# Workers start when they are asked for: a command does not wait until they have.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
# One process that spills and one that restores, each of 45 MB, and not four each.
os.environ.setdefault("RAY_max_io_workers", "1")
# What is no longer held is freed at once, not up to a second later: its memory, which every process
# has touched, is the next message's.
os.environ.setdefault("RAY_free_objects_batch_size", "1")


def cores() -> int:
    """Cores that this process may use: fewer than the machine has in a container or a Slurm job."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
