"""Predictions against what runs send; ``python -m tests.cost.test_prediction`` measures bits."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbw_sweep.bench.updates import BenchConfig, train_updates
from fedbw_sweep.compression.layout import Layout, TensorSpec
from fedbw_sweep.config.groups import CompressionConfig
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.config.section import CONF
from fedbw_sweep.cost.network import expected_round_seconds
from fedbw_sweep.cost.prediction import MEASURED_BITS, Prediction, bits_per_coordinate, predict
from fedbw_sweep.model.layout_cache import find_layout
from fedbw_sweep.seeding import rng_for
from fedbw_sweep.sweeps import run
from tests.local import LocalBackend

Build = Callable[..., RunConfig]

METHODS = (
    "lossless",
    "qsgd levels=1,4,16,64",
    "ternary density=0.001,0.01,0.1",
    "topk density=0.001,0.01,0.1 values=fp32,fp16,int8,sign",
    "randk density=0.001,0.01,0.1 values=fp32,fp16,int8,sign",
    "threshold threshold=0.0003,0.001,0.003,0.01",
    "ecsq step=8.0,4.0,2.0,1.0,0.5,0.25",
    "ecsq target_nmse=0.3,0.1,0.03,0.01,0.003",
    "lowrank_ecsq step=8.0,4.0,2.0,1.0,0.5,0.25",
    "lowrank_ecsq target_nmse=0.3,0.1,0.03,0.01,0.003",
)
"""What is measured: every method whose size is not fixed, over the range of its parameter."""

MODELS = ("tiny", "pythia-14m")
STEPS = 20
"""Optimizer steps behind the update that is measured."""


def measure(model: str, methods: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
    """Yield model, method and bits per coordinate of each method on a client's real update."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = [f"model={model}", f"steps={STEPS}", "clients=1"]
        config = BenchConfig.from_hydra(compose("codecs", overrides))
    layout, [update] = train_updates(config)
    for method in methods:
        for label, choice in CompressionConfig.expand(method):
            payload = choice.build().encode(update, layout, rng_for(0, "encode", 0))
            yield model, label, f"{8 * len(payload) / layout.size:.4g}"


CHOICES = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))
    for path in sorted((CONF / "compression").glob("*.yaml"))
}
FIXED = [
    name
    for name, choice in CHOICES.items()
    if CompressionConfig.model_validate(choice).build().fixed_size
]
TRAINABLE = [
    yaml.safe_load((CONF / "trainable" / f"{name}.yaml").read_text(encoding="utf-8"))
    for name in ("all", "last_n", "head", "bias", "lora")
]
PARAMETERS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "int8": {"block": st.sampled_from([8, 128, 1000])},
    "lowrank": {"rank": st.integers(1, 9)},
    "eden": {"bits": st.sampled_from([0.3, 1, 3])},
    "sign": {"scale": st.sampled_from(["tensor", "row"])},
    "sketch": {"counters": st.floats(0.01, 1), "rows": st.sampled_from([1, 5])},
}


