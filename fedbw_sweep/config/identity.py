"""What a run is called: the hash of what determines its results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from fedbw_sweep.config.defaults import beside, choice, groups, is_own, top_level
from fedbw_sweep.config.groups import DataConfig, ModelConfig

RECORD_FORMAT = 3
"""Version of the recorded files. A column or a file that is added later does not change it."""

Science = Mapping[str, Any]
"""A run's settings but for how it is executed, as plain values: what ``config.yaml`` holds."""


@dataclass(frozen=True)
class Change:
    """A change by design of the results of some runs.

    Attributes
    ----------
    number : int
        Its place in `NUMERICS`.
    what : str
        What changed.
    touches : callable
        Whether it changes the results of a run, by the run's settings.
    """

    number: int
    what: str
    touches: Callable[[Science], bool]


NUMERICS = (
    Change(2, "what runs recorded in format 2 are", lambda science: True),
    Change(
        3,
        "the loss is computed without its logits where a model's head is a linear layer; decoding "
        "is the same on every processor (lowrank, ecsq, lowrank_ecsq, eden, sketch); the server's "
        "step is made in float64; FedAdam is the paper's Algorithm 2",
        lambda science: True,
    ),
    Change(
        4,
        "each client and each evaluation starts from the module state that the model was built in",
        lambda science: _remembers(science),
    ),
    Change(
        5,
        "FedProx also pulls back what a step leaves without a gradient",
        lambda science: science.get("proximal_mu", 0) > 0 and _skips(science),
    ),
    Change(
        6,
        "trainable=bias takes biases of every name, as dense_bias, but none that never train",
        lambda science: (
            science.get("trainable", {}).get("name") == "bias" and _names_biases(science)
        ),
    ),
    Change(
        7,
        "trainable.targets=[all-linear] takes the matrices of experts, with rank rows each, and no "
        "router",
        lambda science: _adapts_experts(science),
    ),
)
"""Every change by design of results. A default in ``conf/`` changes only with a line here.

The number of the last one that touches a run enters its id, so that the repair of one method leaves
the ids of all other runs alone.
"""

PLACES = {"data": "path", "model": "name_or_path"}
"""Where a run's text and model lie. A place is a label where the content is known."""

OPTIONAL = {
    group: {
        key: field.default
        for key, field in section.model_fields.items()
        if not field.is_required() and key != "target"
    }
    for group, section in (("data", DataConfig), ("model", ModelConfig))
}
"""Defaults of the keys that a choice's file need not have."""


REMEMBERING = {"rwkv", "recurrent_gemma", "reformer", "big_bird"}
"""Architectures whose modules keep more than arrays, whatever their settings."""

SCALED_TO_LENGTH = {"dynamic", "longrope"}
"""Kinds of rotary embeddings whose frequencies depend on the texts seen so far."""

LEAVING_OUT = {
    *("afmoe", "bart", "big_bird", "bigbird_pegasus", "blenderbot", "blenderbot-small"),
    *("deepseek_v4", "ernie4_5_moe", "hrm_text", "hy_v4", "laguna", "marian", "mbart", "mvp"),
    *("pegasus", "plbart", "roformer", "trocr", "whisper"),
}
"""Architectures with parameters that no step gives a gradient: attention to an encoder that is not
there, and the like. Weight decay then shrinks them where FedProx pulls."""

BIASES_OF_OTHER_NAMES = {
    *("afmoe", "bailing_hybrid", "bamba", "beam", "cpmant", "deepseek_v4", "ernie4_5_moe"),
    *("falcon_h1", "gpt_neox_japanese", "gpt_oss", "granitemoehybrid", "kimi_linear", "laguna"),
    *("nemotron_h", "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"),
    *("qwen4_exp_text", "recurrent_gemma", "mamba2", "xlnet", "zamba", "zamba2"),
}
"""Architectures with biases that are not named ``bias``."""


