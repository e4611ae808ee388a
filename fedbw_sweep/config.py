"""DictConfig -> one frozen, validated `RunConfig`: the science apart from how it is executed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import product
from math import floor
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

import yaml
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedbw_sweep.compression.base import Compressor
from fedbw_sweep.errors import ConfigError

PACKAGE = Path(__file__).parent
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"
"""The configs: inside the package when installed from a wheel, beside it in a checkout."""

SCHEMA_VERSION = 2
"""Version of the recorded files and of what a run means; part of every ``run_id``."""

EXECUTION_KEYS = frozenset({"backend", "device", "logger", "network", "sweep", "verbose"})
"""Top-level keys that say how a run is executed and change nothing in its results."""


class Section(BaseModel):
    """Validated settings: frozen, strictly typed, no unknown keys."""

    # Built when first used, once with what it is part of: a command starts sooner.
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, protected_namespaces=(), defer_build=True
    )

    @classmethod
    def from_hydra(cls, cfg: DictConfig) -> Self:
        """Validate a composed Hydra config.

        Raises
        ------
        ConfigError
            Naming every key whose value is not allowed, the value and what is.
        """
        own = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
        try:
            values = OmegaConf.to_container(own, resolve=True, throw_on_missing=True)
        except MissingMandatoryValue as error:
            raise ConfigError(str(error.full_key), "???", "a value must be given") from None
        assert isinstance(values, dict)
        return cls.from_dict({str(key): value for key, value in values.items()})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Validate plain values; see `from_hydra`."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise _readable(error, cls) from None


class Choice(Section):
    """A choice of a group: a class and its parameters, which are any further keys."""

    model_config = ConfigDict(extra="allow")

    name: str
    target: str = Field(alias="_target_")

    @property
    def parameters(self) -> dict[str, Any]:
        """The class's own parameters."""
        return dict(self.model_extra or {})

    def instantiate(self, group: str, *arguments: Any, **keywords: Any) -> Any:
        """Call the class with its parameters, after what the caller knows.

        Raises
        ------
        ConfigError
            Under `group`, if the class is not there, or a parameter is unknown or not allowed.
        """
        try:
            return get_class(self.target)(*arguments, **keywords, **self.parameters)
        except ConfigError as error:
            raise error.under(group) from None
        except ImportError as error:
            raise ConfigError(f"{group}._target_", self.target, str(error)) from None
        except (TypeError, ValueError) as error:
            raise ConfigError(group, self.name, str(error)) from None


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
    def expand(cls, method: str) -> Iterator[tuple[str, Self]]:
        """Yield the choices that ``"topk density=0.01,0.1"`` names, one for each combination.

        Raises
        ------
        ConfigError
            If there is no such choice in ``conf/compression``.
        """
        name, *parameters = method.split()
        path = CONF / "compression" / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
            raise ConfigError("methods", method, f"no such method; there are: {known}")
        choice = yaml.safe_load(path.read_text(encoding="utf-8"))
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


class ServerConfig(Choice):
    """What the server makes of the mean update: a Flower strategy and its parameters."""

    FRACTIONS: ClassVar[frozenset[str]] = frozenset(
        {"beta_1", "beta_2", "momentum", "server_momentum"}
    )

    __pydantic_extra__: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        for name, value in self.parameters.items():
            if name in self.FRACTIONS and value >= 1:
                raise ConfigError(f"server.{name}", value, "must be in [0, 1)")
            if name not in self.FRACTIONS and value == 0:
                raise ConfigError(f"server.{name}", value, "must be above 0")
        return self


class ModelConfig(Section):
    """Which causal language model, and where its weights come from."""

    name: str
    weights: Literal["random", "pretrained"]
    name_or_path: str | None = Field(
        description="a hub name, a folder written by save_pretrained, or a GGUF file"
    )
    architecture: dict[str, Any] | None


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

    name: Literal["shakespeare", "text", "hub"]
    partition: Literal["natural", "iid", "dirichlet"]
    alpha: float = Field(gt=0, allow_inf_nan=False, description="Dirichlet concentration, above 0")
    min_characters: int = Field(ge=0, description="characters a natural client must have")
    heldout_fraction: float = Field(gt=0, lt=1, description="part of the text never trained on")
    heldout_tokens: int = Field(ge=1, description="tokens of the fixed held-out set")
    path: str | None = None
    text_column: str = "text"
    client_column: str | None = None
    label_column: str | None = None
    subset: str | None = None
    split: str = "train"