@pytest.fixture(scope="module")
def defaults() -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = RunConfig.from_hydra(compose("config", ["sequence_length=8"]))
    return config.model_dump(by_alias=True)


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    """Settings of a run of a few milliseconds, with a method of fixed size."""
    name = draw(st.sampled_from(FIXED))
    own = {key: draw(values) for key, values in PARAMETERS.get(name, {}).items()}
    heads = draw(st.integers(1, 2))
    architecture = {
        "model_type": "gpt_neox",
        "vocab_size": draw(st.integers(256, 300)),
        "hidden_size": 4 * heads,
        "num_hidden_layers": draw(st.integers(1, 2)),
        "num_attention_heads": heads,
        "intermediate_size": draw(st.integers(1, 9)),
        "max_position_embeddings": 16,
        "tie_word_embeddings": draw(st.booleans()),
    }
    return {
        "compression": {**CHOICES[name], **own},
        "model": {
            "name": "drawn",
            "weights": "random",
            "name_or_path": None,
            "architecture": architecture,
        },
        "downlink": CHOICES[draw(st.sampled_from(FIXED))],
        "trainable": draw(st.sampled_from(TRAINABLE)),
        "initial_model": draw(st.sampled_from(["known", "sent"])),
        "num_clients": draw(st.integers(1, 7)),
        "fraction_fit": draw(st.floats(0.05, 1)),
        "rounds": draw(st.integers(0, 6)),
        "local_steps": 1,
        "batch_size": 1,
        "clients": {"dropout": draw(st.sampled_from([0.0, 0.0, 0.4]))},
        "seed": draw(st.integers(0, 99)),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where runs go; layouts that are derived are kept below it, not in the user's cache."""
    folder = tmp_path_factory.mktemp("predicted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(run, "backend_of", LocalBackend())
        yield folder


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(values=runs())
def test_the_prediction_is_the_measurement_to_the_byte(
    values: dict[str, Any], defaults: dict[str, Any], folder: Path
) -> None:
    """From shapes alone, for every method of fixed size; the federation really runs."""
    data = {**defaults["data"], "heldout_tokens": 16}
    config = RunConfig.from_dict({**defaults, "data": data, **values})
    prediction = predict(config, *find_layout(config))
    record = run.execute(config, folder)
    assert record.error is None
    assert prediction is not None
    measured = {
        direction: sum(m["payload_bytes"] for m in record.messages if m["direction"] == direction)
        for direction in ("downlink", "uplink")
    }
    assert prediction.downlink_bytes == measured["downlink"] == record.summary["downlink_bytes"]
    assert prediction.uplink_bytes == measured["uplink"] == record.summary["uplink_bytes"]
    assert prediction.total_bytes == record.summary["predicted_bytes"]
    assert prediction.basis == record.summary["prediction"] == "exact"
    for row in record.rounds:
        assert row["predicted_bytes"] == row["uplink_bytes"] + row["downlink_bytes"]


def test_the_bandwidth_formula_by_hand(run_config: Build) -> None:
    # 2 clients, 1 round, no compression: 4 messages of pythia-14m
    config = run_config("experiment=lesson")
    prediction = predict(config, *find_layout(config))
    assert prediction == Prediction((2 * 56_270_848,), 56_270_848, (2,), (2,), (0,), "exact")
    assert prediction.total_bytes == 225_083_392


def test_a_million_clients_and_12_billion_parameters(run_config: Build) -> None:
    """By hand: int8 in blocks of 128 sends a byte each, a float16 scale a block, and the frame."""
    config = run_config("model=pythia-12b", "num_clients=1000000", "compression=int8")
    prediction = predict(config, *find_layout(config))
    parameters = 11_846_072_320  # as the model's authors say
    update = parameters + 2 * -(-parameters // 128) + 4
    assert prediction == Prediction(
        (125_000 * 4 * parameters,) * 5, update, (125_000,) * 5, (125_000,) * 5, (0,) * 5, "exact"
    )
    seconds = expected_round_seconds(
        config.network.model_copy(update={"spread": 0.0}),
        prediction.mean_model_bytes,
        prediction.update_bytes,
        config.clients_per_round,
    )
    by_hand = 0.04 + 8 * (prediction.mean_model_bytes / 100e6 + prediction.update_bytes / 20e6)
    assert seconds == pytest.approx(by_hand)


LAYOUT = Layout((TensorSpec("w", (1000, 8)), TensorSpec("steps", (), "int64")))


def test_an_estimate_says_what_it_rests_on(run_config: Build) -> None:
    config = run_config("model=tiny", "compression=topk", "compression.density=0.01")
    bits = measured_bits("tiny", "topk density=0.01 values=fp32")
    prediction = predict(config, LAYOUT)
    assert prediction is not None
    assert prediction.update_bytes == round(bits * 1000) + 8
    assert prediction.basis == (
        f"estimate: {bits:.3g} bits per coordinate, measured by the codec bench on tiny"
    )
    recorded = predict(config, LAYOUT, 0, (77, "1 run of this method recorded in outputs/main"))
    assert recorded is not None
    assert recorded.update_bytes == 77
    assert recorded.basis == "estimate: 1 run of this method recorded in outputs/main"
    aimed = predict(run_config("compression=ecsq", "compression.target_bits=0.5"), LAYOUT)
    assert aimed is not None
    assert aimed.update_bytes == 500 + 8
    assert aimed.basis == "estimate: compression.target_bits"
    exact = predict(run_config("compression=int8"), LAYOUT, 0, (77, "a run"))
    assert exact is not None
    assert exact.basis == "exact"  # what is known needs no record


def measured_bits(model: str, method: str) -> float:
    with MEASURED_BITS.open(encoding="utf-8", newline="") as file:
        rows = [(r["model"], r["method"], float(r["bits"])) for r in csv.DictReader(file)]
    [bits] = [bits for *names, bits in rows if names == [model, method]]
    return bits


@pytest.mark.parametrize(
    ("density", "between"), [("0.03", ("0.01", "0.1")), ("0.5", ("0.1", "0.1"))]
)
def test_bits_between_two_measurements(
    run_config: Build, density: str, between: tuple[str, str]
) -> None:
    config = run_config("compression=ternary", f"compression.density={density}")
    found = bits_per_coordinate(config.compression, "other")
    assert found is not None
    low, high = (measured_bits("tiny", f"ternary density={value}") for value in between)
    x, left, right = (math.log(float(value)) for value in (density, *between))
    share = (x - left) / (right - left) if right > left else 0
    assert found[0] == pytest.approx(math.exp(math.log(low) * (1 - share) + math.log(high) * share))
    assert found[1].endswith("from the codec bench on tiny at other density")


@pytest.mark.slow
def test_bits_among_the_assets_are_those_measured() -> None:
    """On another processor training differs in its last bits, so the sizes may by a little."""
    methods = ("ternary density=0.01", "lowrank_ecsq step=2.0", "topk density=0.1 values=fp32")
    for model, label, bits in measure("tiny", methods):
        assert float(bits) == pytest.approx(measured_bits(model, label), rel=0.03)


@pytest.mark.slow
def test_every_method_has_a_prediction(defaults: dict[str, Any]) -> None:
    for name, choice in CHOICES.items():
        config = RunConfig.from_dict({**defaults, "compression": choice})
        assert predict(config, LAYOUT) is not None, name


if __name__ == "__main__":
    with MEASURED_BITS.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["model", "method", "bits"])
        for model in MODELS:
            writer.writerows(measure(model, METHODS))
