"""DictConfig -> one frozen, validated `RunConfig`: the science apart from how it is executed."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from functools import cache
from math import floor
from typing import Any, Literal, Self

from omegaconf import DictConfig
from pydantic import Field

from fedbw_sweep.config.defaults import choice, groups, is_own, with_defaults
from fedbw_sweep.config.groups import (
    BackendConfig,
    CheckpointConfig,
    ClaimsConfig,
    ClientsConfig,
    DataConfig,
    DownlinkConfig,
    ModelConfig,
    NetworkConfig,
    RecordsConfig,
    ServerConfig,
    TrainableConfig,
    UplinkConfig,
)
from fedbw_sweep.config.identity import numerics_of, run_id_of, trajectory_of
from fedbw_sweep.config.renames import rename_settings
from fedbw_sweep.config.section import Choice, Section
from fedbw_sweep.console import message_console
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.sampling import Numbers, Sampler, SamplingRule

EXECUTION_KEYS = frozenset(
    {
        "backend",
        "checkpoint",
        "claims",
        "device",
        "logger",
        "network",
        "objective",
        "records",
        "sweep",
        "verbose",
    }
)
"""Top-level keys that say how a run is executed and change nothing in its results."""


class RunConfig(Section):
    """Everything one run needs, validated. Two runs with equal `science` leave equal results."""

    num_clients: int = Field(ge=1, description="clients that exist, at least 1")
    fraction_fit: float = Field(gt=0, le=1, description="fraction sampled each round, in (0, 1]")
    rounds: int = Field(ge=0, description="communication rounds, at least 0")
    local_epochs: int = Field(ge=0, description="passes over the client's text, at least 0")
    local_steps: int | None = Field(ge=0, description="steps a round, at least 0, or null")
    batch_size: int = Field(ge=1, description="sequences per step, at least 1")
    sequence_length: int = Field(ge=1, description="tokens per sequence, at least 1")
    lr: float = Field(gt=0, allow_inf_nan=False, description="learning rate, above 0")
    proximal_mu: float = Field(ge=0, allow_inf_nan=False, description="at least 0")
    upload: Literal["update", "weights"] = Field(description="what clients encode and send")
    seed: int = Field(ge=0, description="at least 0")
    stop_at_loss: float | None = Field(
        allow_inf_nan=False, description="a held-out loss in nats per token, or null"
    )
    stop_at_mb: float | None = Field(
        gt=0, allow_inf_nan=False, description="MB (10^6 bytes) of payload, above 0, or null"
    )
    evaluate_every: int = Field(ge=1, description="rounds, at least 1")
    clients: ClientsConfig
    sampling: Choice
    compression: UplinkConfig
    downlink: DownlinkConfig
    optimizer: Choice
    server: ServerConfig
    model: ModelConfig
    trainable: TrainableConfig
    initial_model: Literal["known", "sent"]
    data: DataConfig
    backend: BackendConfig
    network: NetworkConfig
    device: Literal["auto", "cpu", "cuda"]
    logger: Choice
    objective: str
    sweep: str
    claims: ClaimsConfig
    records: RecordsConfig
    checkpoint: CheckpointConfig
    verbose: bool

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Validate plain values, the compressors' parameters included; see `from_hydra`.

        Keys may have their former names, and one that a choice of the package lacks counts as its
        default. Error feedback that a method has by default is off where weights are uploaded.
        """
        config = super().from_dict(_with_classes(with_defaults(rename_settings(values))))
        ways = {"compression": config.compression, "downlink": config.downlink}
        for way in (way for way, method in ways.items() if method.build(way).uses):
            because = f"with {way}.context=received"
            if config.initial_model != "known":
                raise ConfigError("initial_model", config.initial_model, f"must be known {because}")
            if way == "compression" and config.upload != "update":
                raise ConfigError("upload", config.upload, f"must be update {because}")
        config.sampler()
        if config.upload != "weights" or not config.compression.error_feedback:
            return config
        offered = choice("compression", config.compression.name)
        if offered is not None and not offered["error_feedback"]:
            raise ConfigError(
                "upload",
                config.upload,
                "leaves nothing for error feedback to make up for: weights that were not sent are "
                "in the next ones anyway; leave compression.error_feedback out",
            )
        without = config.compression.model_copy(update={"error_feedback": False})
        return config.model_copy(update={"compression": without})

    @classmethod
    def from_hydra(cls, cfg: DictConfig) -> Self:
        """Validate a composed Hydra config, and say what `from_dict` has switched off."""
        config = super().from_hydra(cfg)
        if cfg.compression.get("error_feedback") and not config.compression.error_feedback:
            _say_switched_off(config.compression.name)
        return config

    @property
    def clients_per_round(self) -> int:
        """``max(1, floor(fraction_fit * num_clients))``, exact: 0.29 of 100 is 29."""
        return max(1, floor(Fraction(repr(self.fraction_fit)) * self.num_clients))

    def sampler(self, sizes: Numbers | None = None) -> Sampler:
        """Return who is sampled in each round.

        Parameters
        ----------
        sizes : ndarray of int64, shape (num_clients,), optional
            Training sequences of each client, where they are known.

        Raises
        ------
        ConfigError
            If ``sampling`` names no sampling rule, or one that refuses its parameters.
        """
        rule = self.sampling.instantiate("sampling")
        if not isinstance(rule, SamplingRule):
            raise ConfigError("sampling._target_", self.sampling.target, "must be a SamplingRule")
        return Sampler(
            rule, self.seed, self.num_clients, self.clients_per_round, self.clients.dropout, sizes
        )

    @property
    def science(self) -> dict[str, Any]:
        """What determines the results, as plain values."""
        plain = self.model_dump(by_alias=True, exclude=set(EXECUTION_KEYS))
        for key, section in plain.items():
            if key in groups() and (is_own(key, section) or section.get("_target_") is None):
                section.pop("_target_", None)
        return plain

    @property
    def numerics(self) -> int:
        """See `numerics_of`."""
        return numerics_of(self.science)

    @property
    def run_id(self) -> str:
        """See `run_id_of`."""
        science = self.science
        return run_id_of(science, numerics_of(science))

    @property
    def trajectory(self) -> str:
        """See `trajectory_of`."""
        return trajectory_of(self.science, lossless=self.is_lossless)

    @property
    def may_stop(self) -> bool:
        """Whether the run may end before its last round by design."""
        return self.stop_at_loss is not None or self.stop_at_mb is not None

    @property
    def is_lossless(self) -> bool:
        """Whether updates arrive as they are, so that the method changes their bytes alone."""
        return self.compression.build().lossless and not self.compression.error_feedback


@cache
def _say_switched_off(method: str) -> None:
    message_console().print(
        f"compression={method} upload=weights: without error feedback, which is for updates"
    )


def _with_classes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the classes of the choices that the package offers: records do not name them."""
    filled = dict(values)
    for key in groups().keys() & filled.keys():
        section = filled[key]
        if isinstance(section, str) and key in EXECUTION_KEYS:  # logger was no group before
            section = filled[key] = choice(key, section) or section
        if isinstance(section, Mapping) and is_own(key, section):
            offered = choice(key, section["name"]) or {}
            if "_target_" in offered:
                filled[key] = {**section, "_target_": offered["_target_"]}
    return filled
