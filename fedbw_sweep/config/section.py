"""Validated settings: the base of every section of a run's config, and errors a user can read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self, get_args

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedbw_sweep.errors import ConfigError

PACKAGE = Path(__file__).parent.parent


CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"
"""The configs: inside the package when installed from a wheel, beside it in a checkout."""


class Section(BaseModel):
    """Validated settings: frozen, strictly typed, no unknown keys."""

    # Built when first used, once with what it is part of: a command starts sooner.
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        protected_namespaces=(),
        defer_build=True,
        serialize_by_alias=True,
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
            own = get_class(self.target)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{group}._target_", self.target, str(error)) from None
        try:
            return own(*arguments, **keywords, **self.parameters)
        except ConfigError as error:
            raise error.under(group) from None
        except (ImportError, TypeError, ValueError) as error:
            raise ConfigError(group, self.name, str(error)) from None


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