WITH_EXPERTS = {
    *("afmoe", "aria_text", "cohere2_moe", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe"),
    *("exaone_moe", "flex_olmo", "glm4_moe", "gpt_oss", "granitemoe", "granitemoehybrid"),
    *("granitemoeshared", "hunyuan_v1_moe", "jamba", "lfm2_moe", "llama4_text", "minimax"),
    *("minimax_m2", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next"),
    *("qwen3_5_moe_text", "solar_open", "deepseek_v4", "hy_v3", "kimi_linear", "nemotron_h"),
}
"""Architectures that keep the matrices of a block's experts in one array."""


def _adapts_experts(science: Science) -> bool:
    trainable = science.get("trainable", {})
    adapts_all = trainable.get("name") == "lora" and trainable.get("targets") == ["all-linear"]
    return bool(adapts_all) and _architecture(science).get("model_type") in WITH_EXPERTS


def _architecture(science: Science) -> Mapping[str, Any]:
    """Return the architecture that a run's settings list: none where it is read from a place."""
    return science.get("model", {}).get("architecture") or {}


def _remembers(science: Science) -> bool:
    own = _architecture(science)
    rotary = own.get("rope_parameters") or own.get("rope_scaling") or {}
    each = [rotary, *(value for value in rotary.values() if isinstance(value, Mapping))]
    kinds = {kind for rope in each for kind in (rope.get("rope_type"), rope.get("type"))}
    return own.get("model_type") in REMEMBERING or bool(kinds & SCALED_TO_LENGTH)


def _skips(science: Science) -> bool:
    own = _architecture(science)
    dropped = any(own.get(key) for key in ("layerdrop", "decoder_layerdrop"))
    shrunk = science.get("optimizer", {}).get("weight_decay")
    return dropped or bool(shrunk and own.get("model_type") in LEAVING_OUT)


def _names_biases(science: Science) -> bool:
    return _architecture(science).get("model_type") in BIASES_OF_OTHER_NAMES


def numerics_of(science: Science) -> int:
    """Return the number of the last change by design that touches a run's settings."""
    return max(change.number for change in NUMERICS if change.touches(science))


def run_id_of(science: Science, numerics: int) -> str:
    """Name a run: twelve hexadecimal digits of a hash of what determines its results.

    These are the choices by name, the values that differ from the defaults, the content of what is
    read from disk in place of its path, and `numerics`. Where a class of the package lives, and a
    key that stands at its default, do not enter; a class that the package does not offer for a
    choice enters by its dotted name.

    Parameters
    ----------
    science : mapping
        The run's settings. A key that is not there counts as its default.
    numerics : int
        See `numerics_of`.
    """
    entered = {}
    for key, value in science.items():
        if key in groups():
            own = _own_settings(key, value)
        elif isinstance(value, Mapping) and isinstance(known := top_level().get(key, {}), Mapping):
            own = _differing(value, known)
        else:
            own = _differing({key: value}, top_level()).get(key, _NOTHING)
        if own not in ({}, _NOTHING):
            entered[key] = own
    text = json.dumps([RECORD_FORMAT, numerics, entered], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


ENDINGS = "rounds", "stop_at_loss", "stop_at_mb"
"""Settings that say after which round a run ends, and change nothing before."""


def trajectory_of(science: Science, *, lossless: bool) -> str:
    """Name what a run trains like, round by round: the run without `ENDINGS`.

    Runs of one trajectory are trained once, to the end of the longest. Nothing that computes is
    told any of `ENDINGS`, but for what a user's own config hands on, such as ``${rounds}`` in a
    parameter: it is another value for other rounds, so that such runs share nothing.

    Parameters
    ----------
    science : mapping
        The run's settings.
    lossless : bool
        Whether updates arrive as they are: then by what method they are encoded is left out too.
    """
    left_out = {*ENDINGS, "compression"} if lossless else {*ENDINGS}
    kept = {key: value for key, value in science.items() if key not in left_out}
    return run_id_of(kept, numerics_of(science))


_NOTHING = object()

_SCALARS = {str, bool, int, float, type(None)}


def optional(key: str) -> dict[str, Any]:
    """Return the defaults of the keys that a choice of a group need not have in its own file."""
    return {**OPTIONAL.get(key, {}), **beside(key)}


def _own_settings(key: str, section: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a group's section enters."""
    known = is_own(key, section)
    offered = choice(key, section["name"]) if known else None
    defaults = {**optional(key), **(offered or {})}
    defaults["name"] = groups()[key][1]
    left_out = {"_target_"} if known else set()
    if key == "model":
        left_out.add("label")
    if section.get("content") is not None:
        left_out.add(PLACES[key])
    values = {name: value for name, value in section.items() if name not in left_out}
    if key == "data" and "path" in left_out and section["name"] == "text":
        values["path"] = PurePath(section["path"]).suffix.lower()  # says how the text is read
    return _differing(values, defaults)


def _differing(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    different = {}
    for name, value in values.items():
        default = defaults.get(name, _NOTHING)
        if type(value) is type(default) and type(value) in _SCALARS and value == default:
            continue  # as most are, found without writing both
        plain = _canonical(value)
        if default is _NOTHING or json.dumps(plain) != json.dumps(_canonical(default)):
            different[name] = plain
    return different


def _canonical(value: Any) -> Any:
    """Spell a value in one way: 1 is 1.0, and a mapping's keys are sorted."""
    if isinstance(value, Mapping):
        return {str(name): _canonical(value[name]) for name in sorted(value)}
    if isinstance(value, list | tuple):
        return [_canonical(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def config_columns(science: Science) -> dict[str, Any]:
    """Flatten a run's settings to dotted columns; a group's own name stands under the group.

    ``{"data": {"name": "text", "alpha": 1.0}}`` gives the columns ``data`` and ``data.alpha``.
    """
    columns: dict[str, Any] = {}
    for key, value in science.items():
        if not isinstance(value, Mapping):
            columns[key] = value
            continue
        known = key in groups() and is_own(key, value)
        for inner, inner_value in value.items():
            if inner == "_target_" and known:
                continue
            name = key if inner == "name" else f"{key}.{inner}"
            is_plain = inner_value is None or isinstance(inner_value, str | int | float | bool)
            columns[name] = inner_value if is_plain else json.dumps(inner_value, sort_keys=True)
    if isinstance(model := science.get("model"), Mapping):
        columns["model.label"] = model_label(model)
    return columns


def model_label(model: Mapping[str, Any]) -> str | None:
    """Return what stands beside a model's name for people to read.

    It is the label that was given. A model of ``model=hub`` is else called by the last part of its
    place, or by the architecture that it lists.
    """
    if model.get("label") is not None or model.get("name") != "hub":
        return model.get("label")
    if place := model.get("name_or_path"):
        return PurePath(place).name
    return (model.get("architecture") or {}).get("model_type")
