"""The sections of a run's config that config groups fill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import inf
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from omegaconf import OmegaConf
from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from fedbw_sweep.compression.base import Compressor
from fedbw_sweep.config.section import CONF, Choice, Section
from fedbw_sweep.errors import ConfigError


class CompressionConfig(Choice):
    """A compression choice: the class, its parameters (any further key) and error feedback."""

    error_feedback: bool = Field(description="true or false: keep what was not sent for next time")

    @property
    def codes_weights(self) -> bool:
        """Whether, on the way down, the model itself is encoded, and clients keep nothing of it.

        So it is with methods fit for weights, unless error feedback is asked for: what is lost can
        only be made up for in a difference from what clients hold.
        """
        return self.build("downlink").codes_weights and not self.error_feedback

    @classmethod
    def expand(cls, method: str, folders: Sequence[Path] = (CONF,)) -> Iterator[tuple[str, Self]]:
        """Yield the choices that ``"topk density=0.01,0.1"`` names, one for each combination.

        Parameters
        ----------
        method : str
            A choice's name, then parameters; commas separate values.
        folders : sequence of pathlib.Path
            Where ``compression/<name>.yaml`` is looked for; the last that has it decides.

        Raises
        ------
        ConfigError
            If there is no such choice.
        """
        name, *parameters = method.split()
        paths = {p.stem: p for folder in folders for p in (folder / "compression").glob("*.yaml")}
        if name not in paths:
            known = ", ".join(sorted(paths))
            raise ConfigError("methods", method, f"no such method; there are: {known}")
        choice = yaml.safe_load(paths[name].read_text(encoding="utf-8"))
        swept = [parameter.partition("=") for parameter in parameters]
        for values in product(*(value.split(",") for _, _, value in swept)):
            pairs = [f"{key}={value}" for (key, _, _), value in zip(swept, values, strict=True)]
            read = OmegaConf.to_container(OmegaConf.from_dotlist(pairs))  # 1e-3 is a number here
            assert isinstance(read, dict)
            own = {str(key): value for key, value in read.items()}
            label = " ".join([name, *(f"{key}={value}" for key, value in own.items())])
            yield label, cls.model_validate({**choice, **own})

    def build(self, group: str = "compression") -> Compressor:
        """Instantiate the compressor.

        Raises
        ------
        ConfigError
            If a parameter is unknown or its value is not allowed, or error feedback would diverge.
        """
        built = self.instantiate(group)
        if not isinstance(built, Compressor):
            raise ConfigError(f"{group}._target_", self.target, "must be a Compressor class")
        if self.error_feedback and built.expands:
            raise ConfigError(
                f"{group}.error_feedback",
                True,
                f"must be false: the error of {built!r} is larger than the update, so that the "
                "residual would grow without bound",
            )
        return built


class UplinkConfig(CompressionConfig):
    """How clients' updates are encoded, and how fast what was not sent is forgotten."""

    feedback_decay: float = Field(default=1.0, gt=0, le=1, description="a number in (0, 1]")

    def build(self, group: str = "compression") -> Compressor:
        """Instantiate the compressor; see `CompressionConfig.build`.

        Raises
        ------
        ConfigError
            As there, or if what is not kept is to decay.
        """
        if self.feedback_decay != 1 and not self.error_feedback:
            raise ConfigError(
                f"{group}.feedback_decay",
                self.feedback_decay,
                "must be 1.0 with compression.error_feedback=false: nothing is kept",
            )
        return super().build(group)


class DownlinkConfig(CompressionConfig):
    """How the way down is encoded, and what is sent to clients that have missed updates."""

    catch_up: Literal["chain", "merged"] = Field(default="chain", description="chain or merged")

    def build(self, group: str = "downlink") -> Compressor:
        """Instantiate the compressor; see `CompressionConfig.build`.

        Raises
        ------
        ConfigError
            As there, or if merged updates are asked for without error feedback.
        """
        if self.catch_up != "chain" and not self.error_feedback:
            raise ConfigError(
                f"{group}.catch_up",
                self.catch_up,
                "needs downlink.error_feedback=true: a merged update is the whole difference to "
                "what a client holds, so that what one leaves unsent is in the next",
            )
        return super().build(group)


def compressor(method: str) -> Compressor:
    """Make a compressor of ``conf/compression``.

    Parameters
    ----------
    method : str
        Its name, and parameters that differ from its file's: ``"topk density=0.1"``.

    Raises
    ------
    ConfigError
        If there is no such compressor, or a parameter is not allowed.
    """
    choices = [choice for _, choice in CompressionConfig.expand(method)]
    if len(choices) > 1:
        raise ConfigError("method", method, "names several; give each parameter one value")
    return choices[0].build()


def _setting(value: object) -> bool | float:
    """Check a parameter of a server optimizer: its loc in an error is then the key alone."""
    if isinstance(value, bool):
        return value
    if not isinstance(value, int | float) or not 0 <= value < inf:
        raise PydanticCustomError("setting", "must be a number of at least 0, or true or false")
    return float(value)


class ServerConfig(Choice):
    """What the server makes of the mean update: a `torch.optim.Optimizer` and its parameters."""

    FRACTIONS: ClassVar[frozenset[str]] = frozenset({"beta_1", "beta_2", "momentum"})

    __pydantic_extra__: dict[str, Annotated[bool | float, BeforeValidator(_setting)]]

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        for name, value in self.parameters.items():
            if name in self.FRACTIONS and value >= 1:
                raise ConfigError(f"server.{name}", value, "must be in [0, 1)")
            if name not in self.FRACTIONS and value == 0 and value is not False:
                raise ConfigError(f"server.{name}", value, "must be above 0")
        return self