class ClientsConfig(Section):
    """What real clients do to a federation."""

    dropout: float = Field(ge=0, lt=1, description="fraction that never replies, in [0, 1)")


class BackendConfig(Section):
    """What executes the clients; changes nothing in the results."""

    name: Literal["ray", "flower"]
    workers: int | None = Field(ge=1, description="processes, at least 1, or null: one per core")
    client_timeout_s: float = Field(gt=0, description="seconds, above 0")
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
    clients: ClientsConfig
    compression: CompressionConfig
    downlink: CompressionConfig
    optimizer: Choice
    server: ServerConfig
    model: ModelConfig
    trainable: TrainableConfig
    initial_model: Literal["known", "sent"]
    data: DataConfig
    backend: BackendConfig
    network: NetworkConfig
    device: Literal["auto", "cpu", "cuda"]
    logger: Literal["none", "tensorboard"]
    sweep: str
    verbose: bool

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Validate plain values, the compressors' parameters included; see `from_hydra`."""
        config = super().from_dict(values)
        config.compression.build()
        config.downlink.build("downlink")
        if config.upload == "weights" and config.compression.error_feedback:
            raise ConfigError(
                "upload",
                config.upload,
                "leaves nothing for error feedback to make up for: weights that were not sent are "
                "in the next ones anyway; add compression.error_feedback=false",
            )
        return config

    @property
    def clients_per_round(self) -> int:
        """``max(1, floor(fraction_fit * num_clients))``, exact: 0.29 of 100 is 29."""
        return max(1, floor(Fraction(repr(self.fraction_fit)) * self.num_clients))

    @property
    def science(self) -> dict[str, Any]:
        """What determines the results, as plain values."""
        return self.model_dump(by_alias=True, exclude=set(EXECUTION_KEYS))

    @property
    def run_id(self) -> str:
        """See `science_id`."""
        return science_id(self.science)


def science_id(science: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits: a hash of a run's science config and the schema version."""
    text = json.dumps([SCHEMA_VERSION, science], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def config_columns(science: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a science config to dotted columns; a group's own name stands under the group.

    ``{"data": {"name": "text", "alpha": 1.0}}`` gives the columns ``data`` and ``data.alpha``.
    """
    columns: dict[str, Any] = {}
    for key, value in science.items():
        if not isinstance(value, Mapping):
            columns[key] = value
            continue
        for inner, inner_value in value.items():
            if inner == "_target_":
                continue
            name = key if inner == "name" else f"{key}.{inner}"
            is_plain = inner_value is None or isinstance(inner_value, str | int | float | bool)
            columns[name] = inner_value if is_plain else json.dumps(inner_value, sort_keys=True)
    return columns


def _readable(error: ValidationError, section: type[Section]) -> ConfigError:
    """Turn pydantic's report into `key=value: what is allowed`, all of it."""
    problems = []
    for detail in error.errors():
        keys: list[str] = []
        inside: Any = section
        field = None
        for part in map(str, detail["loc"]):
            if kind := _kind(inside, part):  # named by pydantic in between, but no key
                inside = kind
                continue
            keys.append(part)
            if hasattr(inside, "model_fields"):
                field = inside.model_fields.get(part)
                inside = field.annotation if field else None
        meaning = f" ({field.description})" if field and field.description else ""
        value = "(missing)" if detail["type"] == "missing" else detail["input"]
        problems.append(ConfigError(".".join(keys), value, detail["msg"] + meaning))
    first, *rest = problems
    first.args = ("\n".join(str(problem) for problem in problems),) if rest else first.args
    return first


def _kind(union: Any, name: str) -> type[Section] | None:
    """Return the section of this name in a union that tells its sections apart by their names."""
    kinds = [kind for kind in get_args(union) if hasattr(kind, "model_fields")]
    named = (kind for kind in kinds if name in get_args(kind.model_fields["name"].annotation))
    return next(named, None)