class ModelConfig(Section):
    """Which causal language model, and where its weights come from."""

    name: str
    target: str | None = Field(
        default=None, alias="_target_", description="what builds a model of the user's own"
    )
    weights: Literal["random", "pretrained"]
    name_or_path: str | None = Field(
        description="a hub name, a folder written by save_pretrained, or a GGUF file"
    )
    architecture: dict[str, Any] | None
    content: str | None = None
    label: str | None = Field(default=None, description="words for people, or null")


class TrainablePart(Section):
    """A choice of what trains that has no parameters of its own."""

    name: Literal["all", "head", "bias", "norm", "body"]


class TrainableBlocks(Section):
    """The last transformer blocks train."""

    name: Literal["last_n"]
    blocks: int = Field(ge=1, description="blocks counted from the last, at least 1")


class TrainableLora(Section):
    """Low-rank adapters train beside frozen weights (LoRA, Hu et al. 2021, arXiv:2106.09685)."""

    name: Literal["lora"]
    rank: int = Field(ge=1, description="columns of B and rows of A, at least 1")
    alpha: float = Field(gt=0, allow_inf_nan=False, description="scale times rank, above 0")
    targets: list[str] | None = Field(description="names of modules in brackets, or null")
    freeze_a: bool = Field(description="true or false: only B trains")


TrainableConfig = Annotated[
    TrainablePart | TrainableBlocks | TrainableLora, Field(discriminator="name")
]
"""Which parameters train and travel; a section for each kind of choice, told apart by its name."""


class DataConfig(Section):
    """Which text, how it is split into training and held-out parts and spread over clients."""

    name: str
    target: str = Field(alias="_target_", description="the function that reads the text")
    partition: Literal["natural", "iid", "dirichlet"]
    alpha: float = Field(gt=0, allow_inf_nan=False, description="Dirichlet concentration, above 0")
    min_characters: int = Field(ge=0, description="characters a natural client must have")
    pooled: int = Field(default=1, ge=1, description="natural clients, at least 1")
    heldout_fraction: float = Field(gt=0, lt=1, description="part of the text never trained on")
    heldout_tokens: int = Field(ge=1, description="tokens of the fixed held-out set")
    path: str | None = None
    text_column: str = "text"
    client_column: str | None = None
    label_column: str | None = None
    subset: str | None = None
    split: str = "train"
    content: str | None = None

    @model_validator(mode="after")
    def _pools_natural_clients(self) -> Self:
        if self.pooled > 1 and self.partition != "natural":
            raise ConfigError("data.pooled", self.pooled, "must be 1 but with partition=natural")
        return self


class ClientsConfig(Section):
    """What real clients do to a federation."""

    dropout: float = Field(ge=0, lt=1, description="fraction that never replies, in [0, 1)")


class ClaimsConfig(Section):
    """When a run that another machine has claimed is taken over."""

    stale_s: float = Field(gt=0, allow_inf_nan=False, description="seconds, above 0")


class RecordsConfig(Section):
    """What becomes of records that cannot be written at once."""

    retry_s: float = Field(ge=0, allow_inf_nan=False, description="seconds, at least 0")


class CheckpointConfig(Section):
    """The state of a run between its rounds."""

    enabled: bool
    keep_mb: float = Field(ge=0, allow_inf_nan=False, description="MB (10^6 bytes), at least 0")
    source: str | None


class BackendConfig(Section):
    """What executes the clients; changes nothing in the results."""

    name: str
    target: str = Field(alias="_target_", description="the backend's class")
    workers: int | None = Field(ge=1, description="processes, at least 1, or null: one per core")
    client_timeout_s: float = Field(gt=0, description="seconds, above 0")
    start_timeout_s: float = Field(default=300, gt=0, description="seconds, above 0")
    address: str | None = Field(default=None, description="host:port, auto, or null: start Ray")
    runs: int | None = Field(default=1, ge=1, description="runs at a time, at least 1, or null")
    client_gpus: float | None = Field(default=None, ge=0, description="GPUs a client, or null")


class NetworkConfig(Section):
    """The links between server and clients, of which communication time is estimated."""

    name: str
    uplink_mbit_s: float = Field(gt=0, allow_inf_nan=False, description="Mbit/s, above 0")
    downlink_mbit_s: float = Field(gt=0, allow_inf_nan=False, description="Mbit/s, above 0")
    latency_s: float = Field(ge=0, allow_inf_nan=False, description="seconds, at least 0")
    spread: float = Field(
        ge=0, allow_inf_nan=False, description="standard deviation of the speeds' logarithm"
    )

    @classmethod
    def choices(cls, name: str) -> list[Self]:
        """Read one choice of ``conf/network``, or all of them for ``all``.

        Raises
        ------
        ConfigError
            If there is no such choice.
        """
        paths = {path.stem: path for path in sorted((CONF / "network").glob("*.yaml"))}
        if name not in {*paths, "all"}:
            raise ConfigError("--network", name, f"must be all or one of {', '.join(paths)}")
        chosen = paths.values() if name == "all" else [paths[name]]
        return [cls.from_dict(yaml.safe_load(path.read_text(encoding="utf-8"))) for path in chosen]
